//! Scratch disks.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;

use rootfs_tools::{Error, empty};

use crate::oracle::{Mount, assert_clean, debugfs, may_mount, snapshot, succeed};

const MIB: u64 = 1 << 20;

#[test]
fn every_size_is_clean_and_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scratch.ext4");
    // Around the borders of groups (128 MiB) and of flex groups (2 GiB).
    for mib in [1, 2, 127, 128, 129, 256, 1024, 2047, 2048, 2049, 2176, 10_000, 65_536, 1 << 20] {
        empty(&path, mib * MIB, Some("scratch"), &[7]).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), mib * MIB);
        let on_host = metadata.blocks() * 512;
        assert!(on_host <= MIB + mib * MIB / 10_000, "{mib} MiB take {on_host} bytes of the host");
        assert_clean(&path);
    }
}

#[test]
fn the_seed_makes_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, seed: &[u8]| {
        let path = dir.path().join(name);
        empty(&path, 8 * MIB, None, seed).unwrap();
        fs::read(path).unwrap()
    };
    assert!(write("a", b"1") == write("b", b"1"));
    assert!(write("a", b"1") != write("b", b"2"));
}

#[test]
fn the_superblock_says_what_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scratch.ext4");
    empty(&path, 1024 * MIB, Some("0123456789abcdef"), b"seed").unwrap();
    let stats = debugfs(&path, "stats -h");
    for line in [
        "Filesystem volume name:   0123456789abcdef",
        "Filesystem features:      ext_attr resize_inode dir_index filetype extent 64bit flex_bg sparse_super large_file \
         huge_file dir_nlink extra_isize metadata_csum",
        "Filesystem flags:         signed_directory_hash",
        "Filesystem state:         clean",
        "Inode count:              65536",
        "Block count:              262144",
        "Reserved block count:     0",
        "Block size:               4096",
        "Group descriptor size:    64",
        "Flex block group size:    16",
        "Inode size:\t          256",
        "Checksum type:            crc32c",
    ] {
        assert!(stats.contains(line), "{line:?} is not in\n{stats}");
    }
    // No background writer (ext4lazyinit) may find work.
    let groups = succeed("dumpe2fs", &[path.as_os_str()]);
    assert_eq!(groups.matches("ITABLE_ZEROED").count(), 8, "{groups}");
}

#[test]
fn bad_requests_say_what_is_expected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scratch.ext4");
    let refuse = |bytes, label| empty(&path, bytes, label, b"").unwrap_err();
    assert!(matches!(refuse(0, None), Error::TooLarge { asked: 0, .. }));
    assert!(matches!(refuse(8192, None), Error::TooLarge { asked: 8192, .. }));
    assert!(matches!(refuse(MIB + 1, None), Error::Invalid { .. }));
    assert!(matches!(refuse(!4095, None), Error::Invalid { .. }));
    assert!(matches!(refuse(MIB, Some("seventeen letters")), Error::Invalid { .. }));
    assert!(!path.exists());
}

#[test]
fn the_kernel_writes_to_it() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scratch.ext4");
    empty(&path, 300 * MIB, Some("scratch"), b"seed").unwrap();
    let before = {
        let mount = Mount::new(&path, "rw");
        let root = mount.path();
        // What an overlay does with its upper directory.
        for name in ["upper", "work"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        xattr::set(root.join("upper"), "trusted.overlay.opaque", b"y").unwrap();
        for number in 0..3000 {
            fs::write(
                root.join("upper").join(format!("a-rather-long-file-name-{number}")),
                vec![b'x'; number],
            )
            .unwrap();
        }
        for number in (0..3000).step_by(3) {
            fs::remove_file(root.join("upper").join(format!("a-rather-long-file-name-{number}"))).unwrap();
        }
        // Beyond the first group.
        fs::write(root.join("large"), vec![b'l'; 200 << 20]).unwrap();
        snapshot(root)
    };
    assert_clean(&path);
    fs::File::options().write(true).open(&path).unwrap().set_len(900 * MIB).unwrap();
    succeed("e2fsck", &[OsStr::new("-fp"), path.as_os_str()]);
    succeed("resize2fs", &[path.as_os_str()]);
    assert_clean(&path);
    let mount = Mount::new(&path, "ro");
    assert!(snapshot(mount.path()) == before, "growing changed the contents");
}
