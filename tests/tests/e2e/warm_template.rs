//! `template create` with a real machine: the start command runs once, and each sandbox is a clone of that moment.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Instant;

use e2e::{Channel, DEADLINE, TestSandbox, TestSandboxBuilder, binary, made};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// A data folder of a test, beside which lie the images of all.
struct Kitchen(tempfile::TempDir);

impl Kitchen {
    fn new() -> Self {
        // Layers are unpacked there, which a tmpfs may not be able to do.
        Self(tempfile::Builder::new().prefix("warm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn template(&self, name: &str) -> PathBuf {
        self.at("data/templates").join(name)
    }

    async fn try_build(&self, data: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary("image-builder"));
        command.arg("--data-dir").arg(data).args(arguments).kill_on_drop(true);
        // What host-shim finds out about this machine is kept beside the tests' templates.
        let running = command.env("TIFFIN_DATA_DIR", made("TIFFIN_E2E_DATA")).output();
        tokio::time::timeout(DEADLINE, running)
            .await
            .expect("image-builder ends")
            .expect("image-builder runs")
    }

    /// What image-builder printed.
    async fn build(&self, data: &Path, arguments: &[&str]) -> String {
        let done = self.try_build(data, arguments).await;
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    /// Brings an image of all tests here.
    async fn image(&self, name: &str) -> String {
        let archive = format!("oci-archive:{}", self.at(name).display());
        self.build(&made("TIFFIN_E2E_DATA"), &["save", name, "-o", &archive]).await;
        archive
    }

    async fn try_create(&self, image: &str, options: &[&str]) -> Output {
        let create = ["template", "create", "t", "--json", "--image", image];
        self.try_build(&self.at("data"), &[&create, options].concat()).await
    }

    fn sandbox(&self) -> TestSandboxBuilder {
        TestSandbox::of(Channel::Serial).set("template", self.template("t").to_str().unwrap())
    }
}

const SMALL: [&str; 4] = ["--memory", "256", "--disk", "64"];

#[tokio::test]
async fn a_template_is_created_with_its_snapshot_and_sandboxes_are_clones_of_it() {
    let kitchen = Kitchen::new();
    let image = kitchen.image("e2e-base").await;
    let start = "echo started >> /tmp/starts; exec sleep 1000000";
    let commands = ["--start", start, "--ready", "test -e /tmp/starts"];
    let done = kitchen.try_create(&image, &[&SMALL[..], &commands].concat()).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let made: Value = serde_json::from_slice(&done.stdout).unwrap();
    let snapshot = &made["snapshot"];
    let path = Path::new(snapshot["path"].as_str().unwrap());
    assert!(path.starts_with(kitchen.template("t").join("snapshots")) && path.join("ram").exists());
    assert!(
        snapshot["ram_bytes"].as_u64().unwrap() > 1 << 20 && snapshot["stopped_ms"].as_f64().unwrap() > 0.0
    );
    let phases: Vec<_> = snapshot["phases"].as_array().unwrap().iter().map(|phase| &phase["name"]).collect();
    assert!(phases.contains(&&"startup".into()), "{phases:?}");

    for _ in 0..2 {
        let sandbox = kitchen.sandbox().set("restore", "always").start().await;
        assert_eq!(sandbox.state()["start"], "cloned");
        let found = sandbox.stdout("cat /tmp/starts; pgrep -fx 'sleep 1000000' | wc -l").await;
        assert_eq!(found, "started\n1\n", "it ran once, and goes on");
        sandbox.stop().await;
    }
    // Where it does not fit, the template boots as ever, its start command too.
    let sandbox = kitchen.sandbox().set("memory_mib", 320).start().await;
    assert_eq!(sandbox.state()["start"], "booted");
    let why = sandbox.state()["booted_because"].as_str().unwrap().to_owned();
    assert!(why.contains("320") && why.contains("256"), "{why}");
    assert_eq!(sandbox.stdout("cat /tmp/starts").await, "started\n");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_start_command_that_fails_is_told_in_its_words_and_the_template_stays() {
    let kitchen = Kitchen::new();
    let image = kitchen.image("e2e-base").await;
    let commands = ["--start", "echo no such module >&2; exit 7", "--ready", "false"];
    let done = kitchen.try_create(&image, &[&SMALL[..], &commands].concat()).await;
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("the template's start command ended with 7: no such module"), "{said}");
    let path = kitchen.template("t");
    assert!(said.contains(&format!("the template {} was made and stays", path.display())), "{said}");
    assert!(path.join("template.json").exists() && done.stdout.is_empty());
    assert_eq!(TestSandbox::processes_of(kitchen.0.path()), [0; 0], "processes are left");
    let entries = std::fs::read_dir(kitchen.at("data/sandboxes")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<_> = names.filter(|name| name != ".lock").collect();
    assert_eq!(left, [""; 0], "its sandbox is left");
}

/// The example tests/examples/warm-python, on a Debian that has its packages already.
fn example() -> (PathBuf, String) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/warm-python");
    let dockerfile = std::fs::read_to_string(folder.join("Dockerfile")).unwrap();
    let (mut ours, mut installing) = (String::new(), false);
    for line in dockerfile.lines() {
        installing |= line.starts_with("RUN apt-get");
        match line.strip_prefix("FROM ") {
            Some(_) => ours.push_str("FROM e2e-debian\n"),
            None if installing => installing = line.ends_with('\\'),
            None => ours.extend([line, "\n"]),
        }
    }
    assert!(ours.contains("FROM e2e-debian\n") && !ours.contains("apt-get"), "{ours}");
    (folder, ours)
}

async fn get(sandbox: &TestSandbox, path: &str) -> Value {
    let asking = async {
        let mut stream = sandbox.client().connect_port(8000).await.expect("the server's port");
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        answer
    };
    let answer = tokio::time::timeout(DEADLINE, asking).await.expect("it answers");
    let text = String::from_utf8(answer).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.0 200 "), "{head}");
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test]
async fn an_interpreter_with_heavy_imports_answers_at_once() {
    let kitchen = Kitchen::new();
    let data = kitchen.at("data");
    let debian = kitchen.image("e2e-debian").await;
    kitchen.build(&data, &["load", &debian, "-t", "e2e-debian"]).await;
    let (folder, dockerfile) = example();
    std::fs::write(kitchen.at("Dockerfile"), dockerfile).unwrap();
    let dockerfile = kitchen.at("Dockerfile");
    let build = ["build", "-t", "warm-python", "-f", dockerfile.to_str().unwrap(), folder.to_str().unwrap()];
    kitchen.build(&data, &build).await;
    let done = kitchen.try_create("warm-python", &["--snapshot", "always", "--memory", "256"]).await;
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let mut seen = Vec::new();
    for (restore, start) in [("never", "booted"), ("always", "cloned"), ("always", "cloned")] {
        let began = Instant::now();
        let sandbox = kitchen.sandbox().set("restore", restore).start().await;
        let answer = get(&sandbox, "/12").await;
        let took = began.elapsed();
        assert_eq!((&sandbox.state()["start"], &answer["square"]), (&start.into(), &144.into()));
        let name = sandbox.stdout("hostname").await;
        assert_eq!(answer["hostname"].as_str(), Some(name.trim()), "a clone has a name of its own");
        eprintln!(
            "{start}: {:.0} ms to the first answer; its imports took {} ms",
            took.as_secs_f64() * 1e3,
            answer["import_ms"]
        );
        seen.push((took, answer));
        sandbox.stop().await;
    }
    let [(booted, _), (_, one), (cloned, two)] = &seen[..] else { panic!("three sandboxes") };
    assert_eq!(
        (&one["pid"], &one["import_ms"]),
        (&two["pid"], &two["import_ms"]),
        "the same process goes on"
    );
    assert_ne!(one["secret"], two["secret"], "with randomness of its own");
    assert!(cloned < booted, "{cloned:?}, and {booted:?} when it boots");
}
