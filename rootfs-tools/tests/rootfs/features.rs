//! Features that are there when asked for, and what e2fsprogs' own tools can do to a file system of ours.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rootfs_tools::{BuildOptions, Error, Ext4, Journal, NoData, Size, Tree, build, write_tree};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, assert_clean, debugfs, may_mount, snapshot, succeed};

const MIB: u64 = 1 << 20;

fn image() -> TestImage {
    TestImage::plain(&[layer(&[
        Entry::directory("etc"),
        Entry::file("etc/hostname", "box\n").xattr("user.note", vec![7; 3000]),
        Entry::file("data", vec![b'd'; 5 << 20]),
        Entry::symlink("link", "etc/hostname"),
    ])])
}

fn with_journal(path: &Path, size: Size, journal: Journal) {
    build(&image().open(), &BuildOptions { size, journal, ..Default::default() }, path, &mut |_| {}).unwrap();
    assert_clean(path);
}

/// Whether this process may grow a mounted file system (`CAP_SYS_RESOURCE`); says why not.
fn may_resize() -> bool {
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may = u64::from_str_radix(effective.trim(), 16).unwrap() & SYS_RESOURCE != 0;
    if !may {
        eprintln!("SKIPPED: growing what is mounted needs CAP_SYS_RESOURCE, and this process has it not");
    }
    may
}

fn set_length(path: &Path, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn a_journal_is_as_large_as_mke2fs_makes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    for (size, journal, shown) in [
        (Size::Minimal, Journal::Auto, "4096k"),
        (Size::Exact(200 * MIB), Journal::Auto, "16M"),
        (Size::Exact(3000 * MIB), Journal::Auto, "64M"),
        (Size::Exact(200 * MIB), Journal::Size(40 * MIB), "40M"),
        // More extents than an inode holds.
        (Size::Exact(2000 * MIB), Journal::Size(1200 * MIB), "1200M"),
    ] {
        with_journal(&path, size, journal);
        let header = || succeed("dumpe2fs", &["-h".as_ref(), path.as_os_str()]);
        let stats = header();
        assert!(
            stats.contains("has_journal") && stats.contains("Journal backup:           inode blocks"),
            "{stats}"
        );
        let size = stats.lines().find_map(|line| line.strip_prefix("Total journal size:")).unwrap();
        assert_eq!(size.trim(), shown, "{stats}");
        // The superblock's copy of the inode is what e2fsck repairs a lost one with.
        let file = fs::File::open(&path).unwrap();
        let read = |at: u64, length: usize| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        };
        let word = |at: u64| u64::from(u32::from_le_bytes(read(at, 4).try_into().unwrap()));
        let inode = word(4096 + 8) * 4096 + 7 * 256;
        assert_eq!(read(1024 + 0x10c, 60), read(inode + 0x28, 60));
        assert_eq!((word(1024 + 0x148), word(1024 + 0x14c)), (word(inode + 0x6c), word(inode + 4)));
    }
    for bad in [Journal::Size(MIB), Journal::Size(4 * MIB + 1), Journal::Size(50_000 * MIB)] {
        assert!(matches!(Ext4::new(b"").journal(bad), Err(Error::Invalid { .. })), "{bad:?}");
    }
}

#[test]
fn the_kernel_uses_the_journal() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    with_journal(&path, Size::Exact(100 * MIB), Journal::Auto);
    {
        let mount = Mount::new(&path, "rw,data=journal");
        for number in 0..500 {
            fs::write(mount.path().join(format!("file-{number}")), vec![b'x'; number * 10]).unwrap();
        }
        fs::remove_file(mount.path().join("data")).unwrap();
    }
    assert_clean(&path);
    assert!(succeed("dumpe2fs", &["-h".as_ref(), path.as_os_str()]).contains("journal_checksum_v3"));
    assert!(debugfs(&path, "cat file-9").contains("xxxx"));
}

#[test]
fn e2fsprogs_grows_and_changes_it() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    for journal in [Journal::None, Journal::Auto] {
        with_journal(&path, Size::Minimal, journal);
        let before = snapshot(Mount::new(&path, "ro").path());
        // Beyond what one block of descriptors is for (8 GiB).
        set_length(&path, 20 << 30);
        succeed("resize2fs", &[path.as_os_str()]);
        assert_clean(&path);
        for change in [
            &["-L", "new-label"][..],
            &["-O", "^has_journal"],
            &["-j"],
            &["-O", "^metadata_csum"],
            &["-O", "metadata_csum"],
            &["-U", "random"],
            &["-m", "5"],
        ] {
            let args: Vec<&OsStr> = change.iter().map(OsStr::new).chain([path.as_os_str()]).collect();
            // tune2fs wants a fresh check before it rewrites checksums.
            succeed("e2fsck", &["-fp".as_ref(), path.as_os_str()]);
            succeed("tune2fs", &args);
            assert_clean(&path);
        }
        assert!(debugfs(&path, "stats -h").contains("new-label"));
        let mount = Mount::new(&path, "rw");
        assert!(snapshot(mount.path()) == before, "{journal:?}");
        fs::write(mount.path().join("more"), "written").unwrap();
        drop(mount);
        assert_clean(&path);
    }
}

#[test]
fn the_kernel_grows_it_while_it_is_mounted() {
    if !may_mount() || !may_resize() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    for journal in [Journal::None, Journal::Auto] {
        with_journal(&path, Size::Minimal, journal);
        let first = debugfs(&path, "ex data");
        set_length(&path, 20 << 30);
        {
            let mount = Mount::new(&path, "rw");
            let device = succeed("findmnt", &["-no".as_ref(), "SOURCE".as_ref(), mount.path().as_os_str()]);
            succeed("resize2fs", &[device.trim().as_ref()]);
            fs::write(mount.path().join("large"), vec![b'l'; 200 << 20]).unwrap();
            let data = fs::read(mount.path().join("data")).unwrap();
            assert!(data == vec![b'd'; 5 << 20]);
        }
        assert_clean(&path);
        let stats = debugfs(&path, "stats -h");
        assert!(stats.contains("Block count:              5242880"), "{stats}");
        assert!(!stats.contains("meta_bg"), "the reserved descriptors were enough: {stats}");
        assert_eq!(debugfs(&path, "ex data"), first, "nothing was moved");
    }
}

#[test]
fn a_file_system_that_is_too_small_for_its_journal_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("scratch.ext4");
    let format = Ext4::new(b"s").size(Size::Exact(2 * MIB)).journal(Journal::Auto).unwrap();
    let error = write_tree(&mut Tree::new(), &format, &mut NoData, &path).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
    assert!(!path.exists());
}
