//! A disk that is full: the data folder is an ext4 of which K bytes are left.
//!
//! No tmpfs: there a page of the RAM's file that nobody wrote takes space when a clone reads it, and without space the kernel
//! kills the VMM with SIGBUS.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::DEADLINE;
use envd_proto::process::{ProcessConfig, StartRequest};
use sandbox_folder::client::{Output, SandboxClient};
use serde_json::json;

use super::{Case, Host, Phase, until};

/// The whole disk. The template and its snapshot take 70 MiB of it, a template that is made of a clone as much again at most.
const DISK: u64 = 400 << 20;

/// What is left of it: nothing, a page or two for small files, and less than a RAM's pages. Each verb needs more than the last.
const LEFT: [u64; 7] = [0, 4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// Bytes of a block of the file system.
const BLOCK: u64 = 4 << 10;

/// A mounted file system. Dropped, it is unmounted.
struct Disk {
    at: PathBuf,
    _image: tempfile::NamedTempFile,
}

impl Disk {
    /// Nothing without the right to mount.
    fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir(&at).expect("a folder");
        // In memory where that can be: the disk of a busy machine takes seconds for each sync.
        let image = tempfile::NamedTempFile::new_in("/dev/shm").or_else(|_| tempfile::NamedTempFile::new());
        let image = image.expect("a file for the disk");
        image.as_file().set_len(DISK).expect("room for a sparse file");
        // Without blocks that only root may use, and with a journal, as anybody's.
        let made = Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(image.path()).status();
        assert!(made.expect("mke2fs (package e2fsprogs) runs").success());
        let mounted = Command::new("mount")
            .args(["-o", "loop"])
            .arg(image.path())
            .arg(&at)
            .output()
            .expect("mount runs");
        if !mounted.status.success() {
            eprintln!("skipped: nothing can be mounted here: {}", String::from_utf8_lossy(&mounted.stderr));
            return None;
        }
        Some(Self { at, _image: image })
    }

    /// Fills it but for `left` bytes.
    fn leave(&self, left: u64) -> Ballast {
        let file = self.at.join("ballast");
        let out = fs::File::create(&file).expect("a file");
        let mut size = 0;
        loop {
            // What was removed is free once the journal has it.
            rustix::fs::syncfs(&out).expect("a sync");
            let before = size;
            let mut step = DISK;
            // All of it, in ever smaller pieces: the file system needs blocks of its own for the file.
            while step >= BLOCK {
                match rustix::fs::fallocate(&out, rustix::fs::FallocateFlags::empty(), size, step) {
                    Ok(()) => size += step,
                    Err(rustix::io::Errno::NOSPC) => step /= 2,
                    Err(error) => panic!("the ballast: {error}"),
                }
            }
            if size == before {
                break;
            }
        }
        out.set_len(size - left).expect("a smaller ballast");
        rustix::fs::syncfs(&out).expect("a sync");
        Ballast(file)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Also where something still has a file of it open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// What fills the disk. Dropped, it is gone.
struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn host() -> Option<(Host, Disk)> {
    let root = Host::root();
    let data = root.path().join("d");
    let disk = Disk::mount(data.clone())?;
    Some((Host::on(root, data), disk))
}

/// A sandbox that runs and has printed something that nobody has read.
struct Tenant {
    runtime: tokio::runtime::Runtime,
    process: sandbox_folder::client::Process,
}

impl Tenant {
    fn start(case: &Case<'_>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = SandboxClient::unix(case.dir.join("vsock.sock"));
        let process = ProcessConfig {
            cmd: "/bin/sh".into(),
            args: ["-c", "echo unread; read line; echo $line"].map(str::to_owned).into(),
            ..Default::default()
        };
        let request = StartRequest { process: Some(process), stdin: Some(true), ..Default::default() };
        let process = runtime.block_on(client.start(request)).expect("the process starts");
        Self { runtime, process }
    }

    /// It has missed nothing.
    fn assert_untouched(mut self) {
        let mut printed = Vec::new();
        let reading = async {
            let mut stdin = self.process.stdin();
            stdin.write(b"read\n".as_slice().into()).await.expect("it reads");
            loop {
                match self.process.next().await.expect("output") {
                    Output::Stdout(bytes) => printed.extend(bytes),
                    Output::Ended(exit) => break exit.code(),
                    other => panic!("{other:?}"),
                }
            }
        };
        let code =
            self.runtime.block_on(async { tokio::time::timeout(DEADLINE, reading).await.expect("its end") });
        assert_eq!((code, String::from_utf8_lossy(&printed).as_ref()), (0, "unread\nread\n"));
    }
}

/// All files of a folder.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "ballast" && name != "lost+found")
        .collect();
    names.sort();
    names
}

fn assert_says_full(said: &str, below: &Path) {
    let full = ["No space left on device", "no space for", "no storage space"]
        .iter()
        .any(|words| said.contains(words));
    assert!(full && said.contains(below.to_str().expect("ASCII")), "{said}");
}

fn full_for(verb: &str, target: Option<&str>) {
    let Some((host, disk)) = host() else { return };
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    let tenant = Tenant::start(&case);
    let path = target.map(|target| host.data().join(target).join("made"));
    let body = path.as_ref().map_or(json!({}), |path| json!({ "path": path }));
    let before = (names(&case.dir), case.state().expect("a state")["phase"].clone());
    for left in LEFT {
        let ballast = disk.leave(left);
        let (status, said) = case.call(verb, &body).expect("an answer");
        assert_eq!(status, 507, "{verb} with {left} bytes left: {said}");
        assert_says_full(said["message"].as_str().expect("a message"), host.data());
        assert_eq!((names(&case.dir), case.state().expect("a state")["phase"].clone()), before, "{left}");
        drop(ballast);
        host.assert_nothing_unfinished();
        assert!(path.as_ref().is_none_or(|path| !path.exists()));
        // A machine that stood still for want of space comes to the Freeze, and to its end, only now.
        case.assert_thaws();
        case.assert_marked();
    }
    tenant.assert_untouched();
    let (status, said) = case.call(verb, &body).expect("an answer");
    assert_eq!(status, 200, "{verb}: {said}");
    if verb == "pause" {
        assert_eq!(case.ended().0, Some(3));
    }
    let phase = case.settle(false);
    assert_eq!(phase, if verb == "pause" { Phase::Paused } else { Phase::Ended });
    case.assert_resumes(phase);
    host.assert_template_unchanged();
}

#[test]
fn a_pause_without_space_leaves_the_sandbox_as_it_was() {
    full_for("pause", None);
}

#[test]
fn a_fork_without_space_leaves_the_sandbox_as_it_was() {
    full_for("fork", Some("forks"));
}

#[test]
fn a_template_without_space_leaves_the_sandbox_as_it_was() {
    full_for("snapshot", Some("templates"));
}

#[test]
fn a_start_without_space_says_so_and_a_paused_sandbox_stays_paused() {
    let Some((host, disk)) = host() else { return };
    let mut paused = host.case();
    paused.start(&[]);
    paused.mark();
    assert_eq!(paused.call("pause", &json!({})).expect("an answer").0, 200);
    paused.ended();
    let mut last = false;
    for left in [0, 4 << 10, 8 << 10, 16 << 10, 24 << 10, 32 << 10, 64 << 10, 128 << 10] {
        let mut case = host.case();
        let ballast = disk.leave(left);
        match case.try_start(&[]) {
            Ok(_) => last = true,
            Err(said) => {
                assert!(!last, "it started with less: {said}");
                assert_says_full(&said, host.data());
            }
        }
        let resumed = paused.try_start(&["--resume"]);
        drop(ballast);
        match resumed {
            // It went on, and is paused again.
            Ok(_) => {
                paused.assert_marked();
                assert_eq!(paused.call("pause", &json!({})).expect("an answer").0, 200);
                paused.ended();
            }
            Err(said) => assert_says_full(&said, host.data()),
        }
        assert_ne!(case.settle(false), Phase::Paused);
        case.remove();
        assert_eq!(paused.settle(false), Phase::Paused, "{left}");
    }
    paused.assert_resumes(Phase::Paused);
    host.assert_template_unchanged();
}

#[test]
fn a_configure_without_space_leaves_the_sandbox_parked() {
    let Some((host, disk)) = host() else { return };
    let mut case = host.case();
    case.start(&["--park"]);
    let ballast = disk.leave(0);
    for attempt in 0..2 {
        let (status, said) = case.call("configure", &json!({ "env": { "FAILED": "1" } })).expect("an answer");
        if status == 200 {
            // The file system found a block after all, as ext4 does when its journal is committed: nothing is shown then.
            eprintln!("SKIPPED: the disk was not full when the sandbox was configured");
            drop(ballast);
            case.settle(false);
            return;
        }
        assert_eq!(status, 507, "{attempt}: {said}");
        assert_says_full(said["message"].as_str().expect("a message"), host.data());
        assert_eq!(case.state().expect("a state")["phase"], "parked");
    }
    drop(ballast);
    let (status, said) = case.call("configure", &json!({ "env": { "WORKS": "1" } })).expect("an answer");
    assert_eq!(status, 200, "{said}");
    assert_eq!(case.sh("echo $FAILED-$WORKS"), "-1\n");
    case.settle(false);
    host.assert_template_unchanged();
}

#[test]
fn a_warming_without_space_leaves_the_template_as_it_was() {
    let Some((host, disk)) = host() else { return };
    for left in [0, 64 << 10, 8 << 20] {
        let ballast = disk.leave(left);
        let done = host.output(&["template", "warm", "--accel", "tcg", "e2e"]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success(), "with {left} bytes left: {said}");
        assert_says_full(&said, host.data());
        drop(ballast);
        host.assert_nothing_unfinished();
        host.assert_template_unchanged();
    }
    host.assert_template_whole();
}

/// What the guest writes has no room: it waits, and goes on when there is some, without an error and with nothing lost.
#[test]
fn a_sandbox_whose_disk_has_no_room_waits_for_it() {
    let Some((host, disk)) = host() else { return };
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    let ballast = disk.leave(0);
    let dir = case.dir.clone();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| case.sh("head -c 30000000 /dev/urandom > /root/large && sync && sha256sum < /root/large > /root/sum && echo written"));
        until("the shim says that it waits", || {
            fs::read_to_string(dir.join("shim.log"))
                .is_ok_and(|log| log.contains("no space for what it writes"))
                || writing.is_finished()
        });
        drop(ballast);
        assert_eq!(writing.join().expect("it is written"), "written\n");
    });
    let log = fs::read_to_string(case.dir.join("shim.log")).expect("the shim's log");
    assert!(log.contains("no space for what it writes"), "{log}");
    case.assert_marked();
    assert_eq!(
        case.sh(
            "sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/large | cmp - /root/sum && echo same"
        ),
        "same\n"
    );
    assert_eq!(case.call("stop", &json!({ "grace_ms": 1000 })).expect("an answer").0, 202);
    let (code, said) = case.ended();
    assert_eq!(code, Some(0), "{said}");
    case.settle(false);
}
