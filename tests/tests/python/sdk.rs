//! The Python SDK on one agent, without a gateway in between.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::DEADLINE;

/// Checks of tests/python/sdk.py that need what the agent does not serve yet. They may fail; none may be missing.
const NOT_YET: &[&str] = &[];

/// Ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_published_python_client_is_at_home() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("envd.sock");
    let agent = Command::new(e2e::binary("envd"))
        .args(["--listen", &format!("unix:{}", socket.display()), "--no-container"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let _agent = Ended(agent);
    wait_for(&socket);

    let done = crate::python("sdk.py").arg(&socket).output().unwrap();
    let (said, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{}\n{said}\n{errors}", done.status);
    let mut ok = BTreeSet::new();
    for line in said.lines() {
        match line.split_once(' ') {
            Some(("ok", name)) => {
                ok.insert(name);
            }
            Some((_, failure)) => {
                let name = failure.split(':').next().unwrap();
                assert!(NOT_YET.contains(&name), "{line}\n{errors}");
            }
            None => panic!("{line}"),
        }
    }
    let expected = ["run", "background_list_kill", "connect_and_stdin", "files", "folders", "missing_files"];
    for name in expected {
        assert!(ok.contains(name), "{name} was not checked: {said}");
    }
    assert!(said.lines().count() >= 16, "checks are missing: {said}");
}

fn wait_for(socket: &Path) {
    let begin = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(begin.elapsed() < DEADLINE, "the agent does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
