//! The program `tiffin-gateway`, with scripts in the places of host-shim and image-builder.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use template::{DataDir, Machine, NewTemplate, Rootfs, RuntimeConfig, SCHEMA_VERSION, SourceImage, Template};
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
            .env_remove("TIFFIN_KERNEL")
            .env_remove("TIFFIN_GUEST_IMAGE")
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

    /// A template `base` that sandboxes start from.
    fn template(&self) {
        let templates = self.path("data/templates");
        let new = NewTemplate::begin(&templates, &"base".parse().unwrap()).unwrap();
        fs::write(new.rootfs(), b"rootfs").unwrap();
        let digest = format!("sha256:{}", "a".repeat(64));
        let template = Template {
            schema_version: SCHEMA_VERSION,
            image: SourceImage { reference: "base".into(), digest: digest.parse().unwrap() },
            kernel: None,
            guest_image: None,
            rootfs: Rootfs { digest: digest.parse().unwrap(), size: 6 },
            runtime: RuntimeConfig::default(),
            machine: Machine { cpus: 1, memory_mib: 64, disk_mib: 16 },
            snapshot_only: false,
        };
        new.publish(&template).unwrap();
    }

    fn folders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("data/sandboxes")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Shims of this host's sandboxes, dead ones that nobody has waited for left out: they have no command line.
    fn shims(&self) -> Vec<i32> {
        let needle = self.path("data/sandboxes").to_str().unwrap().to_owned();
        let entries = fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        let of_ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&needle)
        };
        pids.filter(of_ours).collect()
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
            builds: Default::default(),
        }
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let data = format!("--data-dir {} ", self.path("data").display());
        calls.lines().map(|line| line.replace(&data, "")).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // After a failure: their VMMs die with them.
        for pid in self.shims() {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
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

    fn client(&self) -> Client {
        let key = self.exports[2].strip_prefix("export E2B_API_KEY=").unwrap();
        Client { address: self.url().to_owned(), key: key.to_owned() }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
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

/// A client that gets an answer, or notices that the gateway has died.
#[derive(Clone)]
struct Client {
    address: String,
    key: String,
}

impl Client {
    /// Status and body of a whole answer.
    fn call(&self, request: &str, body: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        let (key, length) = (&self.key, body.len());
        let head = format!("{request} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nConnection: close\r\n");
        write!(stream, "{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
            .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    fn create(&self) -> Option<String> {
        let (status, body) = self.call("POST /v2/sandboxes", r#"{"templateID":"base","timeout":3600}"#)?;
        assert_eq!(status, 201, "{body}");
        let made: serde_json::Value = serde_json::from_str(&body).ok()?;
        Some(made["sandboxID"].as_str().unwrap().to_owned())
    }

    fn kill(&self, id: &str) -> Option<u16> {
        self.call(&format!("DELETE /sandboxes/{id}"), "").map(|(status, _)| status)
    }

    fn list(&self) -> BTreeSet<String> {
        let (status, body) = self.call("GET /v2/sandboxes?limit=100", "").unwrap();
        assert_eq!(status, 200, "{body}");
        let list: Vec<serde_json::Value> = serde_json::from_str(&body).unwrap();
        list.iter().map(|sandbox| sandbox["sandboxID"].as_str().unwrap().to_owned()).collect()
    }
}

/// What the clients of a gateway that was killed know.
#[derive(Default)]
struct Known {
    created: BTreeSet<String>,
    kill_asked: BTreeSet<String>,
    killed: BTreeSet<String>,
}

#[test]
fn kill_9_at_any_moment_loses_nothing_and_leaves_nothing_unlisted() {
    let host = Host::new();
    host.template();
    for round in 0..12 {
        let mut served = Served::start(host.serve(&[]));
        let known = Mutex::new(Known::default());
        std::thread::scope(|threads| {
            for worker in 0..4 {
                let (client, known) = (served.client(), &known);
                threads.spawn(move || {
                    while let Some(id) = client.create() {
                        known.lock().unwrap().created.insert(id.clone());
                        if worker % 2 == 0 {
                            known.lock().unwrap().kill_asked.insert(id.clone());
                            let Some(status) = client.kill(&id) else { break };
                            assert_eq!(status, 204);
                            known.lock().unwrap().killed.insert(id);
                        }
                    }
                });
            }
            // The moment is what the test is about; any is right.
            std::thread::sleep(Duration::from_millis(round * 60));
            served.kill();
        });
        let Known { created, kill_asked, killed } = known.into_inner().unwrap();
        let served = Served::start(host.serve(&[]));
        let client = served.client();
        let listed = client.list();
        let lost: Vec<_> = created.difference(&kill_asked).filter(|id| !listed.contains(*id)).collect();
        assert!(lost.is_empty(), "round {round}: lost {lost:?}");
        assert!(killed.is_disjoint(&listed), "round {round}: killed ones are back");
        // A shim that was just being started finds its folder gone, and goes.
        let hidden = || host.folders().into_iter().filter(|id| !listed.contains(id)).collect::<Vec<_>>();
        until_empty("not listed", hidden);
        for id in &listed {
            assert_eq!(client.kill(id), Some(204), "round {round}");
        }
        assert!(client.list().is_empty());
        until_empty("left", || host.folders());
        assert_eq!(served.stop().0, Some(0));
    }
    until_empty("left", || host.shims());
    assert!(host.folders().is_empty());
}

#[track_caller]
fn until_empty<T: std::fmt::Debug>(what: &str, look: impl Fn() -> Vec<T>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = look();
        if found.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?}");
        std::thread::sleep(Duration::from_millis(5));
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
    host.ok(&["teams", "quota", "b", "--memory", "unlimited", "--disk", "77"]);
    let teams: serde_json::Value = serde_json::from_str(&host.ok(&["teams", "list", "--json"])).unwrap();
    assert_eq!(teams[0]["name"], "b");
    assert_eq!(teams[0]["quota"], serde_json::json!({ "sandboxes": 2, "cpus": 40, "memory_mib": u32::MAX }));
    assert_eq!(teams[1]["name"], "default");
    assert!(host.ok(&["teams", "list"]).contains("unlimited"));
    let document: serde_json::Value = serde_json::from_str(&host.ok(&["openapi"])).unwrap();
    assert!(
        document["openapi"].as_str().unwrap().starts_with("3.1")
            && document["paths"]["/sandboxes"].is_object()
    );
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
    let (status, _) = served.client().call("GET /health", "").unwrap();
    assert!((200..300).contains(&status), "{status}");
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
            && calls[4].ends_with(" --host-shim /nonexistent --kernel /k")
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
fn the_log_says_how_a_sandbox_started_and_why_it_booted() {
    let host = Host::new();
    host.template();
    let served = Served::start(host.serve(&["--log-format", "json"]));
    let client = served.client();
    for state in
        [r#"{"start":"cloned","generation":2}"#, r#"{"start":"booted","booted_because":"the QEMU differs"}"#]
    {
        let body =
            serde_json::json!({ "templateID": "base", "timeout": 60, "envVars": { "FAKE_STATE": state } });
        let (status, body) = client.call("POST /v2/sandboxes", &body.to_string()).unwrap();
        assert_eq!(status, 201, "{body}");
    }
    for id in client.list() {
        client.kill(&id);
    }
    let (_, log) = served.stop();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let ready: Vec<_> = lines
        .map(|line| line["fields"].clone())
        .filter(|fields| fields["message"] == "a sandbox is ready")
        .map(|fields| (fields["start"].clone(), fields["why"].clone()))
        .collect();
    assert_eq!(
        ready,
        [("cloned".into(), serde_json::Value::Null), ("booted".into(), "the QEMU differs".into())]
    );
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
