//! Growing in place, ours and mke2fs's.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rootfs_tools::{BuildOptions, Error, Journal, Size, build, grow};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, assert_clean, debugfs, may_mount, snapshot, succeed, view};

const MIB: u64 = 1 << 20;

fn make(path: &Path, size: Size, journal: Journal) {
    let image = TestImage::plain(&[layer(&[
        Entry::directory("etc"),
        Entry::file("etc/hostname", "box\n").xattr("user.note", vec![7; 3000]),
        Entry::file("data", vec![b'd'; 5 << 20]),
        Entry::symlink("link", "etc/hostname"),
    ])]);
    build(&image.open(), &BuildOptions { size, journal, ..Default::default() }, path, &mut |_| {}).unwrap();
}

#[test]
fn step_by_step_over_every_border() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    for journal in [Journal::None, Journal::Auto] {
        make(&path, Size::Minimal, journal);
        let before = view(&path);
        // Inside a group, its end, a tail too short for a group, a group with a copy of the superblock, the flex group's
        // end, a second block of descriptors (8 GiB), and as far as the reserved ones go.
        for mib in [10, 20, 128, 129, 200, 384, 400, 2048, 2100, 8192, 8193, 9000, 20_000, 65_536] {
            let report = grow(&path, mib * MIB).unwrap();
            assert!(
                report.after <= mib * MIB && report.after + 40 * MIB > mib * MIB,
                "{mib} MiB: {report:?}"
            );
            assert_eq!(fs::metadata(&path).unwrap().len(), mib * MIB);
            assert_clean(&path);
        }
        assert!(view(&path) == before, "growing changed the contents");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 24 * MIB, "the file stays sparse");
        let error = grow(&path, 65_537 * MIB).unwrap_err();
        assert!(
            matches!(&error, Error::Invalid { reason, .. } if reason.contains("65536 MiB at the most")),
            "{error}"
        );
        assert_clean(&path);
    }
}

#[test]
fn the_kernel_writes_to_what_has_grown() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    make(&path, Size::Minimal, Journal::Auto);
    let before = snapshot(Mount::new(&path, "ro").path());
    grow(&path, 10_000 * MIB).unwrap();
    {
        let mount = Mount::new(&path, "rw");
        assert!(snapshot(mount.path()) == before, "growing changed the contents");
        for number in 0..500 {
            fs::create_dir(mount.path().join(format!("directory-{number}"))).unwrap();
        }
        fs::write(mount.path().join("large"), vec![b'l'; 400 << 20]).unwrap();
    }
    assert_clean(&path);
    // And the tools of others go on from there.
    fs::File::options().write(true).open(&path).unwrap().set_len(12_000 * MIB).unwrap();
    succeed("e2fsck", &["-fp".as_ref(), path.as_os_str()]);
    succeed("resize2fs", &[path.as_os_str()]);
    assert_clean(&path);
    grow(&path, 14_000 * MIB).unwrap();
    assert_clean(&path);
}

#[test]
fn what_mke2fs_makes_grows_too() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), vec![7; 100_000]).unwrap();
    for options in [
        "",
        "-O ^64bit",
        "-O ^has_journal",
        "-O metadata_csum_seed",
        "-O ^resize_inode",
        "-I 128",
        "-O orphan_file",
    ] {
        let path = dir.path().join("disk.ext4");
        let make = format!(
            "rm -f {0} && mke2fs -q -t ext4 -b 4096 -O metadata_csum {options} -d {1} {0} 200M",
            path.display(),
            tree.display()
        );
        succeed("sh", &["-c".as_ref(), make.as_ref()]);
        for mib in [300, 3000, 7000] {
            let report = grow(&path, mib * MIB).unwrap_or_else(|error| panic!("{options}: {error}"));
            assert!(report.after > mib * MIB - 40 * MIB, "{report:?}");
            assert_clean(&path);
        }
        assert!(debugfs(&path, "stat file").contains("Size: 100000"));
        if options == "-O ^resize_inode" {
            assert!(grow(&path, 9000 * MIB).unwrap_err().to_string().contains("8192 MiB at the most"));
        }
    }
}

#[test]
fn what_cannot_be_grown_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let refused = |path: &Path, mib: u64, text: &str| {
        let before = fs::read(path).unwrap();
        let error = grow(path, mib * MIB).unwrap_err();
        assert!(
            matches!(error, Error::Invalid { .. }) && error.to_string().contains(text),
            "{text}: {error}"
        );
        assert!(fs::read(path).unwrap() == before, "{text}: it was written to");
    };
    make(&path, Size::Exact(20 * MIB), Journal::None);
    refused(&path, 19, "only growing");
    let good = fs::read(&path).unwrap();
    let spoil = |offset: usize, text: &str| {
        let mut bad = good.clone();
        bad[offset] ^= 0x04;
        fs::write(&path, bad).unwrap();
        refused(&path, 100, text);
    };
    spoil(1024 + 0x38, "magic");
    spoil(1024 + 0x60, "journal must be replayed");
    spoil(1024 + 0x78, "checksum");
    spoil(4096 + 0x0c, "group descriptor 0");
    // Data behind the file system.
    fs::write(&path, &good).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"other", 21 * MIB).unwrap();
    refused(&path, 100, "behind the file system");
    fs::write(&path, &good[..1 << 20]).unwrap();
    refused(&path, 100, "room for");
    fs::write(&path, b"short").unwrap();
    refused(&path, 100, "ends inside");
    for options in
        ["-b 1024", "-b 4096 -O ^metadata_csum", "-b 4096 -O bigalloc", "-b 4096 -O meta_bg,^resize_inode"]
    {
        let make = format!("rm -f {0} && mke2fs -q -t ext4 {options} {0} 100M", path.display());
        succeed("sh", &["-c".as_ref(), make.as_ref()]);
        refused(
            &path,
            300,
            match options {
                "-b 1024" => "blocks of 4096",
                "-b 4096 -O ^metadata_csum" => "metadata_csum",
                _ => "not supported",
            },
        );
    }
}

#[test]
fn the_command_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    make(&path, Size::Minimal, Journal::None);
    let run = |mib: &str| {
        let command = std::process::Command::new(env!("CARGO_BIN_EXE_rootfs-tools"))
            .args(["grow", "--json", "--size", mib])
            .arg(&path)
            .output()
            .unwrap();
        (command.status.code(), String::from_utf8(command.stdout).unwrap())
    };
    let (code, report) = run("64");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!((code, report["after"].as_u64()), (Some(0), Some(64 * MIB)));
    assert_clean(&path);
    assert_eq!(run("32").0, Some(2));
}
