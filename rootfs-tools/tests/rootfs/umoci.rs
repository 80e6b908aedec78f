//! The kernel's view of what we build against umoci's unpacking of the same layers.

use std::path::Path;

use rootfs_tools::BuildOptions;
use tar::EntryType;

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, assert_clean, may_mount, snapshot, succeed};

/// `struct vfs_cap_data` of revision 2 with CAP_NET_BIND_SERVICE permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A little-endian `posix_acl_xattr` with a named user.
const ACL: [u8; 44] = [
    2, 0, 0, 0, // version
    1, 0, 6, 0, 255, 255, 255, 255, // owner rw-
    2, 0, 4, 0, 232, 3, 0, 0, // user 1000 r--
    4, 0, 4, 0, 255, 255, 255, 255, // group r--
    16, 0, 4, 0, 255, 255, 255, 255, // mask r--
    32, 0, 0, 0, 255, 255, 255, 255, // others ---
];

fn base() -> Vec<Entry> {
    let pattern: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 / 3) as u8).collect();
    let mut sparse = vec![0; 2 << 20];
    sparse[1 << 20] = 1;
    let mut entries = vec![
        Entry::directory("./").mode(0o711).owner(5, 6).mtime("1600000000.5"),
        Entry::directory("bin"),
        Entry::file("bin/su", "setuid").mode(0o4755),
        Entry::file("bin/wall", "setgid").mode(0o2755).owner(0, 5),
        Entry::file("bin/ping", "capable").mode(0o755).xattr("security.capability", CAPABILITY),
        Entry::hard_link("bin/ping4", "bin/ping"),
        Entry::directory("tmp").mode(0o1777),
        Entry::file("empty", ""),
        Entry::file("one", "1"),
        Entry::file("block", vec![b'x'; 4096]),
        Entry::file("block1", vec![b'x'; 4097]),
        Entry::file("big", pattern),
        Entry::file("sparse", sparse),
        Entry::file("owned", "by a user namespace").owner(100_000, 2_000_000_000),
        Entry::file("early", "").mtime("-86400.25"),
        Entry::file("dawn", "").mtime("-2147483648"),
        Entry::file("late", "").mtime("4294967296.999999999"),
        // umoci counts nanoseconds in 64 bits, which end in 2262.
        Entry::file("last", "").mtime("9214646400.5"),
        Entry::file("exact", "").mtime("1700000000.000000001"),
        Entry::device("null", EntryType::Char, 1, 3).mode(0o666),
        Entry::device("char", EntryType::Char, 511, 65_536),
        Entry::device("disk", EntryType::Block, 259, 1_048_575).owner(0, 6),
        Entry::fifo("pipe").mode(0o1622),
        Entry::symlink("fast", "bin/su"),
        Entry::symlink("fast59", "a".repeat(59)),
        Entry::symlink("slow60", "b".repeat(60)),
        Entry::symlink("slow4000", "c/".repeat(2000)),
        Entry::symlink("dangling", "../../nowhere").owner(7, 8).mtime("1.000000002"),
        Entry::hard_link("symlink2", "fast"),
        Entry::file(b"not-utf8-\xff\xfe", "bytes"),
        Entry::file([b'n'; 255], "long name"),
        Entry::file("acl", "acl").mode(0o640).xattr("system.posix_acl_access", ACL),
        Entry::file("xattrs", "xattrs")
            .xattr("user.small", "1")
            .xattr("user.large", vec![b'v'; 3000])
            .xattr("trusted.other", "t")
            .xattr("security.capability", CAPABILITY),
        Entry::directory("labelled").xattr("user.directory", vec![b'd'; 200]),
        Entry::directory("lower"),
        Entry::file("lower/gone", "hidden by a whiteout"),
        Entry::file("lower/kept", "kept"),
        Entry::file("lower/named-twice", "one name goes"),
        Entry::hard_link("named-twice", "lower/named-twice"),
        Entry::directory("lower/tree"),
        Entry::file("lower/tree/leaf", "gone with the tree"),
        Entry::directory("opaque"),
        Entry::file("opaque/old", "hidden"),
        Entry::directory("opaque/sub"),
        Entry::file("opaque/sub/old", "hidden"),
        Entry::directory("becomes-file"),
        Entry::file("becomes-file/child", ""),
        Entry::file("becomes-directory", "file"),
        Entry::file("rewritten", "first version, longer than the second"),
        Entry::file("shared", "one inode"),
        Entry::hard_link("shared2", "shared"),
        Entry::directory("usr"),
        Entry::directory("usr/lib"),
        Entry::symlink("lib", "usr/lib"),
        Entry::directory("many"),
    ];
    let mut deep = String::from("deep");
    entries.push(Entry::directory(&deep));
    for level in 0..100 {
        deep.push_str(&format!("/{level}"));
        entries.push(Entry::directory(&deep).owner(level, 0));
    }
    entries.push(Entry::file(format!("{deep}/bottom"), "deep"));
    entries.extend((0..10_000).map(|n| Entry::file(format!("many/file-with-a-name-{n}"), format!("{n}"))));
    entries
}

fn upper() -> Vec<Entry> {
    vec![
        Entry::file("lower/.wh.gone", ""),
        Entry::file("lower/.wh.tree", ""),
        Entry::file("lower/.wh.named-twice", ""),
        Entry::file("lower/.wh.never-there", ""),
        Entry::directory("opaque").mode(0o700),
        // The marker stands behind an entry of its own layer, which it must not hide.
        Entry::file("opaque/new", "visible"),
        Entry::file("opaque/.wh..wh..opq", ""),
        Entry::file("becomes-file", "now a file"),
        Entry::directory("becomes-directory").mode(0o750),
        Entry::file("becomes-directory/child", "inside"),
        Entry::file("rewritten", "second"),
        // Another inode takes the name; the other name keeps the old one.
        Entry::file("shared2", "its own inode"),
        Entry::hard_link("across", "one"),
        // Through the link of the lower layer.
        Entry::file("lib/through-link", "in usr/lib"),
        Entry::directory("bin").mode(0o555).owner(1, 2).mtime("1650000000"),
    ]
}

fn top() -> Vec<Entry> {
    vec![
        Entry::file(".wh.many-more", ""),
        Entry::file("many/.wh.file-with-a-name-77", ""),
        Entry::file("many/file-with-a-name-78", "replaced on top"),
        Entry::hard_link("across2", "across"),
        Entry::file("lower/gone", "back again"),
    ]
}

fn unpack(image: &Path, bundle: &Path) {
    let reference = format!("{}:test", image.display());
    let args = ["unpack".as_ref(), "--image".as_ref(), reference.as_ref(), bundle.as_os_str()];
    succeed("umoci", &args);
}

#[test]
fn the_kernel_shows_what_umoci_unpacks() {
    if !may_mount() {
        return;
    }
    let image = TestImage::new(&[layer(&base()), layer(&upper()), layer(&top())]);
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    let report = rootfs_tools::build(&image.open(), &BuildOptions::default(), &rootfs, &mut |_| {}).unwrap();
    assert_eq!(report.dropped_xattrs, 0);
    assert_clean(&rootfs);

    let bundle = dir.path().join("bundle");
    unpack(image.path(), &bundle);
    let mut expected = snapshot(&bundle.join("rootfs"));
    let mount = Mount::new(&rootfs, "ro");
    let mut got = snapshot(mount.path());
    // lost+found is a subdirectory of ours only.
    for root in [&mut expected, &mut got] {
        root.get_mut(&b""[..]).unwrap().links = 0;
    }
    let names = |tree: &crate::oracle::Snapshot| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&got), names(&expected));
    for (path, expected) in &expected {
        let got = &got[path];
        assert!(got.contents == expected.contents, "contents of {}", String::from_utf8_lossy(path));
        let bare = |seen: &crate::oracle::Seen| crate::oracle::Seen { contents: Vec::new(), ..seen.clone() };
        assert_eq!(bare(got), bare(expected), "{}", String::from_utf8_lossy(path));
    }
    assert!(expected.len() > 10_150, "{} entries were compared", expected.len());
    assert_eq!(got[&b"bin/ping"[..]].xattrs[&b"security.capability"[..]], CAPABILITY);
}
