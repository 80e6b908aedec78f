//! envd in somebody's image, by somebody's orchestrator: the commands of envd/README.md, as they stand there.
//!
//! No host-shim: the page's QEMU, its vsock daemon, its client and its curl.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use e2e::{DEADLINE, binary, made};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};

const PAGE: &str = include_str!("../../../envd/README.md");

/// The page's code block with this name.
fn block(name: &str) -> &'static str {
    let opening = format!("```sh {name}\n");
    let (_, rest) = PAGE.split_once(&opening).unwrap_or_else(|| panic!("the page has no block {name}"));
    rest.split_once("```\n").expect("a closed block").0
}

/// Somebody's orchestrator: a folder, and the variables that the page's commands name.
struct Orchestrator {
    folder: tempfile::TempDir,
    variables: HashMap<&'static str, OsString>,
}

impl Orchestrator {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("tiffin-own-").tempdir().expect("a folder");
        let mut path = vec![
            made("TIFFIN_BIN"),
            made("TIFFIN_AGENT").parent().expect("a file in a folder").to_owned(),
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../envd/examples"),
            made("TIFFIN_VHOST_DEVICE_VSOCK").parent().expect("a file in a folder").to_owned(),
        ];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").expect("a PATH")));
        let at = |name: &str| folder.path().join(name).into_os_string();
        let address = |kind: &str, name: &str| {
            let mut address = OsString::from(format!("{kind}:"));
            address.push(at(name));
            address
        };
        let variables = HashMap::from([
            ("PATH", std::env::join_paths(path).expect("a PATH")),
            ("DIR", folder.path().as_os_str().to_owned()),
            ("IMAGE", "e2e".into()),
            ("TIFFIN_DATA_DIR", made("TIFFIN_E2E_DATA").into_os_string()),
            ("ENVD", made("TIFFIN_AGENT").into_os_string()),
            ("KERNEL", made("TIFFIN_KERNEL").into_os_string()),
            ("ACCEL", "tcg".into()),
            ("CONTROL", address("unix", "vsock.sock_1024")),
            ("AGENT", address("hybrid", "vsock.sock")),
            ("FILE", "/tmp/greeting".into()),
        ]);
        Self { folder, variables }
    }

    fn set(&mut self, name: &'static str, value: impl Into<OsString>) -> &mut Self {
        self.variables.insert(name, value.into());
        self
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn console(&self) -> String {
        std::fs::read_to_string(self.at("console.log")).unwrap_or_default()
    }

    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).envs(&self.variables);
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Runs a script to its end.
    async fn output(&self, script: &str) -> Output {
        let running = self.shell(script).output();
        tokio::time::timeout(DEADLINE, running)
            .await
            .unwrap_or_else(|_| panic!("{script}\nhangs; the console: {}", self.console()))
            .expect("bash runs")
    }

    /// Runs a block of the page, which must succeed; what it printed.
    async fn run(&self, name: &str) -> String {
        let output = self.output(block(name)).await;
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{name}: {said}{errors}; the console: {}", self.console());
        said.into_owned()
    }

    /// Starts a block of the page that is one command; it is killed with the test.
    fn start(&self, name: &str, extra: &str) -> Child {
        let script = format!("exec {} {extra}", block(name).trim_end());
        self.shell(&script).stderr(Stdio::piped()).spawn().expect("bash runs")
    }

    async fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let waiting = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(DEADLINE, waiting).await;
        waited.unwrap_or_else(|_| panic!("waiting for {what}; the console: {}", self.console()));
    }

    /// Waits until somebody accepts on a Unix socket.
    async fn until_listening(&self, name: &str) {
        let path = self.at(name);
        self.until(name, || std::os::unix::net::UnixStream::connect(&path).is_ok()).await;
    }

    /// Boots the page's machine. It has said that there is no host yet when this returns: envd is up, and waits.
    async fn boot(&self, extra: &str) -> Machine {
        let daemon = self.start("vsock", "");
        // A connection would be taken for the VMM's: the socket's file is made right before listen(2), and QEMU tries
        // only once, so the kernel's table is asked.
        let socket = self.at("vhost.sock");
        self.until("vhost-device-vsock", || listens(&socket)).await;
        let vmm = self.start("boot", extra);
        Machine { vmm, _daemon: daemon }
    }

    async fn boot_and_wait(&self, extra: &str) -> Machine {
        let machine = self.boot(extra).await;
        self.until("envd to look for its host", || self.console().contains("no host at vsock port 1024"))
            .await;
        machine
    }

    /// Everything on the page that a client does.
    async fn walk(&self, container: bool) {
        let said = self.run("client").await;
        assert_eq!(said.contains(r#""container": true"#), container, "{said}");
        for expected in ["configure {", "\nhello from Linux\n", r#""exitCode": 3"#, "\ncontent of a file\n"] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
        let said = self.run("curl").await;
        assert!(said.starts_with("204\n[{"), "{said}");
        assert!(said.contains("by curl{\"entry\":{") && said.contains(r#""size":"7""#), "{said}");
        let said = self.run("curl-process").await;
        assert!(said.contains(r#"{"event":{"data":{"stdout":"aGVsbG8K"}}}"#), "{said}");
        assert!(said.contains(r#""exitCode":3"#), "{said}");
    }
}

struct Machine {
    vmm: Child,
    _daemon: Child,
}

impl Machine {
    /// Waits for its end, which must come by itself.
    async fn ended(mut self, orchestrator: &Orchestrator) {
        let ended = tokio::time::timeout(DEADLINE, self.vmm.wait()).await;
        let ended = ended.unwrap_or_else(|_| panic!("the machine runs on: {}", orchestrator.console()));
        let status = ended.expect("its status");
        assert!(status.success(), "{status}: {}", orchestrator.console());
    }
}

/// Num RefCount Protocol Flags Type St Inode Path (proc(5)); __SO_ACCEPTCON is set once listen(2) was called.
pub(crate) fn listens(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/net/unix").expect("the table of sockets");
    let path = path.to_str().expect("a plain path");
    table.lines().any(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        fields.last() == Some(&path)
            && u32::from_str_radix(fields[3], 16).is_ok_and(|flags| flags & (1 << 16) != 0)
    })
}

/// A disk with envd, booted, walked through, frozen and thawed, shut down; the disk is whole after it.
async fn a_baked_disk(root: &str, arguments: &str, container: bool, scratch: bool) -> Orchestrator {
    let mut orchestrator = Orchestrator::new();
    orchestrator.set("ROOT", root).set("ARGUMENTS", arguments);
    if root == "ro" && !scratch {
        orchestrator.set("FILE", "/dev/shm/greeting");
    }
    orchestrator.run("bake").await;
    let mut extra = String::new();
    if scratch {
        let disk = orchestrator.at("scratch.ext4");
        let made = std::process::Command::new(binary("rootfs-tools"))
            .args(["empty", "--size", "64", "-o"])
            .arg(&disk)
            .output()
            .expect("rootfs-tools runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        extra = format!(
            "-drive if=none,id=scratch,format=raw,file={} -device virtio-blk-device,drive=scratch,serial=scratch",
            disk.display()
        );
    }
    let before = std::fs::read(orchestrator.at("disk.ext4")).expect("the disk");
    let machine = orchestrator.boot_and_wait(&extra).await;
    let relay = orchestrator.start("relay", "");
    orchestrator.until("the relay", || orchestrator.at("envd.sock").exists()).await;
    orchestrator.walk(container).await;
    let said = orchestrator.run("snapshot").await;
    // What each took is not said where the machine's clock did not tick in it.
    assert!(said.contains(r#""resumed": {"parts": [{"name": "seed""#), "{said}");
    for part in ["clock", "channel"] {
        assert!(said.contains(&format!(r#"{{"name": "{part}""#)), "{said}");
    }
    assert!(!said.contains(r#""error""#), "{said}");
    assert!(said.contains("\nstill here\n"), "{said}");
    let said = orchestrator.run("shutdown").await;
    assert!(said.contains(r#""generation": "2""#), "{said}");
    machine.ended(&orchestrator).await;
    drop(relay);
    let disk = orchestrator.at("disk.ext4");
    let check = std::process::Command::new("e2fsck").arg("-fn").arg(&disk).output().expect("e2fsck");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    assert_eq!(
        std::fs::read(&disk).expect("the disk") == before,
        root == "ro",
        "what was written, and where"
    );
    orchestrator
}

#[tokio::test]
async fn the_pages_machine_with_a_container() {
    a_baked_disk("rw", "", true, false).await;
}

#[tokio::test]
async fn the_pages_machine_with_a_container_on_a_root_that_is_read_only() {
    a_baked_disk("ro", "", true, false).await;
}

#[tokio::test]
async fn the_pages_machine_with_a_scratch_disk_over_a_root_that_is_read_only() {
    a_baked_disk("ro", "", true, true).await;
}

#[tokio::test]
async fn the_pages_machine_without_a_container() {
    a_baked_disk("rw", "envd.container=none", false, false).await;
    a_baked_disk("ro", "envd.container=none", false, false).await;
}

#[tokio::test]
async fn a_boot_that_fails_ends_at_the_host_on_the_console_and_in_a_power_off() {
    let mut orchestrator = Orchestrator::new();
    orchestrator.set("ROOT", "ro").set("ARGUMENTS", "envd.scratch=/dev/nothing");
    orchestrator.run("bake").await;
    let listener = UnixListener::bind(orchestrator.at("vsock.sock_1024")).expect("a listener");
    let machine = orchestrator.boot("").await;
    let told = async {
        let (stream, _) = listener.accept().await.expect("envd dials");
        BufReader::new(stream).lines().next_line().await.expect("a line")
    };
    let line = tokio::time::timeout(DEADLINE, told).await.expect("envd tells").expect("a line");
    let failed: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(failed["failed"]["step"], "scratch", "{line}");
    machine.ended(&orchestrator).await;
    let console = orchestrator.console();
    assert!(console.contains("boot step scratch") && console.contains("/dev/nothing"), "{console}");
}

/// A service with the page's command, walked through with the same client, ended by its host.
async fn a_service(place: &str, container: bool, snapshot: bool) {
    let mut orchestrator = Orchestrator::new();
    let (control, door) = (orchestrator.at("control.sock"), orchestrator.at("envd.sock"));
    let file = orchestrator.at("greeting");
    orchestrator
        .set("PLACE", place)
        .set("CONTROL", format!("unix:{}", control.display()))
        .set("AGENT", format!("unix:{}", door.display()));
    if !container {
        orchestrator.set("FILE", file);
    }
    let hostname = rustix::system::uname().nodename().to_owned();
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let mut service = orchestrator.start("service", "");
    orchestrator.until_listening("envd.sock").await;
    let refused = orchestrator.output(block("curl-process")).await;
    let refused = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(refused.contains("not configured yet"), "{refused}");
    orchestrator.walk(container).await;
    if snapshot {
        let output =
            orchestrator.output(r#"client.py "$CONTROL" "$AGENT" freeze thaw 'run=echo still here'"#).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("\nstill here\n"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(UnixStream::connect(orchestrator.at("ports.sock")).await.is_ok(), "the ports door");
    let said = orchestrator.run("shutdown").await;
    assert!(said.contains("shutdown {"), "{said}");
    let status = tokio::time::timeout(DEADLINE, service.wait()).await.expect("it ends").expect("its status");
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert!(!door.exists() && !orchestrator.at("ports.sock").exists(), "its sockets are gone");
    // The machine is as it was.
    assert_eq!(rustix::system::uname().nodename(), hostname.as_c_str());
    assert_eq!(std::fs::read_to_string("/proc/self/mounts").expect("the mounts"), mounts);
}

#[tokio::test]
async fn the_pages_service_without_a_container() {
    a_service("--no-container", false, false).await;
}

#[tokio::test]
async fn the_pages_service_with_a_container() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a container needs root, and this is not root");
        return;
    }
    let root = tempfile::tempdir().expect("a folder");
    for directory in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
        std::fs::create_dir(root.path().join(directory)).expect("a directory");
    }
    std::fs::copy("/bin/busybox", root.path().join("bin/busybox")).expect("busybox-static is installed");
    for name in ["sh", "uname"] {
        std::os::unix::fs::symlink("busybox", root.path().join("bin").join(name)).expect("a link");
    }
    std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").expect("a file");
    std::fs::write(root.path().join("etc/group"), "root:x:0:\n").expect("a file");
    a_service(&format!("--container {}", root.path().display()), true, true).await;
}
