//! The example of a hook that gives a live Python server random numbers of its own in each clone.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// There only to catch a hang.
const DEADLINE: Duration = Duration::from_secs(60);

/// A server that draws a number for each line, from a seed that every clone would have; OpenSSL is loaded as in a web server.
const SERVER: &str = "import random, ssl, sys, reseed
random.seed(7)
for line in sys.stdin: print(random.getrandbits(64), flush=True)";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The server's next numbers: `hold` is done while it is stopped, as a machine's processes are from Freeze to Thaw.
fn numbers(folder: &Path, hold: impl Fn()) -> Vec<String> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/reseed");
    let mut server = Killed(
        Command::new("python3")
            .args(["-c", SERVER])
            .env("PYTHONPATH", examples)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("RESEED_FOLDER", folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut input = server.0.stdin.take().unwrap();
    let mut output = BufReader::new(server.0.stdout.take().unwrap());
    let mut draw = move || {
        input.write_all(b"\n").unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the server goes on");
        line
    };
    let mut drawn = vec![draw()];
    let pid = Pid::from_child(&server.0);
    kill_process(pid, Signal::STOP).unwrap();
    let status = format!("/proc/{}/status", server.0.id());
    let begun = Instant::now();
    while !std::fs::read_to_string(&status).unwrap().contains("State:\tT") {
        assert!(begun.elapsed() < DEADLINE, "the server is held");
        std::thread::sleep(Duration::from_millis(5));
    }
    hold();
    kill_process(pid, Signal::CONT).unwrap();
    drawn.extend([draw(), draw()]);
    drawn
}

#[test]
fn a_live_server_draws_other_numbers_after_the_hook() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no python3");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let hook = || {
        // A process that was killed has left its file; a number that is no process's any more.
        std::fs::write(folder.path().join("4194305"), "").unwrap();
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/reseed/50-reseed");
        let status = Command::new(hook).env("RESEED_FOLDER", folder.path()).status().unwrap();
        assert!(status.success());
        assert!(!folder.path().join("4194305").exists());
    };
    let (without, one, two) =
        (numbers(folder.path(), || {}), numbers(folder.path(), hook), numbers(folder.path(), hook));
    // The three were the same until then, and without the hook they would go on so.
    assert!(without[0] == one[0] && one[0] == two[0]);
    assert_eq!(without, numbers(folder.path(), || {}));
    for later in 1..3 {
        assert!(without[later] != one[later] && one[later] != two[later] && without[later] != two[later]);
    }
}
