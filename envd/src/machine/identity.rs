//! What makes a clone another machine for the programs in it. Call it on a thread of the sandbox's root.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::replace::replace;

const MACHINE_ID: &str = "/etc/machine-id";
/// Where older programs look; a link to the other, or a copy of it.
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
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

/// Gives the container a machine-id of its own.
pub(super) fn renew_machine_id() -> io::Result<()> {
    let id = format!("{}\n", hex(&version_4(random()?)));
    replace(MACHINE_ID, &id, 0o444)?;
    // A link goes to the other file already; what is missing stays missing.
    match fs::symlink_metadata(DBUS_MACHINE_ID) {
        Ok(found) if found.is_file() => replace(DBUS_MACHINE_ID, &id, 0o444),
        _ => Ok(()),
    }
}

/// Gives the container a boot id of its own.
///
/// The kernel's cannot be written, so a file is mounted over it in the container's mount namespace. Namespaces that
/// the tenant made before (docker's) keep the kernel's, as do programs that have read it.
pub(super) fn renew_boot_id() -> io::Result<()> {
    let bytes = version_4(random()?);
    let [a, b, c, d, e] = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]].map(hex);
    let path = Path::new(BOOT_ID_FOLDER).join(format!(".boot-id-{}", hex(&random()?)));
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(&path)
        .and_then(|mut file| file.write_all(format!("{a}-{b}-{c}-{d}-{e}\n").as_bytes()));
    let mounted = made.and_then(|()| {
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
        Ok(())
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
            renew_boot_id().unwrap();
            let first = read();
            renew_boot_id().unwrap();
            let second = read();
            assert!(kernels != first && first != second && second != kernels);
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
