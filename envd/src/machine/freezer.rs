//! Holding the tenant's processes still.
//!
//! The container's cgroup has one child for each class of processes, and what root in the container made beside them. All
//! are frozen but `system` and the spawner's, which the agent needs for its own work inside: `init` where PID 1 is the
//! spawner, `spawner` where it is the image's own, which is the tenant's like all that it runs. What was frozen is
//! remembered, so that a thaw touches nothing that the tenant froze itself.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};

/// How long processes have to stop; one that hangs in the kernel (a dead network mount) does not.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// The children are listed again until none is new: a process that makes cgroups may be among the last to be frozen.
const MAX_ROUNDS: usize = 8;

/// Freezes the children of a container's cgroup.
#[derive(Debug)]
pub(crate) struct Freezer {
    container: OwnedFd,
    /// The children that go on.
    spared: [&'static str; 2],
    frozen: Mutex<Vec<String>>,
}

impl Freezer {
    /// The freezer of the cgroup that this class's cgroup is a child of, and where the spawner has the child `spawner`.
    pub(crate) fn of_parent(leaf: BorrowedFd<'_>, spawner: &'static str) -> io::Result<Self> {
        let container = openat(leaf, "..", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { container, spared: [spawner, "system"], frozen: Mutex::default() })
    }

    /// Freezes and waits until all is still. When it is not in time, everything goes on as before.
    pub(super) fn freeze(&self, deadline: Duration) -> io::Result<()> {
        let end = Instant::now() + deadline;
        let frozen = self.freeze_all(end);
        if frozen.is_err() {
            // The error that is told is the first.
            let _ = self.thaw();
        }
        frozen
    }

    /// Lets go what was frozen.
    pub(super) fn thaw(&self) -> io::Result<()> {
        let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut first = Ok(());
        for name in frozen.drain(..) {
            match fs::write(self.path(&name, "cgroup.freeze"), "0") {
                // It was removed: its processes had ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => first = first.and(Err(named(&name, error))),
                Ok(()) => {}
            }
        }
        first
    }

    fn freeze_all(&self, end: Instant) -> io::Result<()> {
        for _ in 0..MAX_ROUNDS {
            let new = self.children()?;
            let fresh: Vec<_> = {
                let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
                let fresh: Vec<_> = new.into_iter().filter(|name| !frozen.contains(name)).collect();
                frozen.extend(fresh.iter().cloned());
                fresh
            };
            if fresh.is_empty() {
                return Ok(());
            }
            for name in &fresh {
                fs::write(self.path(name, "cgroup.freeze"), "1").map_err(|error| named(name, error))?;
            }
            for name in &fresh {
                self.wait_frozen(name, end)?;
            }
        }
        Err(io::Error::other(format!("cgroups were made faster than {MAX_ROUNDS} rounds could freeze them")))
    }

    fn wait_frozen(&self, name: &str, end: Instant) -> io::Result<()> {
        let mut events = File::open(self.path(name, "cgroup.events")).map_err(|error| named(name, error))?;
        loop {
            let mut text = String::new();
            events.rewind()?;
            events.read_to_string(&mut text)?;
            if text.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout)) {
                Ok(0) => {
                    let message = format!(
                        "cgroup {name}: its processes were not still in time: one hangs in the kernel; thawed again"
                    );
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The children to freeze that the tenant has not frozen itself.
    fn children(&self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.path("", ""))? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if !entry.file_type()?.is_dir() || self.spared.contains(&name.as_str()) {
                continue;
            }
            let ours = self.frozen.lock().unwrap_or_else(PoisonError::into_inner).contains(&name);
            let held =
                fs::read_to_string(self.path(&name, "cgroup.freeze")).is_ok_and(|text| text.trim() == "1");
            if ours || !held {
                found.push(name);
            }
        }
        Ok(found)
    }

    /// A file of a child. The path goes through the open directory, so it is the same in every mount namespace's thread.
    fn path(&self, child: &str, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.container.as_fd().as_raw_fd())).join(child).join(file)
    }
}

fn named(cgroup: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cgroup {cgroup}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::{Child, Command};

    /// A cgroup of the test's own, where the machine has version 2 mounted; removed with what is in it.
    struct Group(PathBuf);

    impl Group {
        fn new() -> Option<Self> {
            let mounts = fs::read_to_string("/proc/mounts").ok()?;
            let at = mounts.lines().find_map(|line| {
                let mut words = line.split(' ').skip(1);
                let at = words.next()?;
                (words.next()? == "cgroup2").then_some(at)
            })?;
            let path = Path::new(at).join(format!("tiffin-freezer-{}", std::process::id()));
            fs::create_dir(&path).ok()?;
            let group = Self(path);
            for child in ["user", "pty", "system", "own"] {
                fs::create_dir(group.0.join(child)).ok()?;
            }
            Some(group)
        }

        fn freezer(&self) -> Freezer {
            Freezer::of_parent(File::open(self.0.join("user")).unwrap().as_fd(), "init").unwrap()
        }

        fn is_frozen(&self, child: &str) -> bool {
            fs::read_to_string(self.0.join(child).join("cgroup.events")).unwrap().contains("frozen 1")
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = fs::write(self.0.join("cgroup.kill"), "1");
            for child in ["user", "pty", "system", "own"] {
                let path = self.0.join(child);
                for _ in 0..1000 {
                    match fs::remove_dir(&path) {
                        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => std::thread::yield_now(),
                        _ => break,
                    }
                }
            }
            let _ = fs::remove_dir(&self.0);
        }
    }

    fn sleeper(group: &Group, child: &str) -> Child {
        let child_process = Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(group.0.join(child).join("cgroup.procs"), child_process.id().to_string()).unwrap();
        child_process
    }

    #[test]
    fn all_but_the_agents_own_are_frozen_and_the_tenants_own_freeze_stays() {
        let Some(group) = Group::new() else {
            eprintln!("SKIPPED: needs root and a mounted cgroup2");
            return;
        };
        let mut children = ["user", "system", "own"].map(|child| sleeper(&group, child));
        fs::write(group.0.join("own/cgroup.freeze"), "1").unwrap();
        let freezer = group.freezer();
        freezer.freeze(Duration::from_secs(60)).unwrap();
        assert!(group.is_frozen("user") && group.is_frozen("pty") && !group.is_frozen("system"));
        freezer.thaw().unwrap();
        assert!(!group.is_frozen("pty") && !group.is_frozen("system"));
        assert_eq!(fs::read_to_string(group.0.join("user/cgroup.freeze")).unwrap(), "0\n");
        assert_eq!(fs::read_to_string(group.0.join("own/cgroup.freeze")).unwrap(), "1\n");
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
