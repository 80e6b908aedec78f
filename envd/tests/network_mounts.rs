//! A watch on a mount that others change without the kernel's knowledge: refused, unless it is asked for all the same.

mod support_files;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use support_files::Agent;

/// Requests of FUSE (linux/fuse.h, `enum fuse_opcode`).
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;

/// Serves a file system that is one empty directory, until it is unmounted.
fn serve(device: &OwnedFd) {
    let mut request = vec![0; 64 << 10];
    while let Ok(length) = rustix::io::read(device, &mut request) {
        let u32_at = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert!(length >= 40, "a header");
        let (error, answer) = match u32_at(4) {
            FORGET | INTERRUPT => continue,
            INIT => (0, init()),
            GETATTR => (0, directory()),
            STATFS => (0, vec![0; 80]),
            OPENDIR => (0, vec![0; 16]),
            READDIR | RELEASEDIR => (0, Vec::new()),
            _ => (-rustix::io::Errno::NOSYS.raw_os_error(), Vec::new()),
        };
        let length = (16 + answer.len()) as u32;
        let head = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16]].concat();
        // Who has asked may have gone.
        let _ = rustix::io::write(device, &[head, answer].concat());
    }
}

/// `struct fuse_init_out` of version 7.31.
fn init() -> Vec<u8> {
    let mut out = [7_u32, 31, 0, 0, 0, 4096].map(u32::to_ne_bytes).concat();
    out.resize(64, 0);
    out
}

/// `struct fuse_attr_out` of a directory.
fn directory() -> Vec<u8> {
    let mut out = vec![0; 16 + 88];
    out[16] = 1;
    let mode = 16 + 60;
    out[mode..mode + 8].copy_from_slice(&[0o040_755_u32, 2].map(u32::to_ne_bytes).concat());
    out
}

#[tokio::test]
async fn a_network_mount_is_watched_only_when_it_is_asked_for() {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: no /dev/fuse");
        return;
    }
    let fuse = "mkdir mount; exec 3<>/dev/fuse; \
                mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 test mount";
    let agent = Agent::start_after(fuse).await;
    // The agent has the descriptor from the shell, and does not care.
    let agents = pidfd_open(Pid::from_raw(agent.pid() as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let device = pidfd_getfd(agents.as_fd(), 3, PidfdGetfdFlags::empty()).unwrap();
    thread::spawn(move || serve(&device));

    let path = agent.path("mount");
    let (status, refused) = agent.call("CreateWatcher", json!({"path": path})).await;
    assert_eq!((status.as_u16(), &refused["code"]), (400, &json!("invalid_argument")), "{refused}");
    assert!(refused["message"].as_str().unwrap().contains("on a network mount (FUSE)"), "{refused}");
    let mut stream = agent.watch(json!({"path": path}), &[]).await;
    let ended: Value = stream.next().await.unwrap_err();
    assert_eq!(ended["error"]["code"], "invalid_argument");

    let allowed = json!({"path": path, "recursive": true, "allowNetworkMounts": true});
    let created = agent.ok("CreateWatcher", allowed.clone()).await;
    agent.ok("RemoveWatcher", json!({"watcherId": created["watcherId"]})).await;
    let mut stream = agent.watch(allowed, &[]).await;
    assert_eq!(stream.next().await, Ok(json!({"start": {}})));
}
