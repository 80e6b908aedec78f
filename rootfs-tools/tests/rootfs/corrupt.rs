//! Damaged images: an error or findings, and an end.

use std::fs;
use std::sync::LazyLock;

use proptest::prelude::*;
use rootfs_tools::{BuildOptions, Content, DataSource, Error, FileSystem, NodeId, build};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::succeed;

/// Small images with everything that a reader has code for: ours, and those of mke2fs with its other layouts.
static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let long = |n| format!("a-name-that-fills-the-block-{n:0>100}");
    let mut entries = vec![
        Entry::directory("d"),
        Entry::file("d/file", "data").xattr("user.small", "1").xattr("user.large", vec![b'v'; 3000]),
        Entry::hard_link("hard", "d/file"),
        Entry::symlink("fast", "d/file"),
        Entry::symlink("slow", "x".repeat(100)),
        Entry::fifo("pipe"),
        Entry::directory("many"),
    ];
    entries.extend((0..80).map(|n| Entry::file(format!("many/{}", long(n)), "")));
    let ours = dir.path().join("ours");
    build(&TestImage::new(&[layer(&entries)]).open(), &BuildOptions::default(), &ours, &mut |_| {}).unwrap();

    let root = dir.path().join("root");
    fs::create_dir_all(root.join("many")).unwrap();
    for n in 0..40 {
        fs::write(root.join("many").join(long(n)), "").unwrap();
    }
    fs::write(root.join("blocks"), vec![b'b'; 30_000]).unwrap();
    std::os::unix::fs::symlink("y".repeat(100), root.join("slow")).unwrap();
    let mut images = vec![fs::read(&ours).unwrap()];
    for (kind, features) in [("ext2", "none,dir_index,filetype"), ("ext4", "^has_journal,inline_data")] {
        let image = dir.path().join(kind);
        let args = ["-q", "-F", "-b", "1024", "-t", kind, "-O", features, "-d"].map(std::ffi::OsStr::new);
        let rest = [root.as_os_str(), image.as_os_str(), "700K".as_ref()];
        succeed("mke2fs", &[&args[..], &rest].concat());
        images.push(fs::read(&image).unwrap());
    }
    images
});

/// The bytes of each that are worth a change: zeros are mostly free space.
static USED: LazyLock<Vec<Vec<usize>>> = LazyLock::new(|| {
    let used = |image: &Vec<u8>| (1024..image.len()).filter(|&at| !matches!(image[at], 0 | b'b')).collect();
    IMAGES.iter().map(used).collect()
});

/// Reads all that there is: every name, attribute and byte. Data is bounded by what the image has, not by what it says.
fn read_everything(fs: &FileSystem) -> Result<u64, Error> {
    let tree = fs.tree()?.tree;
    let mut total = 0;
    let mut stack = vec![NodeId::ROOT];
    let mut buffer = vec![0; 64 << 10];
    while let Some(id) = stack.pop() {
        if let Content::File { size, data } = &tree.node(id).content {
            for run in data.runs(*size) {
                assert!(run.start + run.length <= *size);
                for from in (0..run.length).step_by(buffer.len()) {
                    let now = (run.length - from).min(buffer.len() as u64) as usize;
                    let mut place = run.place;
                    place.offset += from;
                    fs.data().read(place, &mut buffer[..now])?;
                    total += now as u64;
                }
            }
        }
        stack.extend(tree.children(id).into_iter().flat_map(|names| names.values()).map(|name| name.node));
    }
    Ok(total)
}

fn walk(bytes: Vec<u8>, checked: bool) {
    let length = bytes.len() as u64;
    let opened = if checked { FileSystem::open_bytes(bytes) } else { FileSystem::open_unchecked(bytes) };
    let Ok(fs) = opened else { return };
    if let Ok(total) = read_everything(&fs) {
        // Names of one file count again.
        assert!(total <= 100 * length, "{total} bytes out of {length}");
    }
    if let Ok((findings, total)) = fs.check_all() {
        assert!(findings.len() as u64 <= total && findings.len() <= rootfs_tools::MAX_FINDINGS);
    }
}

#[test]
fn the_images_are_whole_before_they_are_damaged() {
    for bytes in IMAGES.iter() {
        let fs = FileSystem::open_bytes(bytes.clone()).unwrap();
        read_everything(&fs).unwrap();
        assert_eq!(fs.check_all().unwrap(), (Vec::new(), 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Twice: what the checksums keep out, and what gets past them when whoever made the image mended them.
    #[test]
    fn flipped_bytes_end_in_an_error_or_in_findings(
        which in 0usize..3,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let good = &IMAGES[which];
        let used = &USED[which];
        let mut bytes = good.clone();
        for (index, value) in &changes {
            let at = used[index.index(used.len())];
            bytes[at] = *value;
        }
        walk(bytes.clone(), true);
        walk(bytes, false);
    }
}
