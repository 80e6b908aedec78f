//! A cgroup for one process and all that it starts, below the leaf of its class.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use envd_sys::{SignalNumber, watch_readiness};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::pread;
use tokio::io::Interest;

use super::tree::{self, Stat};

/// Names that are tried: those that a tenant made are passed over.
const MAX_TRIES: usize = 100;

/// Cgroups that a tenant made inside and that are looked at: more are its own affair.
const MAX_INNER: usize = 1000;

/// A directory below a leaf. Dropped, it is removed if it is empty by then.
#[derive(Debug)]
pub(super) struct OwnCgroup {
    leaf: OwnedFd,
    name: String,
    directory: OwnedFd,
}

impl OwnCgroup {
    /// Makes one below `leaf`.
    pub(super) fn create(leaf: BorrowedFd<'_>) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let leaf = leaf.try_clone_to_owned()?;
        for _ in 0..MAX_TRIES {
            let name = format!("process-{}", NEXT.fetch_add(1, Ordering::Relaxed));
            match mkdirat(&leaf, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let directory = open_directory(leaf.as_fd(), &name)?;
                    return Ok(Self { leaf, name, directory });
                }
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// The directory to be born in.
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether a process, by its pid as the agent sees it, is in it or below it.
    pub(super) fn holds(&self, pid: i32) -> bool {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let path = text.lines().find_map(|line| line.strip_prefix("0::"));
        path.is_some_and(|path| path.split('/').any(|name| name == self.name))
    }

    /// Signals every process in it. SIGKILL reaches also those that are born in the meantime.
    pub(super) fn signal(&self, signal: SignalNumber) -> io::Result<()> {
        if signal == SignalNumber::KILL {
            return self.open("cgroup.kill", OFlags::WRONLY)?.write_all(b"1");
        }
        let mut known = HashSet::new();
        tree::sweep(signal, || {
            let mut new = Vec::new();
            for pid in self.processes()? {
                // The pid may be another process's by now: asked in this order, it is one of ours or it is not signalled.
                let Some(stat) = Stat::read(pid) else { continue };
                if self.holds(pid) && known.insert(stat.identity) {
                    new.push(stat.identity);
                }
            }
            Ok(new)
        })
    }

    /// Waits until its last process is gone, which can be long after the one that it was made for, and removes it.
    pub(super) async fn remove_when_empty(&self) -> io::Result<()> {
        let events = watch_readiness(self.open("cgroup.events", OFlags::RDONLY)?.into(), Interest::PRIORITY)?;
        loop {
            let mut text = [0; 256];
            let count = pread(events.get_ref(), &mut text, 0)?;
            if !String::from_utf8_lossy(&text[..count]).contains("populated 1") {
                return self.remove();
            }
            let mut ready = events.ready(Interest::PRIORITY).await?;
            ready.clear_ready();
        }
    }

    fn remove(&self) -> io::Result<()> {
        for inner in self.inner()?.iter().rev() {
            unlinkat(&self.directory, inner, AtFlags::REMOVEDIR)?;
        }
        match unlinkat(&self.leaf, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn processes(&self) -> io::Result<Vec<i32>> {
        let mut text = String::new();
        self.open("cgroup.procs", OFlags::RDONLY)?.read_to_string(&mut text)?;
        for inner in self.inner()? {
            // It may be gone, or be threaded, which has no list of processes.
            if let Ok(mut file) = self.open(&format!("{inner}/cgroup.procs"), OFlags::RDONLY) {
                let _ = file.read_to_string(&mut text);
            }
        }
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// The cgroups below, each after the one that it is in.
    fn inner(&self) -> io::Result<Vec<String>> {
        let mut paths = vec![".".to_owned()];
        let mut next = 0;
        while next < paths.len() && paths.len() < MAX_INNER {
            let Ok(directory) = open_directory(self.directory.as_fd(), &paths[next]) else {
                next += 1;
                continue;
            };
            for entry in Dir::new(directory)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy();
                if entry.file_type() == FileType::Directory && name != "." && name != ".." {
                    paths.push(format!("{}/{name}", paths[next]));
                }
            }
            next += 1;
        }
        paths.remove(0);
        Ok(paths)
    }

    fn open(&self, name: &str, flags: OFlags) -> io::Result<File> {
        Ok(openat(&self.directory, name, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        // One that still has processes, or is gone already, is not removed here.
        let _ = unlinkat(&self.leaf, &self.name, AtFlags::REMOVEDIR);
    }
}

fn open_directory(at: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    Ok(openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    /// There only to catch a hang.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// A cgroup of the machine that stands for a leaf; removed at the end.
    struct Leaf(PathBuf);

    impl Leaf {
        /// `None` where this machine or user has no cgroup2 to write to.
        fn new(name: &str) -> Option<Self> {
            for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                let path = PathBuf::from(format!("{root}/envd-test-{}-{name}", std::process::id()));
                if fs::metadata(format!("{root}/cgroup.procs")).is_ok() && fs::create_dir(&path).is_ok() {
                    return Some(Self(path));
                }
            }
            eprintln!("SKIPPED: this machine has no cgroup2 that can be written to");
            None
        }

        fn fd(&self) -> OwnedFd {
            File::open(&self.0).unwrap().into()
        }
    }

    impl Drop for Leaf {
        fn drop(&mut self) {
            let _ = fs::remove_dir(&self.0);
        }
    }

    /// A shell in the cgroup whose child outlives it; the child's pid.
    fn family(cgroup: &OwnCgroup, leaf: &Leaf) -> (Child, i32) {
        let procs = leaf.0.join(&cgroup.name).join("cgroup.procs");
        let script = format!("echo $$ > {}; setsid sleep 1000 & echo $!; read line", procs.display());
        let mut shell = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = String::new();
        let mut out = shell.stdout.take().unwrap();
        let mut byte = [0];
        while !text.ends_with('\n') {
            out.read_exact(&mut byte).unwrap();
            text.push(byte[0].into());
        }
        (shell, text.trim().parse().unwrap())
    }

    #[tokio::test]
    async fn a_grandchild_that_outlives_the_process_keeps_the_cgroup_until_its_end() {
        let Some(leaf) = Leaf::new("kill") else { return };
        let cgroup = OwnCgroup::create(leaf.fd().as_fd()).unwrap();
        let path = leaf.0.join(&cgroup.name);
        let (mut shell, child) = family(&cgroup, &leaf);
        assert!(cgroup.holds(child) && !cgroup.holds(std::process::id() as i32));
        fs::create_dir_all(path.join("a/b")).unwrap();
        drop(shell.stdin.take());
        shell.wait().unwrap();
        let cgroup = std::sync::Arc::new(cgroup);
        let removing = tokio::spawn({
            let cgroup = std::sync::Arc::clone(&cgroup);
            async move { cgroup.remove_when_empty().await }
        });
        cgroup.signal(SignalNumber::new(18).unwrap()).unwrap();
        assert!(path.exists());
        cgroup.signal(SignalNumber::KILL).unwrap();
        tokio::time::timeout(DEADLINE, removing).await.unwrap().unwrap().unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn other_signals_reach_every_process_of_it() {
        let Some(leaf) = Leaf::new("term") else { return };
        let cgroup = OwnCgroup::create(leaf.fd().as_fd()).unwrap();
        let path = leaf.0.join(&cgroup.name);
        let (mut shell, _) = family(&cgroup, &leaf);
        cgroup.signal(SignalNumber::new(15).unwrap()).unwrap();
        assert!(!shell.wait().unwrap().success());
        tokio::time::timeout(DEADLINE, cgroup.remove_when_empty()).await.unwrap().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn one_that_was_never_used_leaves_nothing() {
        let Some(leaf) = Leaf::new("drop") else { return };
        let cgroup = OwnCgroup::create(leaf.fd().as_fd()).unwrap();
        let path = leaf.0.join(&cgroup.name);
        assert!(path.exists());
        drop(cgroup);
        assert!(!path.exists());
    }
}
