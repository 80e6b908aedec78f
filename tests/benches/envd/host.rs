//! On the host, over a Unix socket: start to exit, output and files, beside a bare spawn and beside ssh and sftp.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use crate::ssh::Ssh;
use crate::wire::{Agent, Wire};
use crate::{Bound, Row, interleaved, microseconds, rate};

const SPAWN_ROUNDS: usize = 300;
const TRANSFER_ROUNDS: usize = 7;
const TRANSFER: u64 = 256 << 20;

pub(crate) fn measure() -> Vec<Row> {
    let agent = Agent::start();
    // Not on a disk, whose speed is nobody's merit here.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let ssh = Ssh::start(folder.path());
    let mut rows = start_to_exit(&agent, &ssh);
    rows.extend(transfers(&agent, &ssh, folder.path()));
    rows
}

fn start_to_exit(agent: &Agent, ssh: &Ssh) -> Vec<Row> {
    // One byte there and back over a socket of the same kind, between two threads.
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    });
    let mut wire = agent.wire();
    let mut bare = || {
        let status = Command::new("/bin/true").stdin(Stdio::null()).status().unwrap();
        assert!(status.success());
        let mut byte = [1];
        near.write_all(&byte).unwrap();
        near.read_exact(&mut byte).unwrap();
    };
    let mut api = || assert_eq!(wire.run("/bin/true", &[]).unwrap(), (0, 0));
    let [spawn, api_time] = interleaved(SPAWN_ROUNDS, [&mut bare, &mut api]);
    let mut over_ssh = || ssh.run("/bin/true");
    let [ssh_time] = interleaved(SPAWN_ROUNDS / 10, [&mut over_ssh]);
    drop(near);
    echo.join().unwrap();
    vec![
        Row::plain("posix_spawn and wait of /bin/true, one round trip", microseconds(spawn)),
        Row {
            what: "the same through the API, start to exit".into(),
            value: microseconds(api_time),
            ratio: Some((api_time / spawn, Bound::AtMost(3.0))),
        },
        Row {
            what: "the same through a multiplexed ssh".into(),
            value: microseconds(ssh_time),
            ratio: Some((ssh_time / spawn, Bound::None)),
        },
    ]
}

fn transfers(agent: &Agent, ssh: &Ssh, folder: &std::path::Path) -> Vec<Row> {
    let name = |name: &str| folder.join(name).display().to_string();
    let (source, uploaded) = (name("source"), name("uploaded"));
    let content = vec![0x5a; TRANSFER as usize];
    fs::write(&source, &content).unwrap();
    let mut wire = agent.wire();
    let mut wire_up = agent.wire();
    let mut wire_out = agent.wire();
    let length = TRANSFER.to_string();

    let mut sftp_down = || ssh.sftp(&format!("get {source} /dev/null"));
    let mut down = || download(&mut wire, &source);
    let mut out = || {
        let printed = wire_out.run("/usr/bin/head", &["-c", &length, "/dev/zero"]).unwrap();
        assert_eq!(printed, (TRANSFER, 0));
    };
    let [sftp_down, down, out] = interleaved(TRANSFER_ROUNDS, [&mut sftp_down, &mut down, &mut out]);
    let mut sftp_up = || ssh.sftp(&format!("put {source} {uploaded}"));
    let mut up = || upload(&mut wire_up, &uploaded, &content);
    let [sftp_up, up] = interleaved(TRANSFER_ROUNDS, [&mut sftp_up, &mut up]);
    assert!(fs::read(&uploaded).unwrap() == content);

    let row = |what: &str, time: f64, yardstick: f64| Row {
        what: what.into(),
        value: rate(TRANSFER, time),
        ratio: Some((yardstick / time, Bound::AtLeast(2.0))),
    };
    vec![
        Row::plain("sftp get", rate(TRANSFER, sftp_down)),
        row("a file down, /files", down, sftp_down),
        row("standard output of a process", out, sftp_down),
        Row::plain("sftp put", rate(TRANSFER, sftp_up)),
        row("a file up, /files (with fsync and rename)", up, sftp_up),
    ]
}

/// GET of a file to nowhere.
pub(crate) fn download(wire: &mut Wire, path: &str) {
    let status = wire.request("GET", &format!("/files?path={path}"), "text/plain", b"").unwrap();
    assert_eq!(status, 200);
    assert!(wire.drain().unwrap() > 0);
}

/// POST of a file.
pub(crate) fn upload(wire: &mut Wire, path: &str, content: &[u8]) {
    let target = format!("/files?path={path}");
    wire.begin("POST", &target, "application/octet-stream", content.len() as u64).unwrap();
    wire.raw().write_all(content).unwrap();
    let status = wire.answer().unwrap();
    let answer = wire.rest().unwrap();
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
}
