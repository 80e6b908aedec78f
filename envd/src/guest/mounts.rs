//! The machine's file systems.
//!
//! ```text
//!                       from the guest image          init= of a disk              a service
//! /                     tmpfs, the agent's own        the disk                     the machine's
//! /run/envd-box/image   ext4, read-only, shared       the disk again, or envd.rootfs
//! /run/envd-box/scratch ext4: upper/, work/, volumes/ the same, where there is one
//! /run/envd-box/rootfs  the overlay of the two        that, or the image itself    a directory
//! ```
//!
//! The last is the container's root.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use envd_proto::boot::{ROOTFS_SERIAL, SCRATCH_SERIAL};
use envd_sys::{Device, DeviceKind};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_move,
    mount_remount, unmount,
};

const ROOTFS: &str = "/run/envd-box/image";
/// Where the writable disk is, in the agent's own mounts.
pub(crate) const SCRATCH: &str = "/run/envd-box/scratch";

/// Where the container's bundle is: config.json and rootfs/.
pub(super) const BUNDLE: &str = "/run/envd-box";

/// The container's root.
pub(super) const BOX_ROOT: &str = "/run/envd-box/rootfs";

/// Where the cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// `CGROUP2_SUPER_MAGIC`.
const CGROUP2: u64 = 0x6367_7270;

/// The file systems that a kernel gives for nothing.
const EARLY: [(&str, &str, &str, &str); 3] = [
    ("devtmpfs", "/dev", "devtmpfs", "mode=0755"),
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
];

/// What else an init mounts.
const LATE: [(&str, &str, MountFlags, &str); 3] = [
    ("/dev/pts", "devpts", MountFlags::NOSUID.union(MountFlags::NOEXEC), "mode=0620,ptmxmode=0666"),
    ("/run", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=0755"),
    ("/sys/fs/cgroup", "cgroup2", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC), ""),
];

/// The file systems that a kernel unpacks an initramfs to (`linux/magic.h`).
const INITRAMFS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// What the machine was started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The guest image: the root is in memory and has nothing but the agent.
    GuestImage,
    /// A disk that is somebody's root file system.
    Disk,
}

impl Origin {
    /// Finds out by the root's file system.
    pub(super) fn detect() -> io::Result<Self> {
        let kind = rustix::fs::statfs("/")?.f_type as u64;
        Ok(if INITRAMFS.contains(&kind) { Self::GuestImage } else { Self::Disk })
    }
}

/// Names the mount in the error.
fn mounted(what: &str, at: &str, result: rustix::io::Result<()>) -> io::Result<()> {
    result.map_err(|error| named(format!("mounting {what} at {at}"), error.into()))
}

fn named(what: String, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn mount_new(source: &str, at: &str, kind: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    make_directory(at)?;
    let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
    mounted(&format!("{kind} ({source})"), at, mount(source, at, kind, flags, data.as_c_str()))
}

fn make_directory(at: &str) -> io::Result<()> {
    fs::create_dir_all(at).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => {
                "; `rootfs-tools bake` makes the mount points, or boot with `rw`"
            }
            _ => "",
        };
        io::Error::new(error.kind(), format!("making {at}: {error}{hint}"))
    })
}

/// Whether something is mounted at a path: it is then on another file system than the directory that it is in.
fn is_mounted(at: &str) -> bool {
    let device = |path: &str| fs::metadata(path).map(|found| found.dev()).ok();
    device(at).is_some_and(|own| device(&format!("{at}/..")) != Some(own))
}

pub(super) fn early() -> io::Result<()> {
    for (source, at, kind, data) in EARLY {
        let flags =
            if kind == "devtmpfs" { MountFlags::NOSUID } else { MountFlags::NOSUID | MountFlags::NODEV };
        match mount_new(source, at, kind, flags, data) {
            // CONFIG_DEVTMPFS_MOUNT may have been quicker.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            result => result?,
        }
    }
    Ok(())
}

/// pivot_root cannot leave an initramfs, so the agent goes to a tmpfs before the container runtime wants to pivot.
pub(super) fn switch_root() -> io::Result<()> {
    const NEW: &str = "/newroot";
    mount_new("tmpfs", NEW, "tmpfs", MountFlags::NOSUID, "mode=0755")?;
    for (_, at, ..) in EARLY {
        let to = format!("{NEW}{at}");
        fs::create_dir_all(&to)?;
        mounted(at, &to, mount_move(at, &to))?;
    }
    std::env::set_current_dir(NEW)?;
    mounted(NEW, "/", mount_move(".", "/"))?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    mounted("the root", "/", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
    LATE.into_iter().try_for_each(|(at, kind, flags, data)| mount_new(kind, at, kind, flags, data))
}

/// On a disk that is somebody's root: what is missing, since an initramfs of theirs may have been here first.
pub(super) fn missing() -> io::Result<()> {
    for (source, at, kind, data) in EARLY {
        if !is_mounted(at) {
            let flags =
                if kind == "devtmpfs" { MountFlags::NOSUID } else { MountFlags::NOSUID | MountFlags::NODEV };
            mount_new(source, at, kind, flags, data)?;
        }
    }
    mounted("the root", "/", mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC))?;
    for (at, kind, flags, data) in LATE {
        if !is_mounted(at) {
            mount_new(kind, at, kind, flags, data)?;
        }
    }
    // Without a container, programs find here what every init gives them.
    if !is_mounted("/dev/shm") {
        mount_new("tmpfs", "/dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;
    }
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        match std::os::unix::fs::symlink(format!("/proc/self/{target}"), format!("/dev/{name}")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(named(format!("making /dev/{name}"), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Shows a directory at another place, without what is mounted in it.
fn bind(from: &str, at: &str) -> io::Result<()> {
    make_directory(at)?;
    mounted(from, at, mount_bind(from, at))
}

/// The root that the machine runs from, as the image of the container.
pub(super) fn own_root() -> io::Result<()> {
    bind("/", ROOTFS)
}

/// The container's root without a scratch disk: the image itself.
pub(super) fn bare() -> io::Result<()> {
    bind(ROOTFS, BOX_ROOT)
}

/// For a service: mounts of its own from here on, which nobody else sees. `directory` is the container's root, `cgroup` of
/// the version 2 tree at `tree` is what the agent takes for the root of the cgroups.
pub(super) fn for_service(directory: &Path, cgroup: &Path) -> io::Result<()> {
    mounted("the cgroups", CGROUPS, mount_bind(cgroup, CGROUPS))?;
    mount_new("tmpfs", BUNDLE, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0700")?;
    make_directory(BOX_ROOT)?;
    mounted(&directory.display().to_string(), BOX_ROOT, mount_bind(directory, BOX_ROOT))
}

/// A mount namespace of the process's own: the machine's changes come in, its own go nowhere. Call it with one thread.
pub(super) fn leave_the_machines() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mounted("the root", "/", mount_change("/", flags))
}

/// Where the version 2 cgroups are, mounted there if they are nowhere. For a process with mounts of its own.
pub(super) fn cgroup_tree() -> io::Result<&'static str> {
    for at in [CGROUPS, "/sys/fs/cgroup/unified"] {
        if rustix::fs::statfs(at).is_ok_and(|found| found.f_type as u64 == CGROUP2) {
            return Ok(at);
        }
    }
    mount_new("cgroup2", BUNDLE, "cgroup2", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, "")?;
    Ok(BUNDLE)
}

pub(super) fn rootfs(device: Option<&str>) -> io::Result<()> {
    let device = match device {
        Some(device) => device.to_owned(),
        None => disk(ROOTFS_SERIAL)?.map_err(no_disk(ROOTFS_SERIAL))?,
    };
    mount_new(&device, ROOTFS, "ext4", MountFlags::RDONLY | MountFlags::NODEV, "").map_err(|error| {
        // The kernel says only EINVAL or EUCLEAN; what it thinks of the superblock is in its log.
        io::Error::new(error.kind(), format!("{error}; the disk is no whole ext4: make the template again"))
    })
}

/// Mounts the writable disk; false when none is named and `optional` there is none.
pub(super) fn scratch(device: Option<&str>, optional: bool) -> io::Result<bool> {
    let device = match (device, optional) {
        (Some(device), _) => device.to_owned(),
        (None, optional) => match disk(SCRATCH_SERIAL)? {
            Ok(device) => device,
            Err(_) if optional => return Ok(false),
            Err(seen) => return Err(no_disk(SCRATCH_SERIAL)(seen)),
        },
    };
    // Without the second, a file that is renamed over another or truncated is sent to the disk at once. That is for machines
    // that come back after a crash, and this disk does not.
    let options = "errors=remount-ro,noauto_da_alloc";
    mount_new(&device, SCRATCH, "ext4", MountFlags::NOATIME, options)?;
    Ok(true)
}

pub(super) fn overlay() -> io::Result<()> {
    let (upper, work) = (format!("{SCRATCH}/upper"), format!("{SCRATCH}/work"));
    for folder in [&upper, &work] {
        fs::create_dir_all(folder)?;
    }
    // The root of the overlay has the mode and owner of the upper directory, which must be the image's.
    let image = fs::metadata(ROOTFS)?;
    fs::set_permissions(&upper, image.permissions())?;
    std::os::unix::fs::chown(
        &upper,
        Some(std::os::unix::fs::MetadataExt::uid(&image)),
        Some(std::os::unix::fs::MetadataExt::gid(&image)),
    )?;
    // index keeps hard links together on copy-up, redirect_dir lets directories of the image be renamed.
    let data = format!("lowerdir={ROOTFS},upperdir={upper},workdir={work},index=on,redirect_dir=on");
    mount_new("overlay", BOX_ROOT, "overlay", MountFlags::empty(), &data)
}

/// The disks below the box's file systems, each with the whole disk that a partition is of.
pub(super) fn disks() -> io::Result<Vec<Device>> {
    let mut disks = Vec::new();
    for at in [ROOTFS, SCRATCH, BOX_ROOT] {
        let number = match fs::metadata(at) {
            Ok(found) => found.dev(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(named(at.to_owned(), error)),
        };
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        // An overlay is on no device.
        if major == 0 {
            continue;
        }
        disks.push(Device { kind: DeviceKind::Block, major, minor: Some(minor) });
        let node = format!("/sys/dev/block/{major}:{minor}");
        if fs::exists(format!("{node}/partition"))? {
            let whole = fs::read_to_string(format!("{node}/../dev"))?;
            let numbers = whole
                .trim_end()
                .split_once(':')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            let (major, minor) =
                numbers.ok_or_else(|| io::Error::other(format!("{node}/../dev says '{whole}'")))?;
            disks.push(Device { kind: DeviceKind::Block, major, minor: Some(minor) });
        }
    }
    Ok(disks)
}

/// Device nodes of the image lead nowhere; those of the container are on file systems of its own.
pub(super) fn forbid_devices() -> io::Result<()> {
    mounted("without devices", BOX_ROOT, mount_remount(BOX_ROOT, MountFlags::BIND | MountFlags::NODEV, ""))
}

/// Undoes the box's mounts, so that the scratch disk is left whole. What is busy is left to the sync of the power-off.
pub(super) fn unmount_box() {
    for at in [BOX_ROOT, SCRATCH, ROOTFS] {
        if let Err(error) = unmount(at, UnmountFlags::empty())
            && !matches!(error, rustix::io::Errno::INVAL | rustix::io::Errno::NOENT)
        {
            crate::log::warn(format_args!("unmounting {at}: {error}"));
        }
    }
}

/// Leaves somebody's root whole: it may have no journal. What is still open for writing is left to the sync.
pub(super) fn settle_root() {
    if let Err(error) = mount_remount("/", MountFlags::RDONLY, "") {
        crate::log::warn(format_args!("making the root read-only before the end: {error}"));
    }
}

fn no_disk(serial: &str) -> impl FnOnce(String) -> io::Error {
    move |seen| {
        let message = format!("no virtio disk has the serial '{serial}'; disks with a serial: {seen}");
        io::Error::new(io::ErrorKind::NotFound, message)
    }
}

/// The disk with this serial, or those that were seen.
fn disk(serial: &str) -> io::Result<Result<String, String>> {
    let mut seen = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(found) = fs::read_to_string(entry.path().join("serial")) else { continue };
        if found.trim_end() == serial {
            return Ok(Ok(PathBuf::from("/dev").join(&name).display().to_string()));
        }
        seen.push(format!("{name} ({})", found.trim_end()));
    }
    Ok(Err(if seen.is_empty() { "none".to_owned() } else { seen.join(", ") }))
}
