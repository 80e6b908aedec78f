//! The examples for orchestrators that cannot be run here: they are what their formats say, and host-shim understands them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use sandbox_folder::spec::SandboxSpec;
use yaml_rust2::{Yaml, YamlLoader};

fn example(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/orchestrators").join(name);
    let text = fs::read_to_string(path).unwrap();
    assert!(text.starts_with("# UNTESTED EXAMPLE: "), "{name} says of itself what it is");
    text
}

/// host-shim takes these arguments: it gets as far as the spec, which is not here.
#[track_caller]
fn assert_understood(arguments: &[String]) {
    let option = |name: &str| {
        let at =
            arguments.iter().position(|argument| argument == name).unwrap_or_else(|| panic!("no {name}"));
        &arguments[at + 1]
    };
    let [spec, dir] = ["--spec", "--dir"].map(option);
    // With the names of its sockets it must fit into an address.
    assert!(dir.len() < 80, "{dir}");
    let output = Command::new(env!("CARGO_BIN_EXE_host-shim"))
        .args(arguments)
        .current_dir("/proc")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with("host-shim: ") && stderr.contains(spec.as_str()), "{stderr}");
}

#[track_caller]
fn assert_spec(text: &str) {
    let spec: SandboxSpec = serde_json::from_str(text).unwrap();
    assert_eq!(spec.schema_version, sandbox_folder::spec::SCHEMA_VERSION);
}

fn words(list: &Yaml) -> Vec<String> {
    list.as_vec().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_pod_for_kubernetes() {
    let documents = YamlLoader::load_from_str(&example("sandbox.kubernetes.yaml")).unwrap();
    let [config, pod] = &documents[..] else { panic!("{} documents", documents.len()) };
    assert_eq!((config["kind"].as_str(), pod["kind"].as_str()), (Some("ConfigMap"), Some("Pod")));
    assert_spec(config["data"]["spec.json"].as_str().unwrap());
    let container = &pod["spec"]["containers"][0];
    assert!(words(&container["command"])[0].ends_with("/host-shim"));
    assert_understood(&words(&container["args"]));
    // Every mount has its volume, and the spec's is the ConfigMap.
    let volumes = pod["spec"]["volumes"].as_vec().unwrap();
    for mount in container["volumeMounts"].as_vec().unwrap() {
        assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount:?}");
    }
    assert_eq!(volumes[0]["configMap"]["name"], config["metadata"]["name"]);
    // A stop has the time that the shim may need.
    assert!(pod["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap() > 20);
}

#[test]
fn the_job_for_nomad() {
    let body: hcl::Body = hcl::from_str(&example("sandbox.nomad.hcl")).unwrap();
    let job: serde_json::Value = hcl::from_body(body).unwrap();
    let task = &job["job"]["sandbox"]["group"]["sandbox"]["task"]["shim"];
    assert_eq!(task["driver"], "raw_exec");
    assert!(task["config"]["command"].as_str().unwrap().ends_with("/host-shim"), "{job}");
    let arguments: Vec<String> = serde_json::from_value(task["config"]["args"].clone()).unwrap();
    let resolved = arguments.iter().map(|argument| argument.replace("${NOMAD_SHORT_ALLOC_ID}", "9f5e1a2b"));
    assert_understood(&resolved.collect::<Vec<_>>());
    assert_spec(task["template"]["data"].as_str().unwrap());
    assert_eq!(task["template"]["destination"], "local/spec.json");
    assert_eq!(task["kill_signal"], "SIGTERM");
}
