//! The scratch disk, made larger while it is mounted.
//!
//! ```text
//! host: block_resize ──► virtio-blk's configuration changes ──► uevent of the disk (RESIZE=1) ──► its size is read again
//!                                                                                                       │ large enough
//!                                                     EXT4_IOC_RESIZE_FS on the mount  ◄────────────────┘
//! ```
//!
//! A sandbox that was restored finds the disk of its snapshot; the host makes it larger once the machine goes on, which the
//! kernel hears of by an interrupt. Until then the uevents are waited for, up to a deadline. They are only a reason to look:
//! root in the container can send some too.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// How long the host has to make the disk larger after its request.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// The multicast group of what the kernel says, not of what udev makes of it.
const KERNEL_EVENTS: u32 = 1;

/// The unit of a disk's size in /sys.
const SECTOR: u64 = 512;

/// Where the superblock is on the disk, and what of it is read (`struct ext4_super_block`).
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 0x154;
const INCOMPAT_64BIT: u32 = 0x80;

/// Grows the ext4 that is mounted at `at` to `wanted` bytes, once its disk has as many; what is as large already is left. May
/// block for as long as the deadline says, and then for what the kernel needs.
pub(super) fn grow(at: &Path, wanted: u64, deadline: Duration) -> io::Result<()> {
    let disk = Disk::below(at)?;
    let block_size = rustix::fs::fstatvfs(&disk.mounted)?.f_bsize;
    let blocks = wanted / block_size;
    if blocks <= disk.blocks()? {
        return Ok(());
    }
    disk.wait_for(blocks * block_size, deadline)?;
    envd_sys::grow_ext4(disk.mounted.as_fd(), blocks).map_err(|error| {
        let message = format!("growing the file system of {} to {blocks} blocks: {error}", disk.name);
        io::Error::new(error.kind(), message)
    })
}

/// The disk below a file system.
struct Disk {
    mounted: File,
    name: String,
    sys: PathBuf,
}

impl Disk {
    fn below(at: &Path) -> io::Result<Self> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", at.display()));
        let mounted = File::open(at).map_err(named)?;
        let number = mounted.metadata()?.dev();
        let sys = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let uevent = fs::read_to_string(format!("{sys}/uevent"));
        let name = uevent
            .ok()
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(str::to_owned));
        let name = name.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("there is no disk below {}", at.display()))
        })?;
        Ok(Self { mounted, name, sys: sys.into() })
    }

    /// Bytes of the disk, as the kernel knows it now.
    fn size(&self) -> io::Result<u64> {
        let text = fs::read_to_string(self.sys.join("size"))?;
        let sectors: u64 = text.trim_end().parse().map_err(io::Error::other)?;
        Ok(sectors.saturating_mul(SECTOR))
    }

    /// Blocks of the file system. statfs(2) leaves out what ext4 itself needs.
    fn blocks(&self) -> io::Result<u64> {
        let mut superblock = [0; SUPERBLOCK_SIZE];
        File::open(Path::new("/dev").join(&self.name))?.read_exact_at(&mut superblock, SUPERBLOCK)?;
        blocks_of(&superblock).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("there is no ext4 on {}", self.name))
        })
    }

    /// Waits until the disk has so many bytes.
    fn wait_for(&self, wanted: u64, deadline: Duration) -> io::Result<()> {
        // Heard from before the first look, so that no change falls between.
        let events = listen()?;
        let end = Instant::now() + deadline;
        let mut told = false;
        loop {
            let size = self.size()?;
            if size >= wanted {
                return Ok(());
            }
            if !std::mem::replace(&mut told, true) {
                let name = &self.name;
                crate::log::info(format_args!("waiting for the disk {name} to have {wanted} bytes"), &[]);
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => {
                    let message = format!(
                        "the disk {} has {size} bytes, {wanted} were expected within {} s: the host makes it larger",
                        self.name,
                        deadline.as_secs_f32()
                    );
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Ok(_) => pass_over(&events)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn listen() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let events = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
    bind(&events, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
    Ok(events)
}

/// What one says is not read: a look is cheaper than a parser.
fn pass_over(events: &OwnedFd) -> io::Result<()> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 1];
    match recv(events, &mut buffer[..], RecvFlags::TRUNC) {
        // There were more than the socket holds: reason enough to look.
        Ok(_) | Err(Errno::NOBUFS | Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The blocks of the file system that a superblock is of; `None` when it is no ext4's.
fn blocks_of(superblock: &[u8; SUPERBLOCK_SIZE]) -> Option<u64> {
    let word = |at: usize| superblock.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    if superblock.get(0x38..0x3a)? != [0x53, 0xef] {
        return None;
    }
    let high = if word(0x60)? & INCOMPAT_64BIT != 0 { word(0x150)? } else { 0 };
    Some(u64::from(high) << 32 | u64::from(word(0x4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_superblock_says_how_large_the_file_system_is() {
        let mut superblock = [0; SUPERBLOCK_SIZE];
        assert_eq!(blocks_of(&superblock), None);
        superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        superblock[0x4..0x8].copy_from_slice(&7u32.to_le_bytes());
        superblock[0x150..0x154].copy_from_slice(&1u32.to_le_bytes());
        assert_eq!(blocks_of(&superblock), Some(7));
        superblock[0x60] = 0x80;
        assert_eq!(blocks_of(&superblock), Some(1 << 32 | 7));
    }

    #[test]
    fn where_there_is_no_disk_it_is_told() {
        let error = grow(Path::new("/proc"), 1 << 30, DEADLINE).unwrap_err();
        assert!(error.to_string().contains("no disk below /proc"), "{error}");
        let error = grow(Path::new("/nonexistent"), 1 << 30, DEADLINE).unwrap_err();
        assert!(error.to_string().contains("/nonexistent: "), "{error}");
    }
}
