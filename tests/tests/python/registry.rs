//! A build on one machine, and a sandbox of it on another: between them Debian's docker-registry.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::gateway::Gateway;

/// The files that a second machine has from the first.
const DATABASE: [&str; 4] = ["gateway.db", "gateway.db-wal", "gateway.db-shm", "gateway.key"];

/// A registry on a port that the kernel chose; ended with the test.
struct Registry {
    child: Child,
    host: String,
}

impl Registry {
    /// `None`, with the reason on stderr, where it is not installed.
    fn start(folder: &Path) -> Option<Self> {
        let file = folder.join("config.yml");
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nhttp: {{addr: '127.0.0.1:0'}}\nstorage: {{filesystem: {{rootdirectory: '{}'}}}}\n",
            folder.join("storage").display()
        );
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIPPED: docker-registry: {error}");
                return None;
            }
        };
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let host = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split(['"', ' ', ',']).next()?.to_owned())
        });
        // To its end: it never waits for somebody to read its log.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Some(Self { child, host: host.expect("it listens") })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_second_machine_needs_no_shared_disk() {
    let folder = tempfile::tempdir().unwrap();
    let Some(registry) = Registry::start(folder.path()) else { return };
    let url = format!("http://{}", registry.host);
    let run = |gateway: &Gateway, verb: &str| {
        let of = || {
            let mut command = crate::python("registry.py");
            command.arg(verb);
            command
        };
        gateway.run(of(), of());
    };
    let first = Gateway::start_with(Gateway::data_to_build_in(), &["--registry", &url], 3);
    run(&first, "build");
    let second = Gateway::data();
    for file in DATABASE {
        let from = first.data.path().join(file);
        if from.exists() {
            std::fs::copy(from, second.path().join(file)).unwrap();
        }
    }
    drop(first);
    let second = Gateway::start_with(second, &["--registry", &url, "--no-base"], 3);
    assert!(!second.data.path().join("templates").exists());
    run(&second, "start");
    assert_eq!(std::fs::read_dir(second.data.path().join("templates")).unwrap().count(), 1);
}
