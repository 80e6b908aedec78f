//! What makes a clone another machine for the programs in it. Call it on a thread of the sandbox's root.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::replace::{replace, rewrite};

const MACHINE_ID: &str = "/etc/machine-id";
/// Where older programs look; a link to the other, or a copy of it.
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// More than any machine-id has.
const MAX_MACHINE_ID: u64 = 256;
/// A tmpfs of the container: the file that lies over [`BOOT_ID`] is made here and unlinked, and lives on in its mount.
const BOOT_ID_FOLDER: &str = "/dev";
/// Mounts of ours over each other: one for each resume that an earlier version did not undo.
const MAX_BOOT_ID_MOUNTS: usize = 8;

/// Random bytes of the kernel, whose state the host's seed has been mixed into.
fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A random UUID's bytes (RFC 9562, version 4), which is what systemd makes of a machine-id too.
fn version_4(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    bytes
}

fn new_machine_id() -> io::Result<String> {
    Ok(format!("{}\n", hex(&version_4(random()?))))
}

/// Gives the container a machine-id of its own.
pub(super) fn renew_machine_id() -> io::Result<()> {
    let id = new_machine_id()?;
    rewrite(MACHINE_ID, &id, 0o444)?;
    // A link goes to the other file already; what is missing stays missing.
    match fs::symlink_metadata(DBUS_MACHINE_ID) {
        Ok(found) if found.is_file() => rewrite(DBUS_MACHINE_ID, &id, 0o444),
        _ => Ok(()),
    }
}

/// Gives the container a machine-id where the image has none and is not from scratch. One that it brings stays.
pub(super) fn ensure_machine_id() -> io::Result<()> {
    let missing = match read_machine_id() {
        Ok(text) => text.is_empty() || text == "uninitialized\n",
        Err(error) => {
            error.kind() == io::ErrorKind::NotFound
                && Path::new(MACHINE_ID).parent().is_some_and(Path::is_dir)
        }
    };
    if missing { replace(MACHINE_ID, &new_machine_id()?, 0o444) } else { Ok(()) }
}

fn read_machine_id() -> io::Result<String> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(MACHINE_ID)?;
    let mut text = String::new();
    file.take(MAX_MACHINE_ID).read_to_string(&mut text)?;
    Ok(text)
}

/// The file that lies over the kernel's boot id, once there is one.
#[derive(Debug, Default)]
pub(super) struct BootId {
    file: Mutex<Option<File>>,
}

impl BootId {
    /// Gives the container a boot id of its own.
    ///
    /// The kernel's cannot be written, so a file is mounted over it in the container's mount namespace. Namespaces that
    /// the tenant made before (docker's) keep the kernel's, as do programs that have read it.
    pub(super) fn renew(&self) -> io::Result<()> {
        let bytes = version_4(random()?);
        let [a, b, c, d, e] = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]].map(hex);
        self.put(&format!("{a}-{b}-{c}-{d}-{e}\n"))
    }

    /// What [`BootId::renew`] would have to do for each clone, done once for all of them: the id stays.
    pub(super) fn prepare(&self) -> io::Result<()> {
        self.put(&fs::read_to_string(BOOT_ID)?)
    }

    fn put(&self, id: &str) -> io::Result<()> {
        let mut kept = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = kept.as_ref().filter(|file| is_mounted(file)) {
            return file.write_all_at(id.as_bytes(), 0);
        }
        *kept = Some(mount_over(id)?);
        Ok(())
    }
}

/// Whether the file is what the container finds in the place of the boot id. The tenant may have mounted there too.
fn is_mounted(file: &File) -> bool {
    let ids = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (fs::metadata(BOOT_ID), file.metadata()) {
        (Ok(found), Ok(ours)) => ids(found) == ids(ours),
        _ => false,
    }
}

fn mount_over(id: &str) -> io::Result<File> {
    let path = Path::new(BOOT_ID_FOLDER).join(format!(".boot-id-{}", hex(&random()?)));
    let made = OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path);
    let mounted = made.and_then(|file| {
        file.write_all_at(id.as_bytes(), 0)?;
        // What an earlier resume mounted; the last try is the kernel's own file, which is no mount.
        for _ in 0..MAX_BOOT_ID_MOUNTS {
            if unmount(BOOT_ID, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_err() {
                break;
            }
        }
        mount_bind(&path, BOOT_ID)?;
        let flags = MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOEXEC;
        mount_remount(BOOT_ID, flags, c"")?;
        Ok(file)
    });
    // The mount keeps the file.
    let _ = fs::remove_file(&path);
    mounted.map_err(|error| io::Error::new(error.kind(), format!("mounting over {BOOT_ID}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use rustix::mount::{MountPropagationFlags, mount_change};

    #[test]
    fn each_renewal_gives_another_boot_id_in_this_mount_namespace_alone() {
        let thread = std::thread::spawn(|| {
            if let Err(error) = unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS) {
                eprintln!("SKIPPED: a mount namespace needs root: {error}");
                return;
            }
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let read = || fs::read_to_string(BOOT_ID).unwrap();
            let kernels = read();
            let boot_id = BootId::default();
            boot_id.prepare().unwrap();
            assert_eq!(read(), kernels);
            boot_id.renew().unwrap();
            let first = read();
            boot_id.renew().unwrap();
            let second = read();
            assert!(kernels != first && first != second && second != kernels);
            // Whatever the tenant did to the mount, and whoever made it.
            unmount(BOOT_ID, UnmountFlags::DETACH).unwrap();
            assert_eq!(read(), kernels);
            boot_id.renew().unwrap();
            let third = read();
            BootId::default().renew().unwrap();
            assert!(third != kernels && read() != third);
            for id in [&first, &second] {
                assert_eq!((id.len(), id.as_bytes()[14]), (37, b'4'), "{id}");
            }
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            assert_eq!(mounts.matches("boot_id").count(), 1, "{mounts}");
            assert!(OpenOptions::new().write(true).open(BOOT_ID).is_err());
        });
        thread.join().unwrap();
    }
}
