//! Overlay mounts in a mount namespace of our own.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::sched::CloneFlags;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_change, move_mount,
    unmount,
};

use crate::error::{Error, at};
use crate::ids;

/// mount(2) takes one page of options, with its NUL.
const MAX_OPTIONS: usize = 4095;
/// Renames and attributes stay in the upper directory itself, so that it can become a layer, and lower directory of other
/// mounts, as it is. `volatile` leaves out the syncs that package managers ask for after each file: a layer is synced
/// once, as a whole.
const OPTIONS: &str = "index=off,redirect_dir=off,metacopy=off,xino=off";
/// In a user namespace nobody may write the attributes that overlayfs keeps its notes in by default. It does not follow
/// redirects then, and refuses to be told so.
const NAMESPACE_OPTIONS: &str = "index=off,metacopy=off,xino=off,userxattr";

/// The working directory belongs to the whole process, and mounts use it to keep paths short.
static WORKING_DIRECTORY: Mutex<()> = Mutex::new(());

/// Takes this process into a mount namespace of its own: whatever happens to it, no mount is left behind. Must be
/// called while the process has one thread.
pub(crate) fn isolate_mounts() -> Result<(), Error> {
    let root = Path::new("/");
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|errno| match errno {
        nix::errno::Errno::EPERM => Error::Invalid {
            what: "permissions".to_owned(),
            reason: "a build mounts overlays and runs containers, which this process may not".to_owned(),
        },
        _ => at(root)(errno),
    })?;
    mount_change(root, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at(root))
}

/// A mounted overlay; dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct Overlay {
    target: PathBuf,
}

/// Where an overlay's changes go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Upper<'a> {
    /// The directory that becomes the layer, relative to the base.
    pub(crate) upper: &'a Path,
    /// The kernel's own directory, on the same file system, relative to the base.
    pub(crate) work: &'a Path,
}

impl Overlay {
    /// Mounts at `target`. `lowers`, the highest first, and `upper` are relative to `base`, which keeps the options
    /// short: they hold some 110 layers.
    pub(crate) fn mount(
        base: &Path,
        lowers: &[PathBuf],
        upper: Option<Upper<'_>>,
        target: &Path,
    ) -> Result<Self, Error> {
        let lock = WORKING_DIRECTORY.lock();
        let _lock = lock.unwrap_or_else(|poisoned| poisoned.into_inner());
        let before = std::env::current_dir().map_err(at(Path::new(".")))?;
        std::env::set_current_dir(base).map_err(at(base))?;
        let result = mount_here(lowers, upper, target);
        std::env::set_current_dir(&before).map_err(at(&before))?;
        result.map_err(|errno| explain(errno, target))?;
        Ok(Self { target: target.to_owned() })
    }

    /// Unmounts, so that the upper directory is complete.
    pub(crate) fn unmount(self) -> Result<(), Error> {
        let target = self.target.clone();
        std::mem::forget(self);
        match unmount(&target, UnmountFlags::empty()) {
            // A process that outlived its step; it is being killed with its namespace.
            Err(Errno::BUSY) => unmount(&target, UnmountFlags::DETACH).map_err(at(&target)),
            other => other.map_err(at(&target)),
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = unmount(&self.target, UnmountFlags::DETACH);
    }
}

fn mount_here(lowers: &[PathBuf], upper: Option<Upper<'_>>, target: &Path) -> Result<(), Errno> {
    let base = if ids::are_limited() { NAMESPACE_OPTIONS } else { OPTIONS };
    let mut options = base.as_bytes().to_vec();
    let mut add = |key: &str, value: &[u8]| {
        options.extend_from_slice(format!(",{key}=").as_bytes());
        options.extend_from_slice(value);
    };
    let names: Vec<&[u8]> = lowers.iter().map(|lower| lower.as_os_str().as_bytes()).collect();
    add("lowerdir", &names.join(&b':'));
    if let Some(upper) = upper {
        add("upperdir", upper.upper.as_os_str().as_bytes());
        add("workdir", upper.work.as_os_str().as_bytes());
        options.extend_from_slice(b",volatile");
    }
    if options.len() <= MAX_OPTIONS {
        let options = CString::new(options).map_err(|_| Errno::INVAL)?;
        return mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str());
    }
    // Layers one by one: Linux 6.8 and later.
    let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in base.split(',') {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&overlay, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&overlay, option)?,
        }
    }
    for lower in lowers {
        fsconfig_set_string(&overlay, "lowerdir+", lower.as_path())?;
    }
    if let Some(upper) = upper {
        fsconfig_set_string(&overlay, "upperdir", upper.upper)?;
        fsconfig_set_string(&overlay, "workdir", upper.work)?;
        rustix::mount::fsconfig_set_flag(&overlay, "volatile")?;
    }
    fsconfig_create(&overlay)?;
    let mounted = fsmount(&overlay, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn explain(errno: Errno, target: &Path) -> Error {
    let reason = match errno {
        Errno::NODEV => "the kernel has no overlayfs (modprobe overlay)",
        Errno::PERM => "the kernel refuses this user the mount (in a user namespace it needs Linux 5.11)",
        Errno::INVAL => {
            "the kernel refuses the overlay: the data folder must be on a local file system such as ext4, xfs or \
             btrfs, not itself on an overlay (choose one with --data-dir); more than 110 layers need Linux 6.8"
        }
        _ => return at(target)(errno),
    };
    Error::Program { program: "mount -t overlay".to_owned(), reason: format!("{reason} ({errno})") }
}
