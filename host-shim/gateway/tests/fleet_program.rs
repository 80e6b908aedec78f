//! The program `tiffin-gateway`, with scripts in the places of host-shim and image-builder.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use template::DataDir;
use tiffin_gateway::base::{self, BaseError};
use tiffin_gateway::config::{Capacity, Config};
use tokio_util::sync::CancellationToken;

const GATEWAY: &str = env!("CARGO_BIN_EXE_tiffin-gateway");

/// A script in image-builder's place: it writes down how it was called, and makes an empty template.
const BUILDER: &str = r#"#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
[ "$1" = --data-dir ] || exit 9
data=$2 verb=$3
case $verb in
images) echo '[]' ;;
load) exit 1 ;;
bootstrap) echo "bootstrapped" ;;
build) for context; do :; done; grep -q "^USER user" "$context/Dockerfile" || exit 8 ;;
template) mkdir -p "$data/templates/base" && echo '{}' > "$data/templates/base/template.json" ;;
esac
"#;

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::Builder::new().prefix("gateway").tempdir_in("/tmp").unwrap() };
        host.builder(BUILDER);
        host
    }

    fn builder(&self, script: &str) {
        let path = self.path("image-builder");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(GATEWAY);
        command
            .args(args)
            .env("TIFFIN_DATA_DIR", self.path("data"))
            .env("FAKE_KVM", "ok")
            .env_remove("TIFFIN_LISTEN")
            .env_remove("TIFFIN_LOG")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn ok(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stderr}");
        stdout
    }

    fn serve(&self, more: &[&str]) -> Command {
        let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_shim.py");
        let mut command = self.command(&["serve", "--listen", "127.0.0.1:0", "--host-shim"]);
        command.arg(shim).arg("--image-builder").arg(self.path("image-builder")).args(more);
        command
    }

    fn config(&self) -> Config {
        Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            domain: "localhost".into(),
            data: DataDir::resolve(Some(&self.path("data"))).unwrap(),
            host_shim: "/nonexistent".into(),
            image_builder: self.path("image-builder"),
            kernel: Some("/k".into()),
            guest_image: None,
            channel: Default::default(),
            allow_emulation: true,
            capacity: Capacity::UNLIMITED,
        }
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let data = format!("--data-dir {} ", self.path("data").display());
        calls.lines().map(|line| line.replace(&data, "")).collect()
    }
}

/// A gateway that serves; killed with the test.
struct Served {
    child: Child,
    exports: [String; 3],
}

impl Served {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let exports = std::array::from_fn(|_| lines.next().expect("it serves").unwrap());
        Self { child, exports }
    }

    fn url(&self) -> &str {
        self.exports[0].strip_prefix("export E2B_API_URL=http://").unwrap()
    }

    fn ask(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.url()).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn stop(mut self) -> (Option<i32>, String) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_environment_is_there_without_a_gateway() {
    let host = Host::new();
    let exports = host.ok(&["env"]);
    let lines: Vec<_> = exports.lines().collect();
    assert_eq!(
        lines[..2],
        ["export E2B_API_URL=http://127.0.0.1:3000", "export E2B_SANDBOX_URL=http://127.0.0.1:3000"]
    );
    let key = lines[2].strip_prefix("export E2B_API_KEY=e2b_").unwrap();
    assert!(key.len() == 40 && lines.len() == 3);
    assert_eq!(host.ok(&["env"]), exports);
    assert!(host.ok(&["env", "--listen", "0.0.0.0:80"]).contains("=http://127.0.0.1:80\n"));
    let mode = fs::metadata(host.path("data/gateway.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn keys_and_teams_are_made_listed_and_taken_back() {
    let host = Host::new();
    let key = host.ok(&["keys", "create", "--name", "ci"]);
    assert!(key.starts_with("e2b_") && key.len() == 45 && key.ends_with('\n'));
    let list: serde_json::Value = serde_json::from_str(&host.ok(&["keys", "list", "--json"])).unwrap();
    assert_eq!((&list[0]["id"], &list[0]["name"]), (&1.into(), &"ci".into()));
    assert!(
        !host.ok(&["keys", "list"]).contains(key.trim()) && host.ok(&["keys", "list"]).contains(&key[40..44])
    );
    host.ok(&["keys", "revoke", "1"]);
    let (code, _, stderr) = host.run(&["keys", "revoke", "1"]);
    assert_eq!((code, stderr.as_str()), (2, "tiffin-gateway: no key 1: see `tiffin-gateway keys list`\n"));

    assert_eq!(host.run(&["keys", "create", "--team", "b"]).0, 2);
    host.ok(&["teams", "create", "b", "--sandboxes", "2"]);
    assert_eq!(host.run(&["teams", "create", "b"]).0, 2);
    host.ok(&["keys", "create", "--team", "b"]);
    host.ok(&["teams", "quota", "b", "--memory", "unlimited"]);
    let teams: serde_json::Value = serde_json::from_str(&host.ok(&["teams", "list", "--json"])).unwrap();
    assert_eq!(teams[0]["name"], "b");
    assert_eq!(teams[0]["quota"], serde_json::json!({ "sandboxes": 2, "cpus": 40, "memory_mib": u32::MAX }));
    assert_eq!(teams[1]["name"], "default");
    assert!(host.ok(&["teams", "list"]).contains("unlimited"));
    for bad in [
        &["teams", "create", " "][..],
        &["teams", "quota", "none"],
        &["keys", "novel"],
        &["serve", "--listen", "x"],
    ] {
        assert_eq!(host.run(bad).0, 2, "{bad:?}");
    }
}

#[test]
fn emulation_is_served_only_when_it_is_allowed() {
    let host = Host::new();
    let output = host.serve(&[]).env("FAKE_KVM", "absent").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("no usable hardware virtualization (says the script)"), "{stderr}");
    assert!(stderr.contains("--allow-emulation") && host.calls().is_empty());
    let mut allowed = host.serve(&["--allow-emulation", "--log-format", "json"]);
    allowed.env("FAKE_KVM", "absent");
    let (code, log) = Served::start(allowed).stop();
    assert_eq!(code, Some(0), "{log}");
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    assert!(
        lines
            .into_iter()
            .any(|line| line["level"] == "WARN" && line["fields"]["reason"] == "says the script")
    );
}

#[test]
fn one_gateway_serves_a_folder_and_makes_base_first() {
    let host = Host::new();
    let served = Served::start(host.serve(&[]));
    assert_eq!(served.exports.join("\n") + "\n", host.ok(&["env"]), "also on another port");
    assert!(served.ask("/health").starts_with("HTTP/1.1 204"), "{}", served.ask("/health"));
    assert_eq!(host.calls().len(), 5);
    let second = host.serve(&[]).output().unwrap();
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr.contains("another tiffin-gateway serves"), "{stderr}");
    let (code, log) = served.stop();
    assert!(code == Some(0) && log.contains("making the template `base`"), "{log}");
    assert!(log.contains("the sandboxes go on"), "{log}");
    // Its folder is free again, and `base` is there.
    assert_eq!(Served::start(host.serve(&[])).stop().0, Some(0));
    assert_eq!(host.calls().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn base_is_made_once() {
    let host = Host::new();
    let (config, stop) = (Arc::new(host.config()), CancellationToken::new());
    let both = [(); 2].map(|()| {
        let (config, stop) = (Arc::clone(&config), stop.clone());
        tokio::spawn(async move { base::ensure(&config, &stop, |_| {}).await.unwrap() })
    });
    let made =
        futures::future::join_all(both).await.into_iter().filter(|made| *made.as_ref().unwrap()).count();
    assert_eq!(made, 1);
    let calls = host.calls();
    assert_eq!(
        calls[..3],
        ["images --json", "load debian:bookworm -t debian:bookworm", "bootstrap debian:bookworm"]
    );
    assert!(calls[3].starts_with("build -t tiffin/base "), "{calls:?}");
    assert!(
        calls[4].starts_with("template create base --image tiffin/base ")
            && calls[4].ends_with(" --kernel /k")
    );
    assert_eq!(calls.len(), 5);
    let left: Vec<_> =
        fs::read_dir(host.path("data")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "templates" || name == "base.lock"), "{left:?}");
}

#[tokio::test]
async fn a_failed_or_interrupted_build_is_told() {
    let host = Host::new();
    fs::create_dir_all(host.path("data")).unwrap();
    host.builder("#!/bin/sh\n[ $3 != bootstrap ] && [ $3 != load ]\n");
    let stop = CancellationToken::new();
    let error = base::ensure(&host.config(), &stop, |_| {}).await.unwrap_err();
    assert_eq!(error.to_string(), "`image-builder bootstrap debian:bookworm` failed (exit status: 1)");
    host.builder("#!/bin/sh\n[ $3 = images ] || exec sleep 1000\n");
    let config = host.config();
    let (done, ()) = tokio::join!(base::ensure(&config, &stop, |_| {}), async {
        tokio::task::yield_now().await;
        stop.cancel();
    });
    assert!(matches!(done, Err(BaseError::Interrupted)));
}

#[test]
fn systemd_accepts_the_unit() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no systemd-analyze here");
        return;
    }
    let host = Host::new();
    let unit =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tiffin-gateway.service")).unwrap();
    let installed = "/usr/local/bin/tiffin-gateway";
    assert!(unit.contains(&format!("ExecStart={installed} serve ")));
    for kept in ["KillMode=process", "Delegate=yes", "Type=notify", "OOMPolicy=continue"] {
        assert!(unit.lines().any(|line| line == kept), "{kept} is not there");
    }
    let file = host.path("tiffin-gateway.service");
    fs::write(&file, unit.replace(installed, GATEWAY)).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("tiffin-gateway.service"), "{said}");
}
