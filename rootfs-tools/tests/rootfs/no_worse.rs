//! What e2fsprogs does to a file system of ours, held against what it does to one of mke2fs with the same features, size and
//! contents: where e2fsprogs itself has its limits, ours must not be worse.

use std::fs;
use std::path::Path;

use rootfs_tools::{Journal, Size, build_folder};

use crate::oracle::{debugfs, run, succeed};

const MIB: u64 = 1 << 20;

/// The two file systems: ours, and one by mke2fs with as many inodes and as much room for descriptors.
fn make(folder: &Path, journal: bool) -> [std::path::PathBuf; 2] {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("directory")).unwrap();
    fs::write(tree.join("data"), vec![b'd'; 5 << 20]).unwrap();
    for number in 0..300 {
        fs::write(tree.join("directory").join(format!("{number:0>50}")), format!("{number}")).unwrap();
    }
    let (ours, theirs) = (folder.join("ours.ext4"), folder.join("theirs.ext4"));
    let options = rootfs_tools::BuildOptions {
        size: Size::Exact(200 * MIB),
        journal: if journal { Journal::Auto } else { Journal::None },
        ..Default::default()
    };
    build_folder(&tree, &options, &ours, &mut |_| {}).unwrap();
    let features = format!("64bit,metadata_csum,^orphan_file,{}has_journal", if journal { "" } else { "^" });
    let args = ["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-N", "12800", "-E"];
    let more = ["lazy_itable_init=0,resize=16777216", "-O", &features, "-d"];
    let mut args: Vec<_> = args.into_iter().chain(more).map(std::ffi::OsStr::new).collect();
    args.extend([tree.as_os_str(), theirs.as_os_str(), "200M".as_ref()]);
    succeed("mke2fs", &args);
    let header = |path: &Path, field: &str| {
        let text = succeed("dumpe2fs", &["-h".as_ref(), path.as_os_str()]);
        text.lines().find(|line| line.starts_with(field)).unwrap_or_default().to_owned()
    };
    for field in ["Filesystem features", "Reserved GDT", "Inode count", "Block count", "Total journal size"] {
        assert_eq!(header(&ours, field), header(&theirs, field));
    }
    [ours, theirs]
}

/// Runs the commands, in which `$F` is a copy of the image: their exit codes, and whether the contents are still there.
fn outcome(image: &Path, commands: &[&str]) -> (Vec<Option<i32>>, bool) {
    let copy = image.with_extension("copy");
    succeed("cp", &["--sparse=always".as_ref(), image.as_os_str(), copy.as_os_str()]);
    let codes = commands.iter().map(|command| {
        let script = format!("F={}; {command}", copy.display());
        run("sh", &["-c".as_ref(), script.as_ref()]).status.code()
    });
    let codes = codes.collect();
    let last = format!("cat directory/{:0>50}", 299);
    (codes, debugfs(&copy, "cat data") == "d".repeat(5 << 20) && debugfs(&copy, &last) == "299")
}

/// Both have the same outcome, which is `expected`, with all of the contents.
fn same(images: &[std::path::PathBuf; 2], commands: &[&str], expected: &[i32]) {
    let [ours, theirs] = images.each_ref().map(|image| outcome(image, commands));
    assert_eq!(ours, theirs, "{commands:?}");
    let expected = expected.iter().copied().map(Some).collect();
    assert_eq!(ours, (expected, true), "{commands:?}");
}

/// tune2fs leaves s_reserved_gdt_blocks as it was, and e2fsck -p will not repair that by itself: theirs, too.
#[test]
fn without_its_resize_inode() {
    let dir = tempfile::tempdir().unwrap();
    let images = make(dir.path(), true);
    let remove = "tune2fs -O ^resize_inode $F";
    same(&images, &[remove, "e2fsck -p $F", "e2fsck -fy $F", "e2fsck -fn $F"], &[0, 4, 1, 0]);
}

#[test]
fn smaller_after_it_grew() {
    let dir = tempfile::tempdir().unwrap();
    for journal in [false, true] {
        let images = make(dir.path(), journal);
        // Within a group, over groups with copies, beyond a block of descriptors, beyond the reserved ones.
        for mib in [300, 3000, 20_000, 100_000] {
            let length = format!("truncate -s {mib}M $F");
            let grow = [&length[..], "resize2fs $F", "e2fsck -fn $F", "resize2fs -M $F", "e2fsck -fn $F"];
            same(&images, &grow, &[0; 5]);
            if mib <= 65_536 {
                let program = env!("CARGO_BIN_EXE_rootfs-tools");
                let ours = format!("{program} grow --size {mib} $F");
                let twice =
                    [&ours, "e2fsck -fn $F", "resize2fs -M $F", "e2fsck -fn $F", &ours, "e2fsck -fn $F"];
                same(&images, &twice, &[0; 6]);
            }
        }
    }
}

#[test]
fn with_its_journal_inode_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let images = make(dir.path(), true);
    let clear = "debugfs -w -R 'clri <8>' $F";
    same(&images, &[clear, "e2fsck -fy $F", "e2fsck -fn $F"], &[0, 1, 0]);
    same(&images, &[clear, "e2fsck -fp $F", "e2fsck -fn $F"], &[0, 1, 0]);
    // And once it was found and lost again.
    let again = [clear, "e2fsck -fy $F", clear, "e2fsck -fy $F", "e2fsck -fn $F"];
    same(&images, &again, &[0, 1, 0, 1, 0]);
}

#[test]
fn with_its_resize_inode_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let images = make(dir.path(), false);
    let clear = "debugfs -w -R 'clri <7>' $F";
    same(&images, &[clear, "e2fsck -fy $F", "e2fsck -fn $F"], &[0, 1, 0]);
}
