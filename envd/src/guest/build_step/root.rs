//! The command's root: the overlay, the kernel's file systems, and the step's mounts.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envd_proto::boot::Profile;
use envd_proto::build::{Mount, Step, What};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, mount, mount_change, mount_remount,
    move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use super::named;
use super::outside::{Inside, is_directory, relative};
use crate::guest::profile;

/// The files of `/dev` (Documentation/admin-guide/devices.txt), as every container has them.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Where files in memory are made. Hidden in the end.
const FILES: &str = "/dev/shm";

/// Makes the overlay the root of the calling process, which has a mount namespace of its own, and mounts the rest.
pub(super) fn enter(step: &Step, inside: &Inside) -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    pivot(&inside.root)?;
    new("proc", "/proc", MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV, "")?;
    devices()?;
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    new("sysfs", "/sys", quiet | MountFlags::RDONLY, "")?;
    // In the order of the step: a later one may be below an earlier one.
    for (number, (wanted, source)) in step.mounts.iter().zip(&inside.sources).enumerate() {
        one(number, wanted, source.as_ref()).map_err(named(format!("the mount {}", wanted.target)))?;
    }
    // Over the files that were made there, which their mounts keep.
    new("tmpfs", "/dev/shm", quiet, "mode=1777,size=65536k")?;
    for path in profile::masked_paths(Profile::Restricted) {
        mask(&path).map_err(named(&path))?;
    }
    for path in profile::read_only_paths(Profile::Restricted) {
        if Path::new(&path).exists() {
            mount(&path, &path, "", MountFlags::BIND | MountFlags::REC, None::<&std::ffi::CStr>)?;
            mount_remount(&path, MountFlags::BIND | MountFlags::RDONLY | quiet, "")?;
        }
    }
    Ok(())
}

/// The root before is nowhere any more.
fn pivot(root: &Path) -> io::Result<()> {
    let old = open("/", OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    chdir(root)?;
    pivot_root(".", ".").map_err(|error| named("the step's root")(error.into()))?;
    fchdir(&old)?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

fn new(kind: &str, at: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = CString::new(options).map_err(io::Error::other)?;
    mount(kind, at, kind, flags, options.as_c_str())
        .map_err(|error| named(format!("mounting {kind} at {at}"))(error.into()))
}

fn devices() -> io::Result<()> {
    new("tmpfs", "/dev", MountFlags::NOSUID | MountFlags::STRICTATIME, "mode=755,size=65536k")?;
    for (name, major, minor) in DEVICES {
        let node = Path::new("/dev").join(name);
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(major, minor))?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
    }
    for (target, name) in LINKS {
        symlink(target, Path::new("/dev").join(name))?;
    }
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    for folder in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        fs::create_dir(folder)?;
    }
    new("devpts", "/dev/pts", quiet, "newinstance,ptmxmode=0666,mode=0620,gid=5")?;
    new("mqueue", "/dev/mqueue", quiet | MountFlags::NODEV, "")?;
    // Scripts are executed from there.
    new("tmpfs", FILES, MountFlags::NOSUID | MountFlags::NODEV, "mode=700")
}

/// One mount of the step.
fn one(number: usize, wanted: &Mount, source: Option<&OwnedFd>) -> io::Result<()> {
    let target = Path::new("/").join(relative(&wanted.target)?);
    match (&wanted.what, source) {
        (What::Tmpfs { size }, _) => {
            point(&target, true)?;
            let options = size.map(|size| format!("size={size}")).unwrap_or_default();
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            return new("tmpfs", &wanted.target, flags, &options);
        }
        (What::File { contents, mode, uid, gid }, _) => {
            let file = Path::new(FILES).join(number.to_string());
            let bytes = BASE64.decode(contents).map_err(io::Error::other)?;
            File::options().write(true).create_new(true).mode(0o600).open(&file)?.write_all(&bytes)?;
            chown(&file, Some(*uid), Some(*gid))?;
            fs::set_permissions(&file, fs::Permissions::from_mode(*mode))?;
            point(&target, false)?;
            mount(&file, &target, "", MountFlags::BIND, None::<&std::ffi::CStr>)?;
        }
        (_, Some(source)) => {
            point(&target, is_directory(source)?)?;
            move_mount(source, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        }
        (_, None) => return Err(io::Error::other("there is nothing to show")),
    }
    if wanted.read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        mount_remount(&target, flags, "")?;
    }
    Ok(())
}

/// The mount point, where it is below another mount and was not made before.
fn point(target: &Path, is_directory: bool) -> io::Result<()> {
    if target.exists() {
        return Ok(());
    }
    if is_directory {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    File::options().write(true).create_new(true).open(target).map(drop)
}

/// Shows nothing there.
fn mask(path: &str) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => new("tmpfs", path, MountFlags::RDONLY, "size=0"),
        Ok(_) => Ok(mount("/dev/null", path, "", MountFlags::BIND, None::<&std::ffi::CStr>)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
