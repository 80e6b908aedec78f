//! A container for an agent that is a service on somebody's machine.
//!
//! ```text
//! mount namespace of the service's own (the machine's mounts come in, its own go nowhere)
//!   /sys/fs/cgroup       ◄── the service's cgroup, or a child of it
//!   /run/envd-box        ◄── a tmpfs: bundle, state
//!   /run/envd-box/rootfs ◄── the directory that is the container's root
//! ```
//!
//! From there on it is what a microVM has, so all the rest is shared. Limits need a cgroup of the service's own
//! (`Delegate=yes` in a unit of systemd): one with no other process in it. Without it, cgroups only hold the container's
//! processes together, so that they can be frozen and ended.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use envd_proto::boot::{Init, Profile};
use rustix::fs::{AtFlags, unlinkat};

use super::container::{self, Choices};
use super::init::ContainerInit;
use super::runtime_spec::INIT_OOM_SCORE;
use super::{cgroups, mounts};
use crate::root::Root;
use crate::sandbox::Leaves;

/// A container of a service.
#[derive(Debug)]
pub(crate) struct ServiceContainer {
    init: ContainerInit,
    group: Group,
}

/// The cgroup that the service takes for the root of all.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    limits: bool,
    /// One that was made for it: the directory that it is in, and its name.
    made: Option<(File, String)>,
}

impl ServiceContainer {
    /// Makes the container with the root `directory`; gives the agent's end of the spawner's socket too. Call it in a
    /// process with one thread.
    pub(crate) fn create(directory: &Path, profile: Profile) -> io::Result<(Self, OwnedFd, Leaves)> {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
        let directory = fs::canonicalize(directory).map_err(named)?;
        if !directory.is_dir() {
            return Err(named(io::ErrorKind::NotADirectory.into()));
        }
        // The container's processes that lose their parent, and its PID 1, are this process's to reap.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        mounts::leave_the_machines()?;
        let group = Group::find()?;
        let created = Self::create_in(&group, &directory, profile);
        match created {
            Ok((init, spawner, leaves)) => Ok((Self { init, group }, spawner, leaves)),
            Err(error) => {
                cgroups::end_box(Duration::ZERO, None);
                group.remove();
                Err(error)
            }
        }
    }

    fn create_in(
        group: &Group,
        directory: &Path,
        profile: Profile,
    ) -> io::Result<(ContainerInit, OwnedFd, Leaves)> {
        mounts::for_service(directory, &group.path)?;
        match group.limits {
            true => cgroups::prepare()?,
            false => cgroups::prepare_without_limits()?,
        }
        let oom_score_adj = match cgroups::protect_agent() {
            Ok(()) => INIT_OOM_SCORE,
            Err(error) => {
                crate::log::warn(format_args!("no protection when memory runs out: {error}"));
                let own = fs::read_to_string("/proc/self/oom_score_adj")?;
                own.trim().parse().map_err(io::Error::other)?
            }
        };
        let choices = Choices { profile, init: Init::Envd, volumes: Vec::new(), oom_score_adj };
        let (init, spawner) = container::create(&choices)?;
        let spawner = spawner.ok_or_else(|| io::Error::other("a container without a spawner"))?;
        let leaves = cgroups::enter(Some(init.pid()), group.limits)?;
        Ok((init, spawner, leaves))
    }

    /// Where its paths live.
    pub(crate) fn root(&self) -> io::Result<Root> {
        Root::of_container(self.init.pid())
    }

    /// Waits for its end; says so.
    pub(crate) async fn ended(&self) -> io::Error {
        self.init.ended().await
    }

    /// Ends every process of it, those of clients with `grace`, and takes its cgroups away.
    pub(crate) fn end(self, grace: Duration) {
        cgroups::end_box(grace, Some(&self.init));
        self.group.remove();
    }
}

impl Group {
    /// Takes away what was made in it, and itself if it was made.
    fn remove(&self) {
        cgroups::remove_box();
        if let Some((parent, name)) = &self.made
            && let Err(error) = unlinkat(parent, name, AtFlags::REMOVEDIR)
        {
            crate::log::warn(format_args!("removing the cgroup {name}: {error}"));
        }
    }

    fn find() -> io::Result<Self> {
        let tree = mounts::cgroup_tree().map_err(|error| {
            io::Error::new(error.kind(), format!("a container needs cgroups of version 2: {error}"))
        })?;
        let text = fs::read_to_string("/proc/self/cgroup")?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let path = Path::new(tree).join(own.trim_start_matches('/'));
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let alone = read("cgroup.procs").trim() == std::process::id().to_string();
        let controllers = read("cgroup.controllers");
        let has = |name: &str| controllers.split_whitespace().any(|found| found == name);
        if alone && has("memory") && has("pids") {
            return Ok(Self { path, limits: true, made: None });
        }
        crate::log::warn(format_args!(
            "no cgroup of the service's own with memory and pids (Delegate=yes in its unit): the container has no limits"
        ));
        let named = |error: io::Error| io::Error::new(error.kind(), format!("cgroup {own}: {error}"));
        let parent = File::open(&path).map_err(named)?;
        let name = format!("envd-{}", std::process::id());
        let made = path.join(&name);
        fs::create_dir(&made).map_err(named)?;
        Ok(Self { path: made, limits: false, made: Some((parent, name)) })
    }
}
