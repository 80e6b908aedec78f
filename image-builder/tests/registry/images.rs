//! push, pull, tag, rm, inspect, save and load, against docker-registry, skopeo and umoci.

use oci::layer::Compression;
use serde_json::{Value, json};

use crate::host::{Host, digest_of, names, tool};
use crate::servers::Registry;

#[test]
fn an_image_goes_and_comes_with_its_digest() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let image = host.image("app:1", "amd64");
    let (there, other) = (registry.name("team/app:1"), registry.name("other/app:2"));

    let pushed = host.json(&["push", "app:1", &format!("docker://{there}")]);
    assert_eq!(pushed["digest"], image.digest().as_ref());
    assert_eq!((&pushed["sent"], &pushed["existed"]), (&json!(4), &json!(0)));
    let again = host.json(&["push", "app:1", &there]);
    assert_eq!((&again["sent"], &again["existed"]), (&json!(0), &json!(4)));

    // The local store knows by this name where the blobs are.
    host.json(&["tag", "app:1", &there, &other]);
    let mounted = host.json(&["push", &other]);
    assert_eq!((&mounted["sent"], &mounted["mounted"]), (&json!(0), &json!(4)), "{mounted}");

    let machine = Host::new();
    let pulled = machine.json(&["pull", &there]);
    assert_eq!((&pulled["digest"], &pulled["fetched"]), (&pushed["digest"], &json!(4)));
    assert_eq!(machine.json(&["pull", &other])["fetched"], 0);
    let listed = machine.json(&["images"]);
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert_eq!(machine.json(&["rm", &other]), json!([other]));
    machine.fails(1, &["rm", &there, &other]);
    assert_eq!(
        machine.json(&["rm", "--force", &there, &other]),
        json!([there]),
        "nothing was removed before"
    );
    assert!(machine.fails(1, &["pull", &registry.name("team/app:none")]).contains("MANIFEST_UNKNOWN"));

    let reference = format!("docker://{there}");
    if let Some(raw) = tool("skopeo", &["inspect", "--tls-verify=false", "--raw", &reference]) {
        assert_eq!(digest_of(&raw), image.digest().to_string());
        let to = format!("dir:{}", host.text("copied"));
        tool("skopeo", &["copy", "--src-tls-verify=false", &reference, &to]);
        assert_eq!(names(&host.path("copied")).len(), 6, "manifest, version, config and layers");
    }
    let inspected = machine.json(&["inspect", &reference]);
    assert_eq!(inspected["digest"], image.digest().as_ref());
    assert_eq!(inspected["config"]["config"]["Healthcheck"], json!({"Test": ["NONE"]}));
    assert_eq!(inspected["annotations"], json!({"org.example.note": "kept"}));
    assert_eq!(inspected["layers"].as_array().unwrap().len(), 3);
    let text = String::from_utf8(machine.run(&["inspect", &reference]).stdout).unwrap();
    assert!(text.contains("linux/amd64") && text.contains("step 2"), "{text}");
    let raw = machine.run(&["inspect", "--raw", &reference]).stdout;
    assert_eq!(digest_of(std::str::from_utf8(&raw).unwrap()), image.digest().to_string());
}

#[test]
fn dockers_manifests_stay_dockers() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let (ours, theirs, back) = (registry.name("a:oci"), registry.name("a:docker"), registry.name("b:docker"));
    // Docker's manifests have no name for zstd.
    host.image_of("app:1", "amd64", &[Compression::Gzip, Compression::None]);
    host.json(&["push", "app:1", &ours]);
    let (from, to) = (format!("docker://{ours}"), format!("docker://{theirs}"));
    let insecure = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    if tool("skopeo", &["copy", insecure[0], insecure[1], "--format=v2s2", &from, &to]).is_none() {
        return;
    }
    let raw = tool("skopeo", &["inspect", "--tls-verify=false", "--raw", &to]).unwrap();
    assert!(raw.contains("docker.distribution.manifest.v2"), "{raw}");
    let pulled = host.json(&["pull", &theirs]);
    assert_eq!(pulled["digest"], digest_of(&raw));
    host.json(&["push", &theirs, &back]);
    let again =
        tool("skopeo", &["inspect", "--tls-verify=false", "--raw", &format!("docker://{back}")]).unwrap();
    assert_eq!(again, raw, "not a byte is another");
}

#[test]
fn an_index_travels_whole_or_in_part() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let store = host.store();
    let images = ["amd64", "arm64"].map(|architecture| {
        let mut image = host.image(&format!("{architecture}:1"), architecture);
        image.set_platform(Some(oci::parse_platform(architecture).unwrap()));
        image
    });
    let index = json!({"schemaVersion": 2, "mediaType": oci::MediaType::ImageIndex, "manifests": images});
    let index = store.put_blob(oci::MediaType::ImageIndex, index.to_string().as_bytes()).unwrap();
    store.tag("docker.io/library/both:1", &index).unwrap();
    let there = registry.name("both:1");
    assert_eq!(host.json(&["push", "both:1", &there])["digest"], index.digest().as_ref());

    let machine = Host::new();
    let arm = machine.json(&["pull", &there, "--platform", "linux/arm64"]);
    assert_eq!(arm["digest"], images[1].digest().as_ref());
    assert_eq!(machine.json(&["inspect", &there])["platforms"], json!(["linux/arm64"]));
    let all = machine.json(&["pull", &there, "--platform", "all"]);
    assert_eq!(all["digest"], index.digest().as_ref());
    let inspected = machine.json(&["inspect", &there, "--platform", "arm64"]);
    assert_eq!(inspected["platforms"], json!(["linux/amd64", "linux/arm64"]));
    assert_eq!(inspected["manifest"], images[1].digest().as_ref());
    let copy = registry.name("copy:1");
    machine.json(&["push", &there, &copy]);
    machine.fails(1, &["pull", &there, "--platform", "linux/s390x"]);
    machine.fails(2, &["pull", &there, "--platform", "linux"]);
    let to = format!("oci:{}:all", host.text("layout"));
    if tool(
        "skopeo",
        &["copy", "--all", "--preserve-digests", "--src-tls-verify=false", &format!("docker://{copy}"), &to],
    )
    .is_some()
    {
        let config = tool("skopeo", &["inspect", "--raw", &to]).unwrap();
        assert_eq!(digest_of(&config), index.digest().to_string());
    }
}

#[test]
fn archives_and_folders_of_every_kind_go_both_ways() {
    let host = Host::new();
    let image = host.image("app:1", "amd64");
    let place = |transport: &str, name: &str| format!("{transport}:{}", host.text(name));
    let diff_ids = |inspected: &Value| inspected["config"]["rootfs"]["diff_ids"].clone();
    let original = diff_ids(&host.json(&["inspect", "app:1"]));
    for (transport, name) in
        [("oci", "layout"), ("oci-archive", "oci.tar"), ("docker-archive", "docker.tar"), ("dir", "folder")]
    {
        let ours = place(transport, name);
        if transport == "dir" && tool("skopeo", &["--version"]).is_none() {
            continue;
        }
        let saved = host.json(&["save", "app:1", "-o", &ours]);
        assert_eq!(saved["digest"], image.digest().as_ref());
        // skopeo reads what we write ..
        let (theirs, copied) = (place(transport, &format!("their-{name}")), format!("{transport}-back:1"));
        let named = match transport {
            "docker-archive" => format!("{theirs}:docker.io/library/x:1"),
            _ => theirs.clone(),
        };
        // Left alone, it compresses what is not.
        let keep = if transport.starts_with("oci") { "--preserve-digests" } else { "--quiet" };
        if tool("skopeo", &["copy", keep, &ours, &named]).is_none() {
            continue;
        }
        // .. and we read what it writes.
        host.json(&["load", &theirs, "-t", &copied]);
        let inspected = host.json(&["inspect", &copied]);
        assert_eq!(diff_ids(&inspected), original, "{transport}");
        assert_eq!(inspected["config"]["config"]["Env"], json!(["PATH=/bin"]));
        if transport.starts_with("oci") {
            assert_eq!(inspected["digest"], image.digest().as_ref(), "{transport}");
        }
        assert_eq!(diff_ids(&host.json(&["inspect", &theirs])), original, "{transport} without loading it");
    }
    assert!(
        host.fails(2, &["load", &place("oci-archive", "docker.tar"), "-t", "x:1"])
            .contains("docker-archive:FILE")
    );
    let wrong = format!("{}:other:1", place("docker-archive", "docker.tar"));
    assert!(host.fails(2, &["load", &wrong, "-t", "x:1"]).contains("it holds: docker.io/library/app:1"));
    assert!(names(&host.path("data/images/.incoming")).is_empty());

    // umoci as a reader and a writer.
    let layout = format!("{}:1", host.text("layout"));
    if tool("umoci", &["stat", "--image", &layout]).is_some() {
        tool("umoci", &["config", "--image", &layout, "--tag", "2", "--config.env", "ADDED=yes"]);
        host.json(&["load", &format!("oci:{}:2", host.text("layout")), "-t", "changed:1"]);
        let env = host.json(&["inspect", "changed:1"])["config"]["config"]["Env"].clone();
        assert!(env.as_array().unwrap().contains(&json!("ADDED=yes")), "{env}");
    }
}

#[test]
fn what_is_no_image_is_said_with_the_right_code() {
    let host = Host::new();
    host.image("app:1", "amd64");
    assert!(host.fails(1, &["push", "nothing:1", "localhost:1/x"]).contains("image-builder images"));
    assert!(host.fails(2, &["push", "App:1"]).contains("lowercase"));
    assert!(host.fails(2, &["push", "oci:layout"]).contains("no OCI image layout"));
    assert!(host.fails(2, &["pull", "oci:layout"]).contains("image-builder load"));
    assert!(host.fails(1, &["pull", "localhost:1/x"]).contains("localhost:1"));
    assert!(
        host.fails(2, &["pull", "localhost:1/x", "--registries-conf", "/nonexistent"])
            .contains("/nonexistent")
    );
    let wrong = format!("app@sha256:{}", "0".repeat(64));
    assert!(host.fails(2, &["tag", "app:1", &wrong]).contains("has the digest"));
    assert_eq!(host.json(&["rm", "-f", "nothing:1"]), json!([]));
}

#[test]
fn builds_and_templates_begin_with_images_of_a_registry() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let image = host.image("app:1", &oci::host_platform().architecture().to_string());
    let there = registry.name("app:1");
    host.json(&["push", "app:1", &there]);

    let machine = Host::new();
    let docker = format!("docker://{there}");
    let made = machine.json(&["template", "create", "web", "--image", &docker, "--snapshot", "never"]);
    assert_eq!(made["template"]["image"]["digest"], image.digest().as_ref());
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: builds mount overlays, which needs root");
        return;
    }
    let context = machine.path("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), format!("FROM {there}\nCOPY Dockerfile /\n")).unwrap();
    machine.json(&["build", "-t", "built", context.to_str().unwrap()]);
    let built = machine.json(&["inspect", "built"]);
    assert_eq!(built["layers"].as_array().unwrap().len(), 4);
    assert_eq!(built["config"]["config"]["Labels"], json!({"a": "b"}));
}
