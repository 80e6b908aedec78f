//! Disks by their serials, which are the names of partitions (`host-shim`, `vmm/parts.rs`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, mount};

use super::named;

/// Mounts the ext4 of the disk with this serial at `at`, a folder that is made.
pub(super) fn mount_disk(serial: &str, at: &Path, read_only: bool) -> io::Result<()> {
    let node = node(serial, at)?;
    fs::create_dir_all(at).map_err(named(at.display()))?;
    let (flags, options) = match read_only {
        true => (MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::NODEV, c""),
        // The disk of a machine that crashed is not used: nothing need be written early.
        false => (MountFlags::NOATIME | MountFlags::NODEV, c"errors=remount-ro,noauto_da_alloc"),
    };
    let mounted = mount(&node, at, "ext4", flags, options);
    fs::remove_file(&node)?;
    mounted.map_err(|error| named(format!("mounting the disk {serial}"))(error.into()))
}

/// A node of the disk, beside `at`.
fn node(serial: &str, at: &Path) -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/block")? {
        let entry = entry?.path();
        let found = fs::read_to_string(entry.join("uevent")).unwrap_or_default();
        if !found.lines().any(|line| line.strip_prefix("PARTNAME=") == Some(serial)) {
            continue;
        }
        let numbers = fs::read_to_string(entry.join("dev"))?;
        let (major, minor) = numbers
            .trim_end()
            .split_once(':')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| io::Error::other(format!("{}/dev says {numbers:?}", entry.display())))?;
        let node = at.with_extension("disk");
        mknodat(CWD, &node, FileType::BlockDevice, Mode::from_raw_mode(0o600), makedev(major, minor))
            .map_err(|error| named(format!("the node of the disk {serial}"))(error.into()))?;
        return Ok(node);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("the machine has no disk {serial}")))
}
