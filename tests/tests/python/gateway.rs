//! The published clients, unmodified, against a gateway with real machines.
//!
//! tests/sdk-methods.txt says which methods they call; each program prints a line for each case that it has checked.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use e2e::{TestSandbox, binary, made};
use rustix::process::{Pid, Signal, kill_process};

/// The domain of host labels, resolved by the clients' preloaded script and by nothing else.
pub(crate) const DOMAIN: &str = "tiffin.test";

/// A gateway on a free port with a data folder of its own.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) data: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Gateway {
    /// One with the template `base` of all tests.
    fn start() -> Self {
        Self::start_on(Self::data_to_build_in())
    }

    /// A data folder of its own in all, with `base` and the image that it is made of: builds leave templates and caches.
    pub(crate) fn data_to_build_in() -> tempfile::TempDir {
        let data = tempfile::Builder::new().prefix("gateway").tempdir_in("/tmp").unwrap();
        base(data.path(), |_| {});
        let mut load = Command::new(binary("image-builder"));
        let images = made("TIFFIN_E2E_DATA").join("images");
        load.arg("--data-dir").arg(data.path()).args(["load", "-t", "e2e-base"]);
        load.arg(format!("oci:{}:docker.io/library/e2e-base:latest", images.display()));
        let load = load.output().unwrap();
        assert!(load.status.success(), "{}", String::from_utf8_lossy(&load.stderr));
        data
    }

    /// A data folder without templates.
    pub(crate) fn data() -> tempfile::TempDir {
        let data = tempfile::Builder::new().prefix("gateway").tempdir_in("/tmp").unwrap();
        // What was found out about this machine is shared.
        share("cache", data.path());
        data
    }

    fn start_on(data: tempfile::TempDir) -> Self {
        Self::start_with(data, &[], 3)
    }

    /// With more options; it says so many variables.
    pub(crate) fn start_with(data: tempfile::TempDir, more: &[&str], variables: usize) -> Self {
        let mut child = Command::new(binary("tiffin-gateway"))
            .args(["serve", "--listen", "127.0.0.1:0", "--domain", DOMAIN, "--allow-emulation", "--data-dir"])
            .arg(data.path())
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says its variables once it serves.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut gateway = Self { child, data, variables: Vec::new() };
        while gateway.variables.len() < variables {
            let line = lines.next().expect("the gateway serves").unwrap();
            let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
            gateway.variables.push((name.to_owned(), value.trim_matches('\'').to_owned()));
        }
        gateway
    }

    pub(crate) fn variable(&self, name: &str) -> &str {
        let found = self.variables.iter().find(|(known, _)| known == name);
        &found.unwrap_or_else(|| panic!("the gateway did not say {name}: {:?}", self.variables)).1
    }

    /// Runs a client's program, which says `ok CASE` for each case that its `--checks` names.
    pub(crate) fn run(&self, program: Command, listing: Command) {
        let all: Vec<&str> = self.variables.iter().map(|(name, _)| name.as_str()).collect();
        self.run_with(program, listing, &all);
    }

    /// The same with some of the variables.
    pub(crate) fn run_with(&self, mut program: Command, mut listing: Command, variables: &[&str]) {
        let listed = listing.arg("--checks").output().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let expected = String::from_utf8(listed.stdout).unwrap();
        let done = program.envs(variables.iter().map(|name| (name, self.variable(name)))).output().unwrap();
        let (said, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{}\n{said}\n{errors}", done.status);
        let ok: BTreeSet<&str> = said.lines().filter_map(|line| line.strip_prefix("ok ")).collect();
        let missing: Vec<&str> = expected.lines().filter(|case| !ok.contains(case)).collect();
        assert!(!ok.is_empty() && missing.is_empty(), "not checked: {missing:?}\n{said}\n{errors}");
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Sandboxes outlive their gateway, and machines end with their shims.
        let left = TestSandbox::processes_of(self.data.path());
        for pid in left {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

pub(crate) fn share(name: &str, data: &Path) {
    std::os::unix::fs::symlink(made("TIFFIN_E2E_DATA").join(name), data.join(name)).unwrap();
}

pub(crate) fn javascript(program: &str) -> Command {
    let mut command = Command::new(made("TIFFIN_NODE"));
    command.arg(scripts().join(program));
    command
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("javascript")
}

#[test]
fn the_python_client_blocking() {
    let of = || {
        let mut command = crate::python("gateway.py");
        command.arg("sync");
        command
    };
    Gateway::start().run(of(), of());
}

#[test]
fn the_python_client_with_asyncio() {
    let of = || {
        let mut command = crate::python("gateway.py");
        command.arg("async");
        command
    };
    Gateway::start().run(of(), of());
}

#[test]
fn the_javascript_client() {
    Gateway::start().run(javascript("gateway.mjs"), javascript("gateway.mjs"));
}

#[test]
fn the_first_javascript_client_over_its_websocket() {
    let gateway = Gateway::start();
    let port = gateway.variable("E2B_API_URL").rsplit(':').next().unwrap().to_owned();
    let domain = format!("{DOMAIN}:{port}");
    let of = || {
        let mut command = javascript("legacy.mjs");
        command
            .env("TIFFIN_DOMAIN", &domain)
            .env("E2B_DOMAIN", &domain)
            .env("E2B_SECURE", "false")
            .env("NODE_OPTIONS", format!("--require={}", scripts().join("loopback.cjs").display()));
        command
    };
    gateway.run(of(), of());
}

#[test]
fn the_tunnels_example_clients() {
    let of = || {
        let mut command = crate::python("tunnel.py");
        command.arg(made("TIFFIN_NODE"));
        command
    };
    Gateway::start().run(of(), of());
}

/// A template `base` of its own, changed.
fn base(data: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let shared = made("TIFFIN_E2E_DATA").join("templates/base");
    let own = data.join("templates/base");
    std::fs::create_dir_all(&own).unwrap();
    let rootfs = own.join("rootfs.ext4");
    if std::fs::hard_link(shared.join("rootfs.ext4"), &rootfs).is_err() {
        std::fs::copy(shared.join("rootfs.ext4"), &rootfs).unwrap();
    }
    let mut template: serde_json::Value =
        serde_json::from_slice(&std::fs::read(shared.join("template.json")).unwrap()).unwrap();
    change(&mut template);
    std::fs::write(own.join("template.json"), template.to_string()).unwrap();
}

/// One with a start command and a snapshot.
fn warmed(data: &Path) {
    base(data, |template| {
        template["runtime"]["start_command"] = "echo started >> ~/starts; exec sleep 1000000".into();
        template["runtime"]["ready_command"] = "test -s ~/starts".into();
    });
    let mut warm = Command::new(binary("host-shim"));
    warm.args(["template", "warm", "base", "--quiet", "--data-dir"]).arg(data);
    let warm = warm.output().unwrap();
    assert!(warm.status.success(), "{}", String::from_utf8_lossy(&warm.stderr));
}

#[test]
fn a_sandbox_of_a_template_with_a_snapshot_is_a_clone() {
    let data = Gateway::data();
    warmed(data.path());
    let gateway = Gateway::start_on(data);
    let of = || crate::python("restored.py");
    gateway.run(of(), of());
    let sandboxes = std::fs::read_dir(gateway.data.path().join("sandboxes")).unwrap();
    let states: Vec<serde_json::Value> = sandboxes
        .filter_map(|folder| std::fs::read(folder.unwrap().path().join("state.json")).ok())
        .map(|state| serde_json::from_slice(&state).unwrap())
        .collect();
    assert_eq!(states.len(), 2, "restored.py leaves two");
    for state in states {
        assert_eq!((&state["start"], &state["booted_because"]), (&"cloned".into(), &serde_json::Value::Null));
        assert!(state["generation"].as_u64() > Some(envd_proto::FIRST_GENERATION), "{state}");
    }
}
