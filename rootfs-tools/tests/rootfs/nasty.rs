//! Random nasty layers: everything that a layer may hold, through every reader that we have.
//!
//! `PROPTEST_CASES=1000 cargo nextest run -p rootfs-tools nasty` runs for long.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oci::layer::Compression;
use proptest::collection::vec;
use proptest::prelude::*;
use rootfs_tools::{BuildOptions, Size, build};
use tar::EntryType;

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, Seen, assert_clean, may_mount, snapshot};

/// `struct vfs_cap_data` of revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A `posix_acl_xattr` with a named user, for mode 0640.
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 232, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16,
    0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

/// What one step does to a small set of names, so that steps and layers meet.
#[derive(Clone, Debug)]
struct Step {
    /// Where, of [`NAMES`] at each depth.
    path: Vec<usize>,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(u8, usize)>,
}

#[derive(Clone, Debug)]
enum What {
    Directory,
    Opaque,
    Whiteout,
    File { length: usize, seed: u8, hole: bool },
    Symlink { length: usize },
    HardLink { nth: usize },
    Device { block: bool, major: u32, minor: u32 },
    Fifo,
}

const NAMES: [&[u8]; 8] =
    [b"a", b"b", b"not-utf8-\xff\xfe\x80", &[b'n'; 255], b" blank\nand line ", b"c", b"\x01", b"...dots"];

fn step() -> impl Strategy<Value = Step> {
    let what = prop_oneof![
        6 => Just(What::Directory),
        1 => Just(What::Opaque),
        2 => Just(What::Whiteout),
        8 => (prop_oneof![Just(0usize), Just(1), Just(4095), Just(4096), Just(4097), 0usize..70_000], any::<u8>(), any::<bool>())
            .prop_map(|(length, seed, hole)| What::File { length, seed, hole }),
        3 => prop_oneof![Just(1usize), Just(59), Just(60), Just(61), Just(255), Just(4095), 1usize..4096]
            .prop_map(|length| What::Symlink { length }),
        3 => (0usize..64).prop_map(|nth| What::HardLink { nth }),
        2 => (any::<bool>(), 0u32..4096, prop_oneof![0u32..256, 0u32..1 << 20])
            .prop_map(|(block, major, minor)| What::Device { block, major, minor }),
        1 => Just(What::Fifo),
    ];
    // umoci counts nanoseconds in 64 bits, which end in 2262; of the first second of ext4 its kernel keeps no fraction.
    let mtime = (
        prop_oneof![
            Just(1 - (1i64 << 31)),
            Just(-1),
            Just(0),
            Just(1i64 << 31),
            Just(1i64 << 32),
            1 - (1i64 << 31)..9_200_000_000
        ],
        prop_oneof![Just(0u32), Just(999_999_999), 0u32..1_000_000_000],
    );
    let owner =
        (any::<u32>(), any::<u32>()).prop_map(|(uid, gid)| (uid.min(u32::MAX - 1), gid.min(u32::MAX - 1)));
    // Not empty: PAX lets an empty value take a record away, which umoci does, and we keep an empty attribute.
    let xattrs = vec((0u8..4, prop_oneof![1usize..100, Just(3000usize)]), 0..3);
    (vec(0..NAMES.len(), 1..5), what, 0u32..0o10000, owner, mtime, xattrs)
        .prop_map(|(path, what, mode, owner, mtime, xattrs)| Step { path, what, mode, owner, mtime, xattrs })
}

/// What the names are so far, so that no step is an error: errors are the business of the hostile layers.
#[derive(Default)]
struct Known {
    nodes: std::collections::BTreeMap<Vec<u8>, bool>,
}

impl Known {
    fn remove_below(&mut self, path: &[u8]) {
        let prefix = [path, b"/"].concat();
        self.nodes.retain(|name, _| !name.starts_with(&prefix));
    }

    /// The directories above are all directories.
    fn has_parents(&self, path: &[u8]) -> bool {
        let above = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at]);
        above.into_iter().all(|parent| self.nodes.get(parent) == Some(&true))
    }
}

/// The entries of one layer on top of what is known.
fn entries(steps: &[Step], known: &mut Known) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut touched: Vec<Vec<u8>> = Vec::new();
    for step in steps {
        let path = step.path.iter().map(|&name| NAMES[name]).collect::<Vec<_>>().join(&b'/');
        if path.len() > 1000 || !known.has_parents(&path) {
            continue;
        }
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(at) => (&path[..=at], &path[at + 1..]),
            None => (&b""[..], &path[..]),
        };
        let is_directory = known.nodes.get(&path) == Some(&true);
        // Readers differ in whether one layer may hide what it brought itself; the specification says that it does not.
        let is_own = |path: &[u8], touched: &[Vec<u8>]| {
            let below = [path, b"/"].concat();
            touched.iter().any(|own| own == path || own.starts_with(&below))
        };
        let fresh = !is_own(&path, &touched);
        let mut entry = match &step.what {
            What::Whiteout => {
                if fresh && name.len() <= 250 && known.nodes.contains_key(&path) {
                    entries.push(Entry::file([parent, b".wh.", name].concat(), ""));
                    known.nodes.remove(&path);
                    known.remove_below(&path);
                }
                continue;
            }
            What::Opaque => {
                if fresh && is_directory {
                    entries.push(Entry::directory(&path));
                    entries.push(Entry::file([&path[..], b"/.wh..wh..opq"].concat(), ""));
                    known.remove_below(&path);
                    touched.push(path.clone());
                }
                continue;
            }
            // A name is of one kind in one layer, and a directory comes before what is in it.
            _ if !fresh => continue,
            What::Directory => Entry::directory(&path),
            What::File { length, seed, hole } => {
                let mut data: Vec<u8> = (0..*length).map(|n| (n as u8).wrapping_mul(31) ^ seed | 1).collect();
                if *hole && *length > 16_384 {
                    data[4096..12_288].fill(0);
                }
                Entry::file(&path, data)
            }
            What::Symlink { length } => Entry::symlink(&path, &b"dangling/".repeat(456)[..*length]),
            What::HardLink { nth } => {
                let files: Vec<_> = known.nodes.iter().filter(|(_, directory)| !**directory).collect();
                let Some((target, _)) =
                    files.get(*nth % files.len().max(1)).filter(|(target, _)| **target != path)
                else {
                    continue;
                };
                let link = Entry::hard_link(&path, target);
                // Its inode is the target's: nothing of its own is applied.
                known.remove_below(&path);
                known.nodes.insert(path.clone(), false);
                touched.push(path);
                entries.push(link);
                continue;
            }
            What::Device { block, major, minor } => {
                Entry::device(&path, if *block { EntryType::Block } else { EntryType::Char }, *major, *minor)
            }
            What::Fifo => Entry::fifo(&path),
        };
        entry =
            entry.mode(step.mode).owner(step.owner.0.into(), step.owner.1.into()).mtime(pax_time(step.mtime));
        // Linux gives every link this mode, so umoci's has no other.
        if matches!(step.what, What::Symlink { .. }) {
            entry = entry.mode(0o777);
        }
        let is_file = matches!(step.what, What::File { .. });
        if is_file || matches!(step.what, What::Directory) {
            for (kind, length) in &step.xattrs {
                let value = vec![b'v'; *length];
                entry = match kind {
                    0 => entry.xattr("user.one", value),
                    1 if step.xattrs.len() == 1 => entry.xattr("trusted.two", value),
                    2 if is_file => entry.xattr("security.capability", CAPABILITY),
                    3 if is_file => entry.mode(0o640).xattr("system.posix_acl_access", ACL),
                    _ => entry,
                };
            }
            entry.xattrs.dedup_by(|a, b| a.0 == b.0);
        }
        if !matches!(step.what, What::Directory) || !is_directory {
            known.remove_below(&path);
        }
        known.nodes.insert(path.clone(), matches!(step.what, What::Directory));
        touched.push(path);
        entries.push(entry);
    }
    entries
}

/// Seconds and the nanoseconds after them, as PAX writes them: with a sign before the whole number.
fn pax_time((seconds, nanoseconds): (i64, u32)) -> String {
    match (seconds, nanoseconds) {
        (seconds, 0) => format!("{seconds}"),
        (seconds, _) if seconds < 0 => {
            format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
        }
        _ => format!("{seconds}.{nanoseconds:09}"),
    }
}

/// The tree as the kernel shows it, against umoci's unpacking of the same layers.
fn compare_with_umoci(image: &TestImage, rootfs: &Path, folder: &Path) {
    let bundle = folder.join("bundle");
    let reference = format!("{}:test", image.path().display());
    let args = ["unpack".as_ref(), "--image".as_ref(), reference.as_ref(), bundle.as_os_str()];
    let unpacked = crate::oracle::run("umoci", &args);
    let said = String::from_utf8_lossy(&unpacked.stderr);
    // It takes away what has a link's name before it links: a link to itself is refused there, and no change for us.
    if said.contains("link: no such file or directory") {
        eprintln!("umoci does not unpack this one: {said}");
        return;
    }
    assert!(unpacked.status.success(), "umoci: {said}");
    let mut expected = snapshot(&bundle.join("rootfs"));
    let mount = Mount::new(rootfs, "ro");
    let mut got = snapshot(mount.path());
    for tree in [&mut expected, &mut got] {
        // No layer describes the root, and lost+found is a subdirectory of ours only.
        tree.remove(&b""[..]);
    }
    let names = |tree: &crate::oracle::Snapshot| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&got), names(&expected));
    for (path, expected) in &expected {
        let bare = |seen: &Seen| Seen { contents: Vec::new(), ..seen.clone() };
        let shown = String::from_utf8_lossy(path);
        assert!(got[path].contents == expected.contents, "contents of {shown}");
        assert_eq!(bare(&got[path]), bare(expected), "{shown}");
    }
}

/// Writes to files at random places of a mounted copy, then checks it.
fn write_at_random(rootfs: &Path, writes: &[(usize, u16, u8)]) {
    let mount = Mount::new(rootfs, "rw");
    let files: Vec<_> = snapshot(mount.path())
        .into_iter()
        .filter(|(_, seen)| seen.mode & 0o170_000 == 0o100_000)
        .map(|(path, _)| path)
        .collect();
    for (nth, at, byte) in writes {
        use std::os::unix::ffi::OsStrExt;
        let Some(path) = files.get(nth % files.len().max(1)) else { break };
        let path = mount.path().join(std::ffi::OsStr::from_bytes(path));
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&vec![*byte; 6000], u64::from(*at) * 7).unwrap();
    }
    for number in 0..20 {
        fs::write(mount.path().join(format!("new-{number}")), vec![1; 5000]).unwrap();
    }
    drop(mount);
    assert_clean(rootfs);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(24),
        max_shrink_iters: 60,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nasty_layers_are_what_umoci_and_the_kernel_say(
        layers in vec(vec(step(), 0..60), 1..5),
        compression in 0..3usize,
        writes in vec((any::<usize>(), any::<u16>(), any::<u8>()), 1..30),
    ) {
        let mut known = Known::default();
        let layers: Vec<Vec<u8>> = layers.iter().map(|steps| layer(&entries(steps, &mut known))).collect();
        let compression = [Compression::None, Compression::Gzip, Compression::Zstd][compression];
        let image = TestImage::compressed(&layers, compression);
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1.ext4"), dir.path().join("2.ext4"));
        for path in [&first, &second] {
            let options = BuildOptions { size: Size::Free(16 << 20), ..Default::default() };
            build(&image.open(), &options, path, &mut |_| {}).unwrap();
        }
        prop_assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
        assert_clean(&first);
        if may_mount() {
            // umoci does not read zstd.
            compare_with_umoci(&TestImage::new(&layers), &first, dir.path());
            write_at_random(&second, &writes);
        }
    }
}
