//! The machine's file systems.
//!
//! ```text
//! /                 tmpfs, the agent's own
//! /disk/rootfs      ext4, read-only, shared by every sandbox of the template
//! /disk/scratch     ext4, this sandbox's: upper/ and work/ of the overlay, volumes/
//! /box/rootfs       the overlay: the container's root
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use envd_proto::boot::{ROOTFS_SERIAL, SCRATCH_SERIAL};
use envd_sys::{Device, DeviceKind};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, mount_remount, unmount,
};

const ROOTFS: &str = "/disk/rootfs";
pub(super) const SCRATCH: &str = "/disk/scratch";

/// Where the container's bundle is: config.json and rootfs/.
pub(super) const BUNDLE: &str = "/box";

/// The container's root.
pub(super) const BOX_ROOT: &str = "/box/rootfs";

/// The file systems that a kernel gives for nothing.
const EARLY: [(&str, &str, &str, &str); 3] = [
    ("devtmpfs", "/dev", "devtmpfs", "mode=0755"),
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
];

/// Names the mount in the error.
fn mounted(what: &str, at: &str, result: rustix::io::Result<()>) -> io::Result<()> {
    result.map_err(|error| named(format!("mounting {what} at {at}"), error.into()))
}

fn named(what: String, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn mount_new(source: &str, at: &str, kind: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(at).map_err(|error| named(format!("making {at}"), error))?;
    let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
    mounted(&format!("{kind} ({source})"), at, mount(source, at, kind, flags, data.as_c_str()))
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
    mount_new(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "mode=0620,ptmxmode=0666",
    )?;
    mount_new("tmpfs", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755")?;
    mount_new(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        "",
    )
}

pub(super) fn rootfs(device: Option<&str>) -> io::Result<()> {
    let device = disk(ROOTFS_SERIAL, device)?;
    mount_new(&device, ROOTFS, "ext4", MountFlags::RDONLY | MountFlags::NODEV, "").map_err(|error| {
        // The kernel says only EINVAL or EUCLEAN; what it thinks of the superblock is in its log.
        io::Error::new(error.kind(), format!("{error}; the disk is no whole ext4: make the template again"))
    })
}

pub(super) fn scratch(device: Option<&str>) -> io::Result<()> {
    let device = disk(SCRATCH_SERIAL, device)?;
    mount_new(&device, SCRATCH, "ext4", MountFlags::NOATIME, "errors=remount-ro")
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
    for at in [ROOTFS, SCRATCH] {
        let number = fs::metadata(at)?.dev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
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
            && error != rustix::io::Errno::INVAL
        {
            crate::log::warn(format_args!("unmounting {at}: {error}"));
        }
    }
}

/// The disk that the command line names, or the one with this serial.
fn disk(serial: &str, named: Option<&str>) -> io::Result<String> {
    if let Some(device) = named {
        return Ok(device.to_owned());
    }
    let mut seen = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(found) = fs::read_to_string(entry.path().join("serial")) else { continue };
        if found.trim_end() == serial {
            return Ok(PathBuf::from("/dev").join(&name).display().to_string());
        }
        seen.push(format!("{name} ({})", found.trim_end()));
    }
    let seen = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
    let message = format!("no virtio disk has the serial '{serial}'; disks with a serial: {seen}");
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}
