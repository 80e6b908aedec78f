//! Templates to registries and files, and back.

use std::fs;
use std::io::{Read, Seek};
use std::process::Command;

use oci::layer::{Compression, Kind, LayerPath, LayerWriter, Metadata, Node};
use oci::{Hasher, MediaType};
use serde_json::{Value, json};

use crate::host::{Host, names, tool};
use crate::servers::Registry;

const MIB: usize = 1 << 20;

/// Bytes that no two places of have in common.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state ^ state >> 29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A template of an image with these files.
fn template(host: &Host, name: &str, files: &[(&str, &[u8])]) -> Value {
    let store = host.store();
    let mut writer = LayerWriter::new(&store, Compression::Zstd).unwrap();
    for (name, contents) in files {
        let node = Node {
            path: LayerPath::parse(name.as_bytes()).unwrap(),
            metadata: Metadata { mode: 0o644, ..Metadata::default() },
            kind: Kind::File { size: contents.len() as u64, offset: 0 },
        };
        writer.append(&node, *contents).unwrap();
    }
    let layer = writer.finish().unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Env": ["A=b"], "Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
    });
    let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer.descriptor]});
    let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
    store.tag(&format!("docker.io/library/{name}:latest"), &manifest).unwrap();
    host.json(&["template", "create", name, "--image", name, "--snapshot", "never"])["template"].clone()
}

fn rootfs_digest(host: &Host, name: &str) -> String {
    let mut hasher = Hasher::new();
    let mut file = fs::File::open(host.path(&format!("data/templates/{name}/rootfs.ext4"))).unwrap();
    std::io::copy(&mut file, &mut hasher).unwrap();
    hasher.finish().0.to_string()
}

#[test]
fn a_template_travels_by_registry_and_chunks_go_once() {
    let host = Host::new();
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let big = noise(1, 12 * MIB);
    let made = template(&host, "web", &[("big", &big)]);
    fs::create_dir_all(host.path("data/templates/web/snapshots/some")).unwrap();
    let there = format!("docker://{}", registry.name("team/web:1"));
    let pushed = host.json(&["template", "push", "web", &there]);
    let chunks = pushed["chunks"].as_u64().unwrap();
    assert!((12..=20).contains(&chunks) && pushed["moved"] == chunks, "{pushed}");
    let again = host.json(&["template", "push", "web", &there]);
    assert_eq!((&again["moved"], &again["digest"]), (&json!(0), &pushed["digest"]));

    let machine = Host::new();
    let pulled = machine.json(&["template", "pull", &there]);
    assert_eq!((&pulled["name"], &pulled["moved"]), (&json!("web"), &json!(chunks)));
    assert_eq!(machine.json(&["template", "list"]), json!(["web"]));
    assert_eq!(rootfs_digest(&machine, "web"), made["rootfs"]["digest"]);
    let inspected: Value =
        serde_json::from_slice(&machine.run(&["template", "inspect", "web"]).stdout).unwrap();
    assert_eq!(inspected, made);
    assert_eq!(
        names(&machine.path("data/templates/web")),
        ["rootfs.ext4", "template.json"],
        "no snapshot travels"
    );
    assert_eq!(machine.json(&["template", "pull", &there, "twin"])["moved"], 0);

    // Another version, most of which is the same.
    let next = template(&host, "web", &[("big", &big), ("small", b"new")]);
    let there = format!("docker://{}", registry.name("team/web:2"));
    let moved = host.json(&["template", "push", "web", &there])["moved"].as_u64().unwrap();
    assert!((1..=4).contains(&moved), "{moved} of {chunks}");
    // A sandbox that runs on the old one has its files open.
    let mut open = fs::File::open(machine.path("data/templates/web/rootfs.ext4")).unwrap();
    let fetched = machine.json(&["template", "pull", &there])["moved"].as_u64().unwrap();
    assert_eq!(fetched, moved);
    assert_eq!(rootfs_digest(&machine, "web"), next["rootfs"]["digest"]);
    let mut old = Vec::new();
    open.rewind().unwrap();
    open.read_to_end(&mut old).unwrap();
    assert_eq!(Hasher::digest_of(&old).to_string(), made["rootfs"]["digest"]);
    assert_eq!(names(&machine.path("data/templates")), ["twin", "web"]);
    assert_eq!(names(&machine.path("data/cache/template-chunk-lists")).len(), 2);
    machine.run(&["template", "delete", "twin"]);
    machine.json(&["template", "pull", &there]);
    assert_eq!(
        names(&machine.path("data/cache/template-chunk-lists")).len(),
        1,
        "what no template is of goes"
    );

    // An image is no template, and the other way round.
    host.image("app:1", "amd64");
    host.json(&["push", "app:1", &registry.name("app:1")]);
    let image = format!("docker://{}", registry.name("app:1"));
    assert!(machine.fails(2, &["template", "pull", &image]).contains("this is an image"));
    assert!(machine.fails(1, &["pull", &there]).contains("artifact"));
    machine.fails(1, &["template", "push", "nothing", &there]);
    machine.fails(2, &["template", "push", "web", "oci:x"]);
}

#[test]
fn a_template_travels_as_a_file_that_is_checked() {
    let host = Host::new();
    let made = template(&host, "web", &[("big", &noise(2, 5 * MIB)), ("zeros", &[0; 3 * MIB])]);
    let file = host.text("web.tar");
    let exported = host.json(&["template", "export", "web", &file]);
    let machine = Host::new();
    let imported = machine.json(&["template", "import", &file]);
    assert_eq!(imported["digest"], exported["digest"]);
    assert_eq!(rootfs_digest(&machine, "web"), made["rootfs"]["digest"]);
    machine.json(&["template", "import", &file, "other"]);
    assert_eq!(machine.json(&["template", "list"]), json!(["other", "web"]));

    // A byte that is wrong, wherever it is, is found; nothing of the file is used, and what was there stays.
    let good = fs::read(&file).unwrap();
    for at in (2000..good.len()).step_by(good.len() / 40) {
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        fs::write(&file, bad).unwrap();
        let fresh = Host::new();
        let output = fresh.run(&["template", "import", &file]);
        // The padding of a tar file is nobody's.
        if output.status.success() {
            assert_eq!(rootfs_digest(&fresh, "web"), made["rootfs"]["digest"], "byte {at}");
        } else {
            assert!(names(&fresh.path("data/templates")).is_empty(), "byte {at}");
        }
    }
    for cut in [0, 100, good.len() / 2, good.len() - 3 * 1024] {
        fs::write(&file, &good[..cut]).unwrap();
        assert!(!machine.run(&["template", "import", &file]).status.success(), "{cut}");
    }
    assert_eq!(rootfs_digest(&machine, "web"), made["rootfs"]["digest"]);
    fs::write(&file, &good).unwrap();

    // The file is an archive that others copy.
    let Some(registry) = Registry::start(&host.path("registry"), false) else { return };
    let there = format!("docker://{}", registry.name("web:1"));
    let archive = format!("oci-archive:{file}");
    if tool("skopeo", &["copy", "--quiet", "--dest-tls-verify=false", &archive, &there]).is_some() {
        let third = Host::new();
        let pulled = third.json(&["template", "pull", &there]);
        assert_eq!(pulled["digest"], exported["digest"]);
    }
    host.image("app:1", "amd64");
    let image = host.text("app.tar");
    host.json(&["save", "app:1", "-o", &format!("oci-archive:{image}")]);
    assert!(machine.fails(2, &["template", "import", &image]).contains("this is an image"));
    // What was exported can be read by any tar.
    let listed = Command::new("tar").args(["tf", &file]).output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).starts_with("oci-layout\nindex.json\nblobs/sha256/"));
}
