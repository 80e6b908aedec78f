//! Our reader against the kernel and mke2fs, and what it makes of damage.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rootfs_tools::{
    BuildOptions, Content, DataSource, FileSystem, NewContent, NodeId, Owner, Run, Size, Source, build, diff,
    extract, insert, list, read_file, verify,
};
use tar::EntryType;

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, Seen, Snapshot, assert_clean, may_mount, snapshot, succeed};

/// What our reader sees, in the form of the kernel's view.
fn read(image: &Path) -> Snapshot {
    let fs = FileSystem::open(image).unwrap();
    let contents = fs.tree().unwrap();
    let tree = &contents.tree;
    let mut seen = Snapshot::new();
    let mut stack = vec![(Vec::new(), NodeId::ROOT)];
    while let Some((path, id)) = stack.pop() {
        let node = tree.node(id);
        let mut data = Vec::new();
        let (kind, device) = match &node.content {
            Content::Directory(_) => (0o040_000, 0),
            Content::File { size, data: places } => {
                data.resize(*size as usize, 0);
                for Run { start, length, place } in places.runs(*size) {
                    let range = start as usize..(start + length) as usize;
                    fs.data().read(place, &mut data[range]).unwrap();
                }
                (0o100_000, 0)
            }
            Content::Symlink(target) => {
                data = target.to_vec();
                (0o120_000, 0)
            }
            Content::CharDevice { major, minor } => (0o020_000, rustix::fs::makedev(*major, *minor)),
            Content::BlockDevice { major, minor } => (0o060_000, rustix::fs::makedev(*major, *minor)),
            Content::Fifo => (0o010_000, 0),
        };
        let attributes = &node.attributes;
        let mut links = 0;
        for (name, child) in tree.children(id).into_iter().flat_map(|names| names.iter()) {
            links += u64::from(tree.is_directory(child.node));
            if !(path.is_empty() && name == b"lost+found") {
                let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                stack.push(([&path[..], separator, name].concat(), child.node));
            }
        }
        let entry = Seen {
            mode: kind | u32::from(attributes.mode),
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: (attributes.mtime.seconds, attributes.mtime.nanoseconds),
            contents: data,
            device,
            xattrs: attributes
                .xattrs
                .iter()
                .map(|xattr| (xattr.name.to_vec(), xattr.value.to_vec()))
                .collect(),
            links: if tree.is_directory(id) { links + 2 } else { 0 },
            same_as: contents.numbers[id.index()].to_le_bytes().to_vec(),
        };
        seen.insert(path, entry);
    }
    let mut first = std::collections::BTreeMap::new();
    let mut names = std::collections::BTreeMap::new();
    for (path, entry) in &mut seen {
        *names.entry(entry.same_as.clone()).or_insert(0u64) += 1;
        entry.same_as = first.entry(entry.same_as.clone()).or_insert_with(|| path.clone()).clone();
    }
    let count =
        |seen: &Snapshot, same: &[u8]| seen.values().filter(|entry| entry.same_as == same).count() as u64;
    let counts: Vec<u64> = seen.values().map(|entry| count(&seen, &entry.same_as)).collect();
    for (entry, count) in seen.values_mut().zip(counts) {
        entry.links = if entry.links == 0 { count } else { entry.links };
    }
    seen
}

fn assert_same(got: &Snapshot, expected: &Snapshot) {
    let names = |tree: &Snapshot| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(got), names(expected));
    for (path, expected) in expected {
        let got = &got[path];
        let shown = String::from_utf8_lossy(path);
        assert!(got.contents == expected.contents, "contents of {shown}");
        let bare = |seen: &Seen| Seen { contents: Vec::new(), ..seen.clone() };
        assert_eq!(bare(got), bare(expected), "{shown}");
    }
}

/// A folder with what is hard to read.
fn nasty(root: &Path) {
    let folder = |name: &str| {
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };
    let many = folder("many");
    for number in 0..1500 {
        fs::write(many.join(format!("file-with-a-long-name-{number}")), number.to_string()).unwrap();
    }
    folder("deep/er/and/deeper");
    let pattern: Vec<u8> = (0..1_500_000u32).map(|n| (n * 7 / 3) as u8).collect();
    fs::write(root.join("big"), pattern).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    fs::write(root.join("tiny"), "inline").unwrap();
    fs::write(root.join("inline"), [b'i'; 100]).unwrap();
    fs::hard_link(root.join("tiny"), root.join("deep/hard")).unwrap();
    let holes = fs::File::create(root.join("holes")).unwrap();
    for number in 1..30 {
        holes.write_all_at(b"data", number * 100_000).unwrap();
    }
    holes.set_len(4_000_000).unwrap();
    symlink("tiny", root.join("fast")).unwrap();
    symlink("a".repeat(59), root.join("fast59")).unwrap();
    symlink("b".repeat(60), root.join("slow60")).unwrap();
    symlink("c/".repeat(400), root.join("slow800")).unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not-utf8-\xff")), "bytes").unwrap();
    fs::write(root.join("n".repeat(255)), "long name").unwrap();
}

fn mke2fs(options: &[&str], root: &Path, image: &Path) {
    let mut args: Vec<&std::ffi::OsStr> = vec!["-q".as_ref(), "-F".as_ref(), "-d".as_ref(), root.as_ref()];
    args.extend(options.iter().map(|option| std::ffi::OsStr::new(*option)));
    args.extend([image.as_os_str(), "48M".as_ref()]);
    succeed("mke2fs", &args);
}

/// Sizes of blocks, inodes and descriptors, kinds of checksums, blocks in lists and in extents, data in inodes.
const KINDS: [&[&str]; 8] = [
    &["-t", "ext4"],
    &["-t", "ext4", "-b", "1024"],
    &["-t", "ext4", "-b", "2048", "-I", "512"],
    &["-t", "ext4", "-I", "128"],
    &["-t", "ext4", "-O", "^64bit,^metadata_csum,uninit_bg"],
    &["-t", "ext2"],
    &["-t", "ext4", "-O", "inline_data,metadata_csum_seed,large_dir,quota,orphan_file"],
    &["-t", "ext4", "-O", "sparse_super2,^resize_inode,^has_journal", "-g", "1024"],
];

#[test]
fn what_mke2fs_makes_is_read_as_the_kernel_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    nasty(&root);
    for (kind, number) in KINDS.iter().zip(0..) {
        let image = dir.path().join(format!("{number}.ext4"));
        mke2fs(kind, &root, &image);
        let report = verify(&image, None).unwrap();
        assert!(report.is_clean(), "{kind:?}: {:#?}", report.findings);
        let got = read(&image);
        if may_mount() {
            let mount = Mount::new(&image, "ro,noload");
            let mut expected = snapshot(mount.path());
            // lost+found is a subdirectory, which the snapshot leaves out and the kernel counts.
            for entry in expected.values_mut() {
                entry.xattrs.remove(&b"security.selinux"[..]);
            }
            assert_same(&got, &expected);
        }
        // Written again by us, it is the same tree, and whole.
        let again = dir.path().join(format!("{number}.again.ext4"));
        let fs = FileSystem::open(&image).unwrap();
        let mut tree = fs.tree().unwrap().tree;
        let format = rootfs_tools::Ext4::new(b"again");
        rootfs_tools::write_tree(&mut tree, &format, &mut fs.data(), &again).unwrap();
        assert_clean(&again);
        let differences = diff(
            &Source::FileSystem(Box::new(fs)),
            &Source::FileSystem(Box::new(FileSystem::open(&again).unwrap())),
        );
        assert_eq!(differences.unwrap(), []);
    }
}

fn sample() -> TestImage {
    let mut entries = vec![
        Entry::directory("etc").mode(0o750).owner(1, 2),
        Entry::file("etc/passwd", "root:x:0:0::/root:/bin/sh\n"),
        Entry::file("etc/shadow", "secret").mode(0o600).xattr("user.large", vec![b'v'; 3000]),
        Entry::hard_link("etc/also", "etc/passwd"),
        Entry::symlink("out", "/etc/passwd"),
        Entry::symlink("slow", "x".repeat(100)),
        Entry::device("null", EntryType::Char, 1, 3),
        Entry::file("big", vec![7; 300_000]),
        Entry::directory("many"),
    ];
    entries.extend((0..600).map(|n| Entry::file(format!("many/with-a-long-name-{n}"), "x")));
    TestImage::new(&[layer(&entries)])
}

fn built(dir: &Path) -> (TestImage, PathBuf) {
    built_with(dir, 4 << 20)
}

fn built_with(dir: &Path, free: u64) -> (TestImage, PathBuf) {
    let image = sample();
    let path = dir.join("rootfs.ext4");
    build(&image.open(), &BuildOptions { size: Size::Free(free), ..Default::default() }, &path, &mut |_| {})
        .unwrap();
    (image, path)
}

#[test]
fn our_own_image_is_what_its_layers_say() {
    let dir = tempfile::tempdir().unwrap();
    let (image, path) = built(dir.path());
    let source = Source::Image(Box::new(image.open()));
    let report = verify(&path, Some(&source)).unwrap();
    assert!(report.is_clean(), "{report:#?}");
    // Of each kind of change, one.
    for (command, entry, what) in [
        ("sif /etc/passwd mode 0100600", "/etc/passwd", "mode: 644, 600"),
        ("sif /big uid 5", "/big", "owner: 0:0, 5:0"),
        ("rm /slow", "/slow", "symlink"),
        ("symlink /new /somewhere", "/new", "symlink"),
        ("sif /big mtime @1", "/big", "time: "),
        ("ea_rm /etc/shadow user.large", "/etc/shadow", "attribute user.large: 3000 bytes"),
    ] {
        let (_, path) = built(dir.path());
        succeed("debugfs", &["-w".as_ref(), "-R".as_ref(), command.as_ref(), path.as_os_str()]);
        let report = verify(&path, Some(&source)).unwrap();
        let found = report.differences.iter().any(|difference| {
            difference.path == entry && difference.what.iter().any(|shown| shown.starts_with(what))
        });
        assert!(found, "{command}: {:#?}", report.differences);
    }
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4096).position(|block| block.iter().all(|byte| *byte == 7)).unwrap();
    let (_, path) = built(dir.path());
    fs::File::options().write(true).open(&path).unwrap().write_all_at(b"!", at as u64).unwrap();
    let report = verify(&path, Some(&source)).unwrap();
    assert_eq!(report.total_findings, 0, "data has no checksum");
    assert_eq!(report.differences.len(), 1);
    assert!(report.differences[0].what[0].starts_with("contents: sha256:"), "{report:?}");
}

#[test]
fn damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    // debugfs mends the checksums, so what is found is the damage itself.
    for (command, what) in [
        ("ssv free_blocks_count 7", "free blocks"),
        ("ssv free_inodes_count 7", "free inodes"),
        ("ssv state 2", "state"),
        ("ssv last_orphan 12", "state"),
        ("set_bg 0 free_blocks_count 3", "free blocks"),
        ("set_bg 0 free_inodes_count 3", "free inodes"),
        ("set_bg 0 used_dirs_count 77", "directories"),
        ("set_bg 0 inode_table 0", "block of the inode table"),
        ("set_bg 0 checksum 0", "checksum"),
        ("freei /etc/passwd", "in use"),
        ("clri /etc/passwd", "mode"),
        ("freeb 40 3", "in use"),
        ("setb 1500 2", "in use"),
        ("seti <800>", "in use"),
        ("sif /etc/passwd links_count 9", "link count"),
        ("sif /etc links_count 9", "link count"),
        ("sif /etc size 5000", "size"),
        ("sif /big size 5000", "size"),
        ("sif /big blocks 8", "bytes on the disk"),
        ("sif /big block[0] 0", "magic number of an extent node"),
        ("sif /big block[4] 70000", "extent"),
        ("sif /big block[5] 1", "owners of block"),
        ("sif /etc mode 0100644", "type in the directory"),
        ("sif /slow size 0", "target"),
        ("unlink /etc/passwd", "link count"),
        ("unlink /many", "in use"),
        ("link /etc /twice", "names of a directory"),
        ("sif / checksum 0", "checksum"),
    ] {
        let (_, path) = built(dir.path());
        let image = path.as_os_str();
        let before = fs::read(&path).unwrap();
        succeed("debugfs", &["-w".as_ref(), "-R".as_ref(), command.as_ref(), image]);
        assert!(fs::read(&path).unwrap() != before, "{command} changed nothing");
        let report = verify(&path, None).unwrap();
        let found = report.findings.iter().any(|finding| finding.to_string().contains(what));
        assert!(found, "{command}: {:#?}", report.findings);
    }
    // A bit of each kind of block.
    let (_, path) = built(dir.path());
    let good = fs::read(&path).unwrap();
    // The first two words of the first descriptor are the places of its bitmaps.
    let word = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    let block = |place: usize| u64::from(word(4096 + place)) * 4096 + 17;
    for (name, at) in
        [("superblock", 1024 + 0x78), ("descriptor", 4096 + 0x0e), ("bitmap", block(0)), ("bitmap", block(4))]
    {
        let mut bytes = good.clone();
        bytes[at as usize] ^= 4;
        fs::write(&path, &bytes).unwrap();
        let report = verify(&path, None).unwrap();
        let found =
            report.findings.iter().any(|finding| finding.place.contains(name) && finding.what == "checksum");
        assert!(found, "{name}: {:#?}", report.findings);
        assert!(FileSystem::open(&path).and_then(|fs| fs.tree()).is_err() || name == "bitmap");
    }
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert!(!verify(&path, None).unwrap().is_clean(), "cut short");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    assert!(verify(&path, None).is_err(), "no ext4");
}

/// After a mount that wrote to it, as e2fsck says.
#[test]
fn a_mounted_and_changed_image_is_clean() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = built_with(dir.path(), 32 << 20);
    let mount = Mount::new(&path, "rw");
    for number in 0..700u64 {
        let file = mount.path().join(format!("many/new-{number}"));
        fs::write(&file, vec![number as u8; (number * 37 % 9000) as usize]).unwrap();
        if number % 3 == 0 {
            fs::remove_file(mount.path().join(format!("many/with-a-long-name-{}", number % 600))).ok();
        }
    }
    fs::create_dir(mount.path().join("made")).unwrap();
    fs::rename(mount.path().join("big"), mount.path().join("made/moved")).unwrap();
    let file = fs::File::options().write(true).open(mount.path().join("made/moved")).unwrap();
    file.write_all_at(b"far", 900_000).unwrap();
    drop(file);
    let expected = snapshot(mount.path());
    drop(mount);
    assert_clean(&path);
    let report = verify(&path, None).unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    assert_same(&read(&path), &expected);
}

#[test]
fn copies_out_are_what_is_in_the_image_and_stay_where_they_belong() {
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = built(dir.path());
    let fs = FileSystem::open(&path).unwrap();
    let out = dir.path().join("out");
    let report = extract(&fs, b"/", &out).unwrap();
    assert!(report.entries > 600);
    assert_eq!(fs::read(out.join("etc/passwd")).unwrap(), b"root:x:0:0::/root:/bin/sh\n");
    assert_eq!(
        fs::metadata(out.join("etc/passwd")).unwrap().ino(),
        fs::metadata(out.join("etc/also")).unwrap().ino()
    );
    assert_eq!(fs::symlink_metadata(out.join("etc/shadow")).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::symlink_metadata(out.join("etc/shadow")).unwrap().mtime(), 1_700_000_000);
    assert_eq!(fs::read_link(out.join("out")).unwrap(), Path::new("/etc/passwd"));
    if may_mount() {
        let expected = diff(&Source::FileSystem(Box::new(fs)), &Source::Folder(out.clone())).unwrap();
        assert_eq!(expected, []);
    }
    let fs = FileSystem::open(&path).unwrap();
    let mut bytes = Vec::new();
    assert_eq!(read_file(&fs, b"/out/../etc/passwd", &mut bytes).ok(), None, "a path through a file");
    assert_eq!(read_file(&fs, b"etc/passwd", &mut bytes).unwrap(), 26);
    assert_eq!(bytes, b"root:x:0:0::/root:/bin/sh\n");

    // Neither a link nor a file on the host is written through or replaced.
    let (victim, trap) = (dir.path().join("victim"), dir.path().join("trap"));
    fs::create_dir(&victim).unwrap();
    fs::create_dir(&trap).unwrap();
    symlink(&victim, trap.join("etc")).unwrap();
    symlink(victim.join("file"), trap.join("big")).unwrap();
    assert!(extract(&fs, b"/etc", &trap).unwrap_err().is_bad_input());
    assert!(extract(&fs, b"/big", &trap).unwrap_err().is_bad_input());
    assert!(extract(&fs, b"/etc/passwd", &out.join("etc")).unwrap_err().is_bad_input());
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
}

#[test]
fn copies_into_an_image_keep_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (_, path) = built(dir.path());
    let old = FileSystem::open(&path).unwrap().superblock().clone();
    let folder = dir.path().join("site");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/index.html"), "hello").unwrap();
    fs::hard_link(folder.join("sub/index.html"), folder.join("twin")).unwrap();
    let owner = Owner { uid: 33, gid: 34 };
    let report = insert(&path, NewContent::Path(&folder), b"/etc", owner).unwrap();
    assert_eq!((report.size, report.grown_from), (old.size(), None));
    assert_clean(&path);
    let fs = FileSystem::open(&path).unwrap();
    assert_eq!((fs.superblock().uuid, &fs.superblock().label), (old.uuid, &old.label));
    let listed = list(&fs, b"/etc/site", true).unwrap();
    let paths: Vec<&str> = listed.iter().map(|entry| &entry.path[..]).collect();
    assert_eq!(paths, ["/etc/site/sub", "/etc/site/twin", "/etc/site/sub/index.html"]);
    assert!(listed.iter().all(|entry| (entry.uid, entry.gid) == (33, 34)));
    assert_eq!(listed[1].inode, listed[2].inode);

    // In the place of a file, from a stream, and larger than what is free.
    let large = vec![3; 9 << 20];
    let report =
        insert(&path, NewContent::Stream(&mut &large[..]), b"/etc/passwd", Owner::default()).unwrap();
    assert_eq!(report.grown_from, Some(old.size()));
    assert_clean(&path);
    let fs = FileSystem::open(&path).unwrap();
    let mut bytes = Vec::new();
    read_file(&fs, b"/etc/passwd", &mut bytes).unwrap();
    assert!(bytes == large);
    bytes.clear();
    read_file(&fs, b"/etc/also", &mut bytes).unwrap();
    assert_eq!(bytes, b"root:x:0:0::/root:/bin/sh\n", "the other name keeps the old file");

    let before = fs::read(&path).unwrap();
    for bad in [&b"/missing/folder"[..], b"/etc", b"/etc/passwd/below"] {
        let error = insert(&path, NewContent::Stream(&mut &b"x"[..]), bad, Owner::default()).unwrap_err();
        assert!(error.is_bad_input(), "{error}");
    }
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn the_commands_exit_as_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let (image, path) = built(dir.path());
    let file = path.to_str().unwrap();
    let reference = format!("oci:{}:test", image.path().display());
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_rootfs-tools")).args(args).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = run(&["verify", file, &reference]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("nothing is wrong"), "{text}");
    assert_eq!(run(&["verify", "/nonexistent"]).0, Some(2));
    assert_eq!(run(&["diff", file, file]), (Some(0), String::new()));
    assert_eq!(run(&["diff", file, &reference]), (Some(0), String::new()));
    let inside = format!("{file}:/etc/passwd");
    assert_eq!(run(&["cp", &inside, "-"]), (Some(0), "root:x:0:0::/root:/bin/sh\n".to_owned()));
    let (code, text) = run(&["ls", file, "/etc", "-l"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("-rw-r--r--   2     0     0         26 2023-11-14T22:13:20Z passwd"), "{text}");
    assert_eq!(run(&["ls", file, "/missing"]).0, Some(2));
    let (code, text) = run(&["inspect", file, "--why-big"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("metadata_csum") && text.contains("/big"), "{text}");
    let (code, text) = run(&["inspect", &reference, "--why-big", "--json"]);
    let facts: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &facts["largest"]["files"][0]["path"]), (Some(0), &"/big".into()));
    let new = dir.path().join("new");
    fs::write(&new, "new").unwrap();
    assert_eq!(run(&["cp", new.to_str().unwrap(), &format!("{file}:/etc/")]).0, Some(0));
    assert_clean(&path);
    let (code, text) = run(&["diff", file, &reference]);
    assert_eq!((code, &text[..]), (Some(1), "- /etc/new (file)\n"));
    assert_eq!(run(&["verify", file, &reference]).0, Some(1));
}
