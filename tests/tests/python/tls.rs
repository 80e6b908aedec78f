//! The published clients as they are without any word about where the gateway is, but for its domain: they build host names of
//! it, connect to them with TLS, and trust the gateway's authority because the operator told them to.
//!
//! The names are in a hosts file that only the clients see: it is mounted over /etc/hosts in a mount namespace of their own.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use rustix::fs::inotify;

use crate::gateway::{DOMAIN, Gateway, javascript, share};

/// Ports of sandboxes whose names are looked up: both agents' and that of a server in it.
const PORTS: [u16; 3] = [49982, 49983, 3000];

/// What the older clients put after a sandbox's id.
const CLIENT_ID: &str = "6532622b";

/// A hosts file in which every sandbox has its names from the moment that its folder is there, which is before a client is told of
/// it.
struct Hosts {
    file: tempfile::NamedTempFile,
    watch: OwnedFd,
    watched: i32,
    writer: Option<JoinHandle<()>>,
}

impl Hosts {
    fn of(sandboxes: &Path) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "127.0.0.1 localhost {DOMAIN} api.{DOMAIN}").unwrap();
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        let watched = inotify::add_watch(&watch, sandboxes, flags).unwrap();
        let events = watch.try_clone().unwrap();
        let mut names = fs::OpenOptions::new().append(true).open(file.path()).unwrap();
        let writer = std::thread::spawn(move || {
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(events, &mut buffer);
            loop {
                let event = events.next().unwrap();
                if event.events().contains(inotify::ReadFlags::IGNORED) {
                    return;
                }
                let Some(id) = event.file_name().and_then(|name| name.to_str().ok()) else { continue };
                let of = PORTS.map(|port| format!("{port}-{id}.{DOMAIN} {port}-{id}-{CLIENT_ID}.{DOMAIN}"));
                // In one piece: somebody may be reading.
                names.write_all(format!("127.0.0.1 {}\n", of.join(" ")).as_bytes()).unwrap();
            }
        });
        Self { file, watch, watched, writer: Some(writer) }
    }

    /// The same program, in a mount namespace where this is /etc/hosts.
    fn seen_by(&self, program: &Command) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "--propagation", "private", "sh", "-c"]);
        command.arg(r#"mount --bind "$0" /etc/hosts && exec "$@""#).arg(self.file.path());
        command.arg(program.get_program()).args(program.get_args());
        for (name, value) in program.get_envs() {
            command.env(name, value.unwrap_or(OsStr::new("")));
        }
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // The watch's last event is that it is gone.
        let _ = inotify::remove_watch(&self.watch, self.watched);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// A gateway with an authority of its own, and the names of its sandboxes.
fn secured() -> (Gateway, Hosts) {
    let data = Gateway::data();
    share("templates", data.path());
    let sandboxes = data.path().join("sandboxes");
    fs::create_dir_all(&sandboxes).unwrap();
    let hosts = Hosts::of(&sandboxes);
    let gateway = Gateway::start_with(data, &["--tls-self-signed"], 5);
    (gateway, hosts)
}

/// Runs a client's program with nothing but the domain, the key and the authority.
fn runs(program: impl Fn() -> Command) {
    runs_told(&["E2B_DOMAIN", "E2B_API_KEY", "NODE_EXTRA_CA_CERTS"], program);
}

/// The same with those of the gateway's variables.
fn runs_told(variables: &[&str], program: impl Fn() -> Command) {
    let (gateway, hosts) = secured();
    let mut client = hosts.seen_by(&program());
    client.env("SSL_CERT_FILE", gateway.variable("NODE_EXTRA_CA_CERTS"));
    client.env("TIFFIN_DOMAIN", gateway.variable("E2B_DOMAIN"));
    gateway.run_with(client, program(), variables);
}

fn older(program: &str, client: &str) -> Command {
    let mut command = javascript(program);
    command.arg(client).env("TIFFIN_JAVASCRIPT", e2e::made("TIFFIN_JAVASCRIPT_OLDER"));
    command
}

#[test]
fn the_javascript_client_by_its_domain() {
    runs(|| {
        let mut command = javascript("domain.mjs");
        command.arg("e2b");
        command
    });
}

#[test]
fn the_javascript_client_of_1_x() {
    runs(|| older("domain.mjs", "e2b-1"));
}

#[test]
fn the_javascript_client_that_was_called_sdk_2_5() {
    runs(|| older("domain.mjs", "e2b-sdk-2"));
}

#[test]
fn the_first_javascript_client_unmodified() {
    runs(|| {
        let mut command = javascript("legacy.mjs");
        command.env("TIFFIN_TLS", "1");
        command
    });
}

// It has a resolver of its own, which reads the hosts file once, before there is a sandbox.
#[test]
fn the_python_client_by_the_address() {
    let all = ["E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY", "E2B_DOMAIN"];
    runs_told(&all, || crate::python("domain.py"));
}

#[test]
fn the_python_client_of_1_x() {
    runs(|| {
        let current = crate::python("domain.py");
        let mut command = Command::new(e2e::made("TIFFIN_PYTHON_OLDER"));
        command.args(current.get_args());
        command
    });
}
