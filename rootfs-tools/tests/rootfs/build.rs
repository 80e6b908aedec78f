//! What `build` makes, seen without a mount.

use std::fs;
use std::path::Path;

use rootfs_tools::{BuildOptions, BuildReport, Error, Progress, Size, build};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{assert_clean, debugfs, view};

fn build_to(image: &TestImage, size: Size, path: &Path) -> Result<BuildReport, Error> {
    build(&image.open(), &BuildOptions { size, ..Default::default() }, path, &mut |_| {})
}

fn small() -> TestImage {
    TestImage::new(&[layer(&[
        Entry::directory("etc"),
        Entry::file("etc/hostname", "box\n"),
        Entry::file("data", vec![b'd'; 5 << 20]),
        Entry::symlink("link", "etc/hostname"),
    ])])
}

#[test]
fn the_same_image_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("1"), dir.path().join("2"));
    let image = small();
    let reports = [&first, &second].map(|path| build_to(&image, Size::Minimal, path).unwrap());
    let bytes = fs::read(&first).unwrap();
    assert!(bytes == fs::read(&second).unwrap());
    assert_eq!(reports[0].digest, reports[1].digest);
    assert_eq!(reports[0].digest, oci::Hasher::digest_of(&bytes));
    assert_eq!(reports[0].size, bytes.len() as u64);
    assert_eq!(reports[0].data, (5 << 20) + 4);
    assert_eq!(reports[0].entries, 6, "root, lost+found, etc, hostname, data, link");
    assert_clean(&first);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<Vec<u8>> = (0..6u8)
        .map(|number| {
            let files = (0..40).map(|n| {
                Entry::file(
                    format!("d{}/f{n}", n % 7),
                    vec![number ^ n as u8; 1000 * n + usize::from(number)],
                )
            });
            layer(&files.collect::<Vec<_>>())
        })
        .collect();
    let image = TestImage::new(&layers);
    let build_with = |threads| {
        let path = dir.path().join("rootfs.ext4");
        let threads = std::num::NonZeroUsize::new(threads);
        let options = BuildOptions { threads, ..BuildOptions::default() };
        let report = build(&image.open(), &options, &path, &mut |_| {}).unwrap();
        assert_clean(&path);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
        (report.digest, fs::read(&path).unwrap())
    };
    let one = build_with(1);
    for threads in [2, 5, 64] {
        assert!(build_with(threads) == one, "{threads} threads");
    }
}

#[test]
fn plain_and_compressed_layers_give_the_same_tree() {
    let dir = tempfile::tempdir().unwrap();
    let layers = [
        layer(&[Entry::file("a", "lower"), Entry::file("b", vec![1; 70_000])]),
        layer(&[Entry::file("a", "upper")]),
    ];
    let views = [TestImage::new(&layers), TestImage::plain(&layers)].map(|image| {
        let path = dir.path().join("rootfs.ext4");
        build_to(&image, Size::Minimal, &path).unwrap();
        assert_clean(&path);
        view(&path)
    });
    assert_eq!(views[0], views[1]);
    assert_eq!(views[0][&b"a"[..]].contents, b"upper");
}

#[test]
fn sizes_are_kept_or_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let image = small();
    let minimal = build_to(&image, Size::Minimal, &path).unwrap().size;
    assert!((5 << 20..6 << 20).contains(&minimal), "{minimal}");

    let report = build_to(&image, Size::Exact(64 << 20), &path).unwrap();
    assert_eq!((report.size, fs::metadata(&path).unwrap().len()), (64 << 20, 64 << 20));
    assert_clean(&path);

    let report = build_to(&image, Size::Exact(minimal), &path).unwrap();
    assert_eq!(report.size, minimal, "the minimal size is enough");
    assert_clean(&path);

    let free = build_to(&image, Size::Free(32 << 20), &path).unwrap();
    assert!(free.size >= minimal + (32 << 20), "{}", free.size);
    let stats = debugfs(&path, "stats -h");
    let blocks = stats.lines().find_map(|line| line.strip_prefix("Free blocks:")).unwrap().trim();
    assert!(blocks.parse::<u64>().unwrap() >= (32 << 20) / 4096, "{stats}");
    assert_clean(&path);

    fs::remove_file(&path).unwrap();
    let error = build_to(&image, Size::Exact(3 << 20), &path).unwrap_err();
    assert!(
        matches!(error, Error::TooLarge { needed, asked } if needed == minimal && asked == 3 << 20),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(text.contains("6 MiB") && text.contains("3 MiB"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn an_image_without_layers_is_a_root() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    build_to(&TestImage::new(&[]), Size::Minimal, &path).unwrap();
    assert_clean(&path);
    let seen = view(&path);
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[&b""[..]].mode, seen[&b""[..]].uid), (0o755, 0));
}

#[test]
fn missing_parents_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let image = TestImage::new(&[layer(&[Entry::file("a/b/c", "deep").owner(9, 9)])]);
    build_to(&image, Size::Minimal, &path).unwrap();
    assert_clean(&path);
    let seen = view(&path);
    assert_eq!((seen[&b"a/b"[..]].kind, seen[&b"a/b"[..]].mode, seen[&b"a/b"[..]].uid), ('d', 0o755, 0));
    assert_eq!(seen[&b"a/b/c"[..]].contents, b"deep");
}

/// More leaves than one level of index holds: 507 leaves with 15 names of 255 bytes each.
#[test]
fn a_directory_with_two_levels_of_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let entries: Vec<Entry> = (0..9000).map(|n| Entry::file(format!("d/{n:0255}"), "")).collect();
    build_to(&TestImage::plain(&[layer(&entries)]), Size::Minimal, &path).unwrap();
    assert_clean(&path);
    assert_eq!(view(&path).len(), 9002);
    assert!(debugfs(&path, "htree_dump d").contains("Indirect levels: 1"));
}

#[test]
fn a_hundred_thousand_entries() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let entries: Vec<Entry> = (0..100_000).map(|n| Entry::fifo(format!("d/entry-{n}"))).collect();
    let report = build_to(&TestImage::plain(&[layer(&entries)]), Size::Minimal, &path).unwrap();
    assert_eq!(report.entries, 100_003);
    assert_clean(&path);
}

#[test]
fn more_subdirectories_than_a_link_count_holds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let entries: Vec<Entry> = (0..65_000).map(|n| Entry::directory(format!("d/{n}"))).collect();
    build_to(&TestImage::plain(&[layer(&entries)]), Size::Minimal, &path).unwrap();
    assert_clean(&path);
    assert!(debugfs(&path, "stat d").contains("Links: 1 "));
}

#[test]
fn lost_found_of_the_image_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let image = TestImage::new(&[layer(&[
        Entry::directory("lost+found").mode(0o701),
        Entry::file("lost+found/#1", "found"),
    ])]);
    build_to(&image, Size::Minimal, &path).unwrap();
    assert_clean(&path);
    assert!(debugfs(&path, "stat lost+found").contains("Mode:  0701"));
    assert_eq!(debugfs(&path, "cat lost+found/#1"), "found");
}

#[test]
fn times_beyond_what_ext4_holds_become_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let image = TestImage::new(&[layer(&[
        Entry::file("last", "").mtime("15032385535.5"),
        Entry::file("later", "").mtime("99999999999.5"),
        Entry::file("earlier", "").mtime("-99999999999.5"),
    ])]);
    build_to(&image, Size::Minimal, &path).unwrap();
    assert_clean(&path);
    for (name, raw) in [
        ("last", "mtime: 0x7fffffff:77359403"),
        ("later", "mtime: 0x7fffffff:00000003"),
        ("earlier", "mtime: 0x80000000:00000000"),
    ] {
        let stat = debugfs(&path, &format!("stat {name}"));
        assert!(stat.contains(raw), "{name}: {stat}");
    }
}

/// A whiteout of one name of an inode once turned the inode into a directory under its other names.
#[test]
fn a_whiteout_spares_other_names_of_the_inode() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let image = TestImage::new(&[
        layer(&[Entry::file("a", "data"), Entry::hard_link("b", "a")]),
        layer(&[Entry::file(".wh.a", "")]),
    ]);
    build_to(&image, Size::Minimal, &path).unwrap();
    assert_clean(&path);
    let seen = view(&path);
    assert_eq!(seen.get(&b"a"[..]), None);
    assert_eq!(seen[&b"b"[..]].contents, b"data");
}

#[test]
fn attributes_that_mean_harm_or_nothing_are_left_out_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let entry = Entry::file("f", "")
        .xattr("com.apple.quarantine", "q")
        .xattr("trusted.overlay.redirect", "/etc")
        .xattr("user.kept", "k");
    let report = build_to(&TestImage::new(&[layer(&[entry])]), Size::Minimal, &path).unwrap();
    assert_eq!(report.dropped_xattrs, 2);
    assert_clean(&path);
    assert!(debugfs(&path, "ea_list f").contains("user.kept (1) = \"k\""));
    assert!(!debugfs(&path, "ea_list f").contains("overlay"));
}

#[test]
fn what_ext4_cannot_hold_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let refuse = |entry: Entry| {
        let error =
            build_to(&TestImage::new(&[layer(&[Entry::directory("d"), entry])]), Size::Minimal, &path)
                .unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        error.to_string()
    };
    let device = refuse(Entry::device("d/dev", tar::EntryType::Char, 4096, 0));
    assert!(device.contains("/d/dev") && device.contains("4096:0"), "{device}");
    let xattrs = refuse(Entry::file("d/x", "").xattr("user.a", vec![0; 5000]));
    assert!(xattrs.contains("/d/x") && xattrs.contains("4060"), "{xattrs}");
    let acl = refuse(Entry::file("d/x", "").xattr("system.posix_acl_access", "no acl"));
    assert!(acl.contains("ACL"), "{acl}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn progress_goes_forward_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rootfs.ext4");
    let mut seen = Vec::new();
    let report =
        build(&small().open(), &BuildOptions::default(), &path, &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(seen.first(), Some(&Progress::Indexing { layer: 1, layers: 1 }));
    assert_eq!(seen.last(), Some(&Progress::Syncing));
    let written: Vec<u64> = seen
        .iter()
        .filter_map(|progress| match progress {
            Progress::Writing { done, .. } => Some(*done),
            _ => None,
        })
        .collect();
    assert!(written.is_sorted());
    assert_eq!(written.last(), Some(&report.size));
}
