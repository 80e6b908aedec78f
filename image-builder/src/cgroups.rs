//! The control groups that hold a step to its limits.
//!
//! With cgroup v2 it is the group that libcontainer makes for the container. Where the controllers are mounted one by one
//! (v1, and the hybrid layout) libcontainer, which is built for v2, sees none of them: each gets a group of ours, made and
//! opened before libcontainer's view of `/sys/fs/cgroup` is arranged.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::limits::{CPU_PERIOD, StepLimits};

/// Where distributions mount them, and the only place where libcontainer looks.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The longest event file that is read.
const MAX_EVENTS: usize = 4096;

/// What this machine can hold steps to: for each controller the folder in which groups are made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Controllers {
    pub(crate) memory: Option<PathBuf>,
    pub(crate) cpu: Option<PathBuf>,
    pub(crate) pids: Option<PathBuf>,
    unified: bool,
    /// Why one is missing.
    pub(crate) why_not: String,
}

impl Controllers {
    /// Finds them by making groups.
    pub(crate) fn probe() -> Self {
        if is_unified() {
            return Self::probe_unified();
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let find = |name: &str| v1_folder(&mounts, &own, name).filter(|folder| can_make_group(folder));
        Self {
            memory: find("memory"),
            cpu: find("cpu"),
            pids: find("pids"),
            unified: false,
            why_not: "it has no cgroup controller for that, or none in which this user may make groups"
                .to_owned(),
        }
    }

    fn probe_unified() -> Self {
        let root = Path::new(ROOT);
        let none = |why_not: &str| Self { unified: true, why_not: why_not.to_owned(), ..Self::default() };
        for controller in ["+memory", "+cpu", "+pids"] {
            // One that is on already needs no permission; one that is off shows below.
            let _ = fs::write(root.join("cgroup.subtree_control"), controller);
        }
        let probe = root.join(format!("tiffin-probe-{}", std::process::id()));
        if fs::create_dir(&probe).is_err() {
            return none("this user may not make cgroups");
        }
        let has = |file: &str| probe.join(file).exists().then(|| root.to_owned());
        let found = Self {
            memory: has("memory.max"),
            cpu: has("cpu.max"),
            pids: has("pids.max"),
            unified: true,
            why_not: "its cgroup controller cannot be turned on".to_owned(),
        };
        let _ = fs::remove_dir(&probe);
        found
    }
}

/// Whether the one v2 hierarchy is where libcontainer looks.
pub(crate) fn is_unified() -> bool {
    // CGROUP2_SUPER_MAGIC
    rustix::fs::statfs(ROOT).is_ok_and(|stat| stat.f_type == 0x6367_7270)
}

/// The folder of this process's own group in the hierarchy of a v1 controller.
fn v1_folder(mountinfo: &str, own: &str, controller: &str) -> Option<PathBuf> {
    let mount = mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        let is_v1 = filesystem.next() == Some("cgroup");
        let has = filesystem.nth(1).is_some_and(|options| options.split(',').any(|name| name == controller));
        let mut fields = mount.split(' ').skip(3);
        (is_v1 && has).then(|| Some((fields.next()?, fields.next()?)))?
    });
    let (root, point) = mount?;
    let group = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next()?.split(',').any(|name| name == controller).then(|| fields.next())?
    });
    // In a container the mount shows a part of the hierarchy, and names of groups may be seen from elsewhere.
    let below = group.and_then(|group| group.strip_prefix(root.trim_end_matches('/'))).unwrap_or_default();
    let folder = Path::new(point).join(below.trim_start_matches('/'));
    if folder.is_dir() { Some(folder) } else { Some(PathBuf::from(point)) }
}

fn can_make_group(folder: &Path) -> bool {
    let probe = folder.join(format!("tiffin-probe-{}", std::process::id()));
    match fs::create_dir(&probe) {
        Ok(()) => fs::remove_dir(&probe).is_ok(),
        Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
    }
}

/// The groups of one step. Dropping it removes those that are ours; they must be empty.
#[derive(Debug)]
pub(crate) struct Groups {
    id: String,
    unified: bool,
    memory: Option<Group>,
    cpu: Option<Group>,
    pids: Option<Group>,
}

#[derive(Debug)]
struct Group {
    parent: OwnedFd,
    /// Opened when it is there.
    folder: Option<OwnedFd>,
}

impl Groups {
    /// Opens the folders for groups with that name. Call it before the view of `/sys/fs/cgroup` changes.
    pub(crate) fn open(
        id: &str,
        controllers: &Controllers,
        limits: &StepLimits,
    ) -> Result<Self, (PathBuf, Errno)> {
        let open = |needed: bool, folder: &Option<PathBuf>| {
            let Some(folder) = folder.as_ref().filter(|_| needed) else { return Ok(None) };
            let parent = open_folder(CWD, folder).map_err(|errno| (folder.clone(), errno))?;
            if !controllers.unified {
                match mkdirat(&parent, id, Mode::from_raw_mode(0o755)) {
                    // Two controllers of one hierarchy have one group.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err((folder.clone(), errno)),
                }
            }
            Ok(Some(Group { parent, folder: None }))
        };
        Ok(Self {
            id: id.to_owned(),
            unified: controllers.unified,
            memory: open(limits.memory.is_some(), &controllers.memory)?,
            cpu: open(limits.cpus.is_some(), &controllers.cpu)?,
            pids: open(limits.pids.number().is_some(), &controllers.pids)?,
        })
    }

    /// Holds the process, and whatever it starts, to the limits. With v2 libcontainer has made the group, and put the
    /// process in.
    pub(crate) fn limit(&mut self, pid: i32, limits: &StepLimits) -> Result<(), String> {
        let unified = self.unified;
        for group in [&mut self.memory, &mut self.cpu, &mut self.pids].into_iter().flatten() {
            let folder = open_folder(&group.parent, &self.id)
                .map_err(|errno| format!("cgroup {}: {errno}", self.id))?;
            group.folder = Some(folder);
        }
        if let (Some(group), Some(memory)) = (&self.memory, limits.memory) {
            let memory = memory.to_string();
            if unified {
                group.write("memory.max", &memory)?;
                // Without swap accounting there is no such file.
                let _ = group.write("memory.swap.max", "0");
                let _ = group.write("memory.oom.group", "1");
            } else {
                group.write("memory.limit_in_bytes", &memory)?;
                let _ = group.write("memory.memsw.limit_in_bytes", &memory);
            }
        }
        if let (Some(group), Some(cpus)) = (&self.cpu, limits.cpus) {
            if unified {
                group.write("cpu.max", &format!("{} {CPU_PERIOD}", cpus.0))?;
            } else {
                group.write("cpu.cfs_period_us", &CPU_PERIOD.to_string())?;
                group.write("cpu.cfs_quota_us", &cpus.0.to_string())?;
            }
        }
        if let (Some(group), Some(pids)) = (&self.pids, limits.pids.number()) {
            group.write("pids.max", &pids.to_string())?;
        }
        if !unified {
            for group in [&self.memory, &self.cpu, &self.pids].into_iter().flatten() {
                group.write("cgroup.procs", &pid.to_string())?;
            }
        }
        Ok(())
    }

    /// Whether the kernel killed something because the memory was used up.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        let file = if self.unified { "memory.events" } else { "memory.oom_control" };
        let Some(text) = self.memory.as_ref().and_then(|group| group.read(file)) else { return false };
        text.lines()
            .any(|line| line.split_once(' ').is_some_and(|(key, count)| key == "oom_kill" && count != "0"))
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if !self.unified {
            for group in [&self.memory, &self.cpu, &self.pids].into_iter().flatten() {
                let _ = unlinkat(&group.parent, self.id.as_str(), AtFlags::REMOVEDIR);
            }
        }
    }
}

impl Group {
    fn write(&self, file: &str, value: &str) -> Result<(), String> {
        let fail = |errno| format!("cgroup: cannot write {value} to {file}: {errno}");
        let folder = self.folder.as_ref().ok_or_else(|| fail(Errno::NOENT))?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(folder, file, flags, Mode::empty()).map_err(fail)?;
        rustix::io::write(file, value.as_bytes()).map_err(fail)?;
        Ok(())
    }

    fn read(&self, file: &str) -> Option<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(self.folder.as_ref()?, file, flags, Mode::empty()).ok()?;
        let mut text = vec![0; MAX_EVENTS];
        let length = rustix::io::read(file, &mut text[..]).ok()?;
        text.truncate(length);
        String::from_utf8(text).ok()
    }
}

fn open_folder<P: rustix::path::Arg>(base: impl std::os::fd::AsFd, path: P) -> Result<OwnedFd, Errno> {
    openat(base, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_v1_controllers_are_found() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n\
                      31 30 0:27 / /nowhere/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                      32 30 0:28 /docker/x /nowhere/memory rw - cgroup cgroup rw,memory\n\
                      33 30 0:29 / /nowhere/unified rw - cgroup2 cgroup2 rw\n";
        let own = "5:memory:/docker/x\n4:cpu,cpuacct:/a/b\n0::/\n";
        assert_eq!(v1_folder(mounts, own, "cpu"), Some("/nowhere/cpu,cpuacct".into()));
        assert_eq!(v1_folder(mounts, own, "memory"), Some("/nowhere/memory".into()));
        assert_eq!(v1_folder(mounts, own, "pids"), None);
    }

    /// Plain files in the place of a kernel's: what is written where.
    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let limits = StepLimits {
            memory: Some(64 << 20),
            cpus: "1.5".parse().ok(),
            pids: "50".parse().unwrap(),
            ..StepLimits::default()
        };
        let v2 = [("memory.max", "67108864"), ("cpu.max", "150000 100000"), ("pids.max", "50")];
        let v1 = [
            ("memory.limit_in_bytes", "67108864"),
            ("cpu.cfs_quota_us", "150000"),
            ("cpu.cfs_period_us", "100000"),
            ("pids.max", "50"),
            ("cgroup.procs", "7"),
        ];
        for (unified, expected) in [(true, &v2[..]), (false, &v1[..])] {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("id");
            fs::create_dir(&folder).unwrap();
            for (file, _) in expected {
                fs::write(folder.join(file), "").unwrap();
            }
            let events = if unified { "memory.events" } else { "memory.oom_control" };
            fs::write(folder.join(events), "low 0\noom_kill 0\n").unwrap();
            let place = Some(dir.path().to_owned());
            let controllers = Controllers {
                memory: place.clone(),
                cpu: place.clone(),
                pids: place,
                unified,
                why_not: String::new(),
            };
            let mut groups = Groups::open("id", &controllers, &limits).unwrap();
            groups.limit(7, &limits).unwrap();
            for (file, value) in expected {
                assert_eq!(fs::read_to_string(folder.join(file)).unwrap(), *value, "{file}");
            }
            assert!(!groups.ran_out_of_memory());
            fs::write(folder.join(events), "low 0\noom_kill 2\n").unwrap();
            assert!(groups.ran_out_of_memory());
        }
    }
}
