//! Where steps run: which way this user has on this machine, found by trying.
//!
//! ```text
//! as root                                   mount namespace
//! as a user, with ids of its own            user namespace: root and a range of users     newuidmap, /etc/subuid
//! as a user, without                        user namespace: root alone
//! where user namespaces are forbidden       a virtual machine
//! ```
//!
//! A namespace is entered by the whole program before it has threads, so that unpacking and copying see the same owners as
//! the steps. A way that might fail half-way is first tried by another process.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountFlags, mount};
use template::DataDir;

use crate::console::Console;
use crate::error::{Error, at};
use crate::ids;

use crate::layers;
use crate::overlay::{Overlay, Upper, isolate_mounts};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// The first that works.
    #[default]
    Auto,
    /// Containers on this machine.
    Container,
    /// A virtual machine.
    Vm,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// Containers, as root of this machine.
    Root,
    /// Containers in a user namespace.
    Namespace(UserNamespace),
    /// A virtual machine.
    Vm {
        /// What was tried before, each with its reason; empty where it was asked for.
        tried: Vec<String>,
    },
}

/// The kinds of user namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserNamespace {
    /// The user is root; the ranges of `/etc/subuid` and `/etc/subgid` are everybody else.
    Range,
    /// The user is root, and nobody else exists.
    OneId,
}

impl UserNamespace {
    /// The word for it between processes.
    fn word(self) -> &'static str {
        match self {
            Self::Range => "range",
            Self::OneId => "one-id",
        }
    }
}

impl fmt::Display for UserNamespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Range => "containers in a user namespace, with the ids of /etc/subuid",
            Self::OneId => {
                "containers in a user namespace with one id: files of all owners belong to root there"
            }
        })
    }
}

/// Finds the way, says which on one line, and goes there. Must be called while the process has one thread. `program` is this
/// one, which is started again to try.
pub fn enter(wanted: Isolation, data: &DataDir, program: &Path, console: &Console) -> Result<Chosen, Error> {
    if wanted == Isolation::Vm {
        return Ok(Chosen::Vm { tried: Vec::new() });
    }
    let mut tried = Vec::new();
    if nix::unistd::geteuid().is_root() {
        match isolate_mounts() {
            Ok(()) => {
                let whose = if ids::are_limited() { "root of this user namespace" } else { "root" };
                console.line(&format!("isolation: containers, as {whose}"));
                return Ok(Chosen::Root);
            }
            Err(error) => tried.push(format!("containers as root: {error}")),
        }
    } else {
        tried.push("containers as root: this user is not root".to_owned());
    }
    let folder = data.cache();
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    for kind in [UserNamespace::Range, UserNamespace::OneId] {
        match try_elsewhere(kind, &folder, program) {
            Ok(()) => {
                enter_user_namespace(kind, program).map_err(|reason| refused(&[reason]))?;
                isolate_mounts()?;
                console.line(&format!("isolation: {kind}"));
                return Ok(Chosen::Namespace(kind));
            }
            Err(reason) => tried.push(format!("{kind}: {reason}")),
        }
    }
    match wanted {
        Isolation::Container => Err(refused(&tried)),
        _ => {
            console.line("isolation: a virtual machine, because containers do not work here:");
            tried.iter().for_each(|way| console.line(&format!("  - {way}")));
            Ok(Chosen::Vm { tried })
        }
    }
}

/// Goes where this user's unpacked layers and caches can be removed: those of a range of ids belong to users that only
/// exist in its namespace, and `rm -rf` cannot remove what they own. As root, or without such files, nothing is to be done.
/// Must be called while the process has one thread.
pub fn enter_to_remove(data: &DataDir, program: &Path) -> Result<(), Error> {
    if nix::unistd::geteuid().is_root() || !layers::are_of_others(&data.cache()) {
        return Ok(());
    }
    enter_user_namespace(UserNamespace::Range, program).map_err(|reason| Error::Invalid {
        what: data.cache().display().to_string(),
        reason: format!(
            "it holds files of this user's subordinate ids, and their namespace cannot be entered: {reason}"
        ),
    })
}

fn refused(tried: &[String]) -> Error {
    let ways: String = tried.iter().map(|way| format!("\n  - {way}")).collect();
    Error::Invalid {
        what: "--isolation container".to_owned(),
        reason: format!(
            "steps cannot run in containers here:{ways}\nrun the build as root, install uidmap and give this user ranges in \
             /etc/subuid and /etc/subgid, or use --isolation vm"
        ),
    }
}

/// Another process goes there and does what a step needs.
fn try_elsewhere(kind: UserNamespace, folder: &Path, program: &Path) -> Result<(), String> {
    let output = Command::new(program)
        .args(["try-isolation", kind.word()])
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let text = String::from_utf8_lossy(&output.stderr);
            let text = text.trim();
            Err(if text.is_empty() { format!("it ended with {}", output.status) } else { text.to_owned() })
        }
    }
}

/// The other side of [`enter`]'s trying: `image-builder try-isolation`. Says on stderr why it does not work.
pub fn try_isolation(word: &str, folder: &Path, program: &Path) -> Result<(), String> {
    let kind = match word {
        "range" => UserNamespace::Range,
        "one-id" => UserNamespace::OneId,
        "proc" => return mount_proc(folder),
        _ => return Err(format!("unknown way {word}")),
    };
    enter_user_namespace(kind, program)?;
    isolate_mounts().map_err(|error| format!("a mount namespace: {error}"))?;
    let scratch = tempfile::Builder::new().prefix(".try-").tempdir_in(folder);
    let scratch = scratch.map_err(|error| format!("{}: {error}", folder.display()))?;
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(scratch.path().join(name)).map_err(|error| error.to_string())?;
    }
    let target = scratch.path().join("merged");
    let upper = Upper { upper: Path::new("upper"), work: Path::new("work") };
    let overlay = Overlay::mount(scratch.path(), &[PathBuf::from("lower")], Some(upper), &target)
        .map_err(|error| error.to_string())?;
    overlay.unmount().map_err(|error| error.to_string())?;
    // The next process that is started is the first one of the new PID namespace.
    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| format!("a PID namespace: {errno}"))?;
    let child = Command::new(program).args(["try-isolation", "proc"]).arg(&target).output();
    let child = child.map_err(|error| format!("a process in a PID namespace: {error}"))?;
    match child.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&child.stderr).trim().to_owned()),
    }
}

fn mount_proc(target: &Path) -> Result<(), String> {
    // So that it is gone with this process.
    isolate_mounts().map_err(|error| format!("a mount namespace: {error}"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", target, "proc", flags, None).map_err(|errno| {
        format!("mounting /proc: {errno} (in a container that hides parts of it, it is refused)")
    })
}

fn enter_user_namespace(kind: UserNamespace, program: &Path) -> Result<(), String> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    match kind {
        UserNamespace::Range => {
            let uids = id_map(uid.as_raw(), &ranges("/etc/subuid")?);
            let gids = id_map(gid.as_raw(), &ranges("/etc/subgid")?);
            // newuidmap works from outside of the namespace, so it is prepared before and let go after.
            let mut mapper = Command::new(program)
                .args(["map-ids", &std::process::id().to_string(), &uids, &gids])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(|error| format!("{}: {error}", program.display()))?;
            let entered = new_user_namespace();
            // Without a byte it does nothing.
            if let (Ok(()), Some(mut stdin)) = (&entered, mapper.stdin.take()) {
                stdin.write_all(b"\n").map_err(|error| error.to_string())?;
            }
            let output = mapper.wait_with_output().map_err(|error| error.to_string())?;
            entered?;
            match output.status.success() {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            }
        }
        UserNamespace::OneId => {
            new_user_namespace()?;
            let write = |file: &str, text: &str| {
                fs::write(format!("/proc/self/{file}"), text)
                    .map_err(|error| format!("/proc/self/{file}: {error}"))
            };
            // Without it a user could give up a group that keeps it from something.
            write("setgroups", "deny")?;
            write("uid_map", &format!("0 {uid} 1"))?;
            write("gid_map", &format!("0 {gid} 1"))
        }
    }
}

fn new_user_namespace() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| match errno {
        Errno::EPERM => {
            "the kernel refuses a user namespace (a seccomp filter as in Docker's containers, a chroot, \
                         or kernel.unprivileged_userns_clone=0)"
                .to_owned()
        }
        Errno::ENOSPC => "no user namespace is left (user.max_user_namespaces)".to_owned(),
        errno => format!("a user namespace: {errno}"),
    })
}

/// The rest of [`enter`]: `image-builder map-ids`, which waits for a byte and then gives that process its ids.
pub fn map_ids(pid: u32, uids: &str, gids: &str) -> Result<(), String> {
    let mut byte = [0];
    if !matches!(io::stdin().read(&mut byte), Ok(1)) {
        return Ok(());
    }
    for (program, map) in [("newuidmap", uids), ("newgidmap", gids)] {
        let output = Command::new(program).arg(pid.to_string()).args(map.split(' ')).output();
        let output = output.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("{program} is not installed (Debian package uidmap)"),
            _ => format!("{program}: {error}"),
        })?;
        if !output.status.success() {
            return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
    }
    Ok(())
}

/// This user's lines of `/etc/subuid` or `/etc/subgid`: first id and count.
fn ranges(file: &str) -> Result<Vec<(u32, u32)>, String> {
    let uid = nix::unistd::geteuid();
    let name = nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.name);
    let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    let found = parse_ranges(&text, name.as_deref(), uid.as_raw());
    if found.is_empty() {
        let name = name.unwrap_or_else(|| uid.to_string());
        return Err(format!("{file} gives {name} no ids"));
    }
    Ok(found)
}

fn parse_ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<(u32, u32)> {
    let line = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let ours = Some(owner) == name || owner == uid.to_string();
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (ours && count > 0).then_some((first, count))
    };
    text.lines().filter_map(line).collect()
}

/// The arguments of newuidmap: inside, outside, count; root is the user itself.
fn id_map(own: u32, ranges: &[(u32, u32)]) -> String {
    let mut map = format!("0 {own} 1");
    let mut inside = 1u64;
    for (first, count) in ranges {
        map.push_str(&format!(" {inside} {first} {count}"));
        inside += u64::from(*count);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_user() {
        let text = "other:1:2\nci:100000:65536\n1000:300000:10\nci:x:1\nbroken\nci:5:0\n";
        let ranges = parse_ranges(text, Some("ci"), 1000);
        assert_eq!(ranges, [(100_000, 65_536), (300_000, 10)]);
        assert_eq!(id_map(1000, &ranges), "0 1000 1 1 100000 65536 65537 300000 10");
        assert_eq!(parse_ranges(text, None, 7), []);
    }
}
