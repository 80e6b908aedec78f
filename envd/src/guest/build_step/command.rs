//! The command's own process, from the fork to the exec.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use envd_proto::boot::Profile;
use envd_proto::build::Step;
use envd_sys::SeccompFilter;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, chdir, setrlimit, setsid, umask};

use super::cgroup::Cgroup;
use super::outside::Inside;
use super::{named, root};
use crate::guest::enter::limit_capabilities;
use crate::guest::runtime_spec::OPEN_FILES_SOFT;
use crate::guest::{OPEN_FILES_HARD, profile};

/// Becomes the command; returns only why not.
pub(super) fn become_command(
    step: &Step,
    inside: &Inside,
    filter: &SeccompFilter,
    cgroup: &Cgroup,
) -> io::Error {
    match settle(step, inside, filter, cgroup).and_then(|()| execute(step)) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn settle(step: &Step, inside: &Inside, filter: &SeccompFilter, cgroup: &Cgroup) -> io::Result<()> {
    cgroup.enter()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
    nix::unistd::sethostname(&step.hostname)?;
    setsid()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    // The command may open them again by /dev/stdout, which asks for their owner.
    let owner = Some(rustix::fs::Uid::from_raw(step.uid));
    let _ = rustix::fs::fchown(io::stdout(), owner, None);
    let _ = rustix::fs::fchown(io::stderr(), owner, None);
    root::enter(step, inside)?;
    umask(Mode::from_raw_mode(0o022));
    let workdir = Path::new(&step.workdir);
    fs::create_dir_all(workdir).map_err(named(format!("the working directory {}", step.workdir)))?;
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES_SOFT), maximum: Some(OPEN_FILES_HARD) })?;
    fs::write("/proc/self/oom_score_adj", "0")?;
    // While there is the privilege for it: without, setuid programs would lose theirs.
    filter.apply_privileged()?;
    if let Some(keep) = profile::capability_set(Profile::Restricted) {
        limit_capabilities(keep)?;
    }
    let groups: Vec<Gid> = step.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)?;
    setgid(Gid::from_raw(step.gid))?;
    setuid(Uid::from_raw(step.uid))?;
    chdir(workdir).map_err(|error| named(format!("the working directory {}", step.workdir))(error.into()))
}

/// Executes the command, looked for in its own PATH.
fn execute(step: &Step) -> io::Result<std::convert::Infallible> {
    let (program, arguments) = step.argv.split_first().ok_or_else(|| io::Error::other("no command"))?;
    let path = match program.contains('/') {
        true => PathBuf::from(program),
        false => find(program, step)?,
    };
    let error = Command::new(&path)
        .arg0(program)
        .args(arguments)
        .env_clear()
        .envs(step.env.iter().map(|(name, value)| (name, value)))
        .exec();
    Err(named(format!("cannot execute {}", path.display()))(error))
}

fn find(program: &str, step: &Step) -> io::Result<PathBuf> {
    let path = step.env.iter().rev().find(|(name, _)| name == "PATH").map_or("", |(_, value)| value);
    let found = path
        .split(':')
        .map(|folder| Path::new(folder).join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file());
    found.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("cannot execute {program}: it is not in PATH ({path})"),
        )
    })
}
