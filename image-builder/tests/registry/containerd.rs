//! containerd reads what we write, and we read what it writes.

use std::process::Command;

use crate::host::{Host, tool};
use crate::servers::{Registry, Server};

#[test]
fn containerd_takes_archives_and_pushed_images_and_gives_them_back() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: containerd needs root");
        return;
    }
    // A socket's path is short.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let socket = path("sock");
    let config = format!(
        "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt']\n\
         [grpc]\naddress = '{socket}'\n[ttrpc]\naddress = '{}'\n",
        path("root"),
        path("state"),
        path("ttrpc")
    );
    std::fs::write(path("config.toml"), config).unwrap();
    let mut command = Command::new("containerd");
    command.args(["--config", &path("config.toml")]);
    let booted = |line: &str| line.contains("containerd successfully booted").then_some(());
    let Some((_server, ())) = Server::start(command, booted) else { return };
    let ctr = |arguments: &[&str]| {
        let all = [&["--address", &socket, "--namespace", "tiffin"], arguments].concat();
        tool("ctr", &all).unwrap()
    };
    let host = Host::new();
    let architecture = oci::host_platform().architecture().to_string();
    let image = host.image("app:1", &architecture);

    let archive = host.text("app.tar");
    host.json(&["save", "app:1", "-o", &format!("oci-archive:{archive}:docker.io/library/app:1")]);
    // Unpacked with the native snapshotter, which needs nothing of the file system below.
    ctr(&["images", "import", "--snapshotter", "native", &archive]);
    let listed = ctr(&["images", "list"]);
    assert!(
        listed.contains("docker.io/library/app:1") && listed.contains(image.digest().as_ref()),
        "{listed}"
    );
    let checked = ctr(&["images", "check", "--snapshotter", "native"]);
    assert!(checked.contains("complete (4/4)"), "{checked}");

    let docker = host.text("docker.tar");
    host.json(&["save", "app:1", "-o", &format!("docker-archive:{docker}:docker.io/library/docker:1")]);
    ctr(&["images", "import", "--snapshotter", "native", &docker]);
    assert!(ctr(&["images", "list"]).contains("docker.io/library/docker:1"));

    let exported = host.text("exported.tar");
    ctr(&["images", "export", &exported, "docker.io/library/app:1"]);
    host.json(&["load", &format!("oci-archive:{exported}"), "-t", "back:1"]);
    assert_eq!(host.json(&["inspect", "back:1"])["digest"], image.digest().as_ref());

    if let Some(registry) = Registry::start(&host.path("registry"), false) {
        let there = registry.name("team/app:1");
        host.json(&["push", "app:1", &there]);
        ctr(&["images", "pull", "--plain-http", "--snapshotter", "native", &there]);
        let listed = ctr(&["images", "list"]);
        assert!(listed.contains(&there) && listed.matches(image.digest().as_ref()).count() == 2, "{listed}");
        ctr(&["images", "push", "--plain-http", &registry.name("theirs:1"), &there]);
        assert_eq!(host.json(&["pull", &registry.name("theirs:1")])["digest"], image.digest().as_ref());
    }
}
