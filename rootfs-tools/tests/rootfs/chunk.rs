//! Files to chunks and back, also with chunks and manifests that are not what they say.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rootfs_tools::chunk::{ChunkError, ChunkSize, ChunkStore, ContentDigest, Manifest, join, split};
use rootfs_tools::{BuildOptions, Error, build};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::assert_clean;

const SIZE: u64 = 4096;

fn size() -> ChunkSize {
    ChunkSize::new(SIZE).unwrap()
}

/// A chunk that is like no chunk of another seed, and does not compress to nothing.
fn block(seed: u64) -> Vec<u8> {
    (0..SIZE / 8).flat_map(|n| (seed << 32 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// The files of all chunks in a store.
fn chunk_files(store: &Path) -> Vec<PathBuf> {
    let list = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    list(&store.join("sha256")).flat_map(|shard| list(&shard).collect::<Vec<_>>()).collect()
}

fn file_of(store: &Path, chunk: &[u8]) -> PathBuf {
    let digest = ContentDigest::of(chunk).to_string();
    let (shard, name) = digest["sha256:".len()..].split_at(2);
    store.join("sha256").join(shard).join(name)
}

fn chunk_error(error: Error) -> ChunkError {
    assert!(error.is_bad_input());
    let Error::Chunk(error) = error else { panic!("{error:?}") };
    error
}

#[test]
fn files_share_chunks_and_come_back_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = ChunkStore::open_or_create(&root).unwrap();
    let zeros = vec![0; 300 * SIZE as usize];
    let one = [&block(1)[..], &block(2), &zeros, &block(1), b"tail"].concat();
    let two = [&block(2)[..], &block(3), &zeros[..10]].concat();

    let (manifest, report) = split(&write(dir.path(), "one", &one), &store, size()).unwrap();
    assert_eq!((report.chunks, report.zero, report.new, report.reused), (304, 300, 3, 1));
    assert_eq!((report.size, report.new_bytes), (one.len() as u64, 2 * SIZE + 4));
    let on_disk: u64 = chunk_files(&root).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert_eq!(report.stored_bytes, on_disk);
    let (other, report) = split(&write(dir.path(), "two", &two), &store, size()).unwrap();
    assert_eq!((report.chunks, report.zero, report.new, report.reused), (3, 1, 1, 1));
    assert_eq!(chunk_files(&root).len(), 4);
    assert_eq!(fs::read_dir(root.join("incoming")).unwrap().count(), 0);

    for (manifest, bytes) in [(&manifest, &one), (&other, &two)] {
        let out = dir.path().join("out");
        let report = join(manifest, &store, &out).unwrap();
        assert!(fs::read(&out).unwrap() == *bytes);
        assert_eq!((report.size, report.digest), (bytes.len() as u64, ContentDigest::of(bytes)));
    }
    let out = dir.path().join("out");
    join(&manifest, &store, &out).unwrap();
    assert!(fs::metadata(&out).unwrap().blocks() * 512 < 100 * SIZE, "zeros are holes");
}

#[test]
fn an_image_survives_and_its_manifest_is_the_same_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    let image = TestImage::new(&[layer(&[
        Entry::file("data", (0..200).flat_map(block).collect::<Vec<_>>()),
        Entry::file("zeros", vec![0; 1 << 20]),
    ])]);
    build(&image.open(), &BuildOptions::default(), &rootfs, &mut |_| {}).unwrap();
    let texts = ["one", "two"].map(|name| {
        let store = ChunkStore::open_or_create(&dir.path().join(name)).unwrap();
        split(&rootfs, &store, ChunkSize::default()).unwrap().0.to_json()
    });
    assert_eq!(texts[0], texts[1]);
    let store = ChunkStore::open(&dir.path().join("one")).unwrap();
    let out = dir.path().join("out.ext4");
    join(&Manifest::parse("m", &texts[0]).unwrap(), &store, &out).unwrap();
    assert!(fs::read(&out).unwrap() == fs::read(&rootfs).unwrap());
    assert_clean(&out);
}

#[test]
fn a_missing_or_damaged_chunk_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = ChunkStore::open_or_create(&root).unwrap();
    let bytes: Vec<u8> = (0..50).flat_map(block).collect();
    let (manifest, _) = split(&write(dir.path(), "file", &bytes), &store, size()).unwrap();
    let victim = file_of(&root, &block(30));
    let good = fs::read(&victim).unwrap();
    let out = dir.path().join("out");
    let refuse = || {
        let error = chunk_error(join(&manifest, &store, &out).unwrap_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left after {error}");
        error
    };
    let wanted = ContentDigest::of(&block(30));

    // Other contents of the right length, in a frame that is right.
    fs::copy(file_of(&root, &block(31)), &victim).unwrap();
    let error = refuse();
    let swapped = ContentDigest::of(&block(31)).to_string();
    assert!(
        matches!(&error, ChunkError::Damaged { digest, expected, got, .. }
            if *digest == wanted && *expected == wanted.to_string() && *got == swapped),
        "{error:?}"
    );
    assert!(error.to_string().contains(victim.to_str().unwrap()), "{error}");

    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let bomb = zstd::encode_all(&vec![0; 64 << 20][..], 1).unwrap();
    let longer = zstd::bulk::compress(&vec![7; SIZE as usize + 1], 1).unwrap();
    let huge = vec![0; 1 << 20];
    for bad in [&flipped[..], &good[..good.len() / 2], b"", b"no frame", &bomb, &longer, &huge] {
        fs::write(&victim, bad).unwrap();
        let error = refuse();
        assert!(matches!(&error, ChunkError::Damaged { digest, .. } if *digest == wanted), "{error:?}");
    }
    fs::remove_file(&victim).unwrap();
    assert!(matches!(refuse(), ChunkError::Missing { digest, .. } if digest == wanted));

    // Chunked again it is there again.
    split(&dir.path().join("file"), &store, size()).unwrap();
    join(&manifest, &store, &out).unwrap();
    assert!(fs::read(&out).unwrap() == bytes);
}

#[test]
fn a_manifest_that_lies_makes_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open_or_create(&dir.path().join("store")).unwrap();
    let bytes: Vec<u8> = (0..3).flat_map(block).collect();
    let (manifest, _) = split(&write(dir.path(), "file", &bytes), &store, size()).unwrap();
    let text = String::from_utf8(manifest.to_json()).unwrap();
    let [one, two] = [block(0), block(1)].map(|block| ContentDigest::of(&block).to_string());
    let swapped = text.replace(&one, "first").replace(&two, &one).replace("first", &two);
    let out = dir.path().join("out");
    let swapped = Manifest::parse("m", swapped.as_bytes()).unwrap();
    let error = chunk_error(join(&swapped, &store, &out).unwrap_err());
    let made = [block(1), block(0), block(2)].concat();
    assert!(
        matches!(&error, ChunkError::Lie { expected, got }
            if *expected == ContentDigest::of(&bytes) && *got == ContentDigest::of(&made).to_string()),
        "{error:?}"
    );
    // A chunk that is there, under a length that it has not.
    let shorter = text.replacen("\"size\":12288", "\"size\":12287", 1);
    let at = shorter.rfind("4096").unwrap();
    let shorter = Manifest::parse("m", format!("{}4095}}]}}", &shorter[..at]).as_bytes()).unwrap();
    let error = chunk_error(join(&shorter, &store, &out).unwrap_err());
    assert!(
        matches!(&error, ChunkError::Damaged { expected, got, .. }
            if expected == "4095 bytes" && got == "4096 bytes"),
        "{error:?}"
    );
    assert!(!out.exists());
}

#[test]
fn pruning_keeps_what_is_named_and_touches_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = ChunkStore::open_or_create(&root).unwrap();
    let chunked = |name: &str, blocks: std::ops::Range<u64>| {
        let bytes: Vec<u8> = blocks.flat_map(block).collect();
        split(&write(dir.path(), name, &bytes), &store, size()).unwrap().0
    };
    let (old, kept) = (chunked("old", 0..10), chunked("kept", 5..12));
    let error = ChunkStore::prune(&root, std::slice::from_ref(&kept)).unwrap_err();
    assert!(error.to_string().contains("prune when nobody does"), "{error}");

    drop(store);
    let foreign = root.join("sha256/00/README");
    fs::write(&foreign, "not a chunk").unwrap();
    let report = ChunkStore::prune(&root, std::slice::from_ref(&kept)).unwrap();
    assert_eq!((report.kept, report.removed, report.missing), (7, 5, 0));
    assert!(report.removed_bytes > 0 && foreign.exists());
    fs::remove_file(foreign).unwrap();
    assert_eq!(ChunkStore::prune(&root, &[old]).unwrap().missing, 5);

    let store = ChunkStore::open(&root).unwrap();
    let error = join(&kept, &store, &dir.path().join("out")).unwrap_err();
    assert!(matches!(chunk_error(error), ChunkError::Missing { .. }));
}

#[test]
fn what_is_no_store_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "file", b"mine");
    let no_store = |error: Error| {
        assert!(matches!(chunk_error(error), ChunkError::Store { .. }));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    };
    no_store(ChunkStore::open(dir.path()).unwrap_err());
    no_store(ChunkStore::open_or_create(dir.path()).unwrap_err());
    no_store(ChunkStore::prune(dir.path(), &[]).unwrap_err());
    fs::remove_file(file).unwrap();
    drop(ChunkStore::open_or_create(dir.path()).unwrap());
    fs::write(dir.path().join("chunk-store"), "tiffin chunk store 2\n").unwrap();
    let error = ChunkStore::open_or_create(dir.path()).unwrap_err();
    assert!(error.to_string().contains("store 2"), "{error}");
}

/// Each thread opens the store itself, as a process does.
#[test]
fn several_writers_at_once_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    std::thread::scope(|scope| {
        for writer in 0..4u64 {
            let (folder, root) = (dir.path(), &root);
            scope.spawn(move || {
                let bytes: Vec<u8> = (writer * 20..writer * 20 + 60).flat_map(block).collect();
                let file = write(folder, &format!("file-{writer}"), &bytes);
                let store = ChunkStore::open_or_create(root).unwrap();
                let (manifest, report) = split(&file, &store, size()).unwrap();
                assert_eq!(report.new + report.reused, 60);
                let out = folder.join(format!("out-{writer}"));
                join(&manifest, &store, &out).unwrap();
                assert!(fs::read(out).unwrap() == bytes);
            });
        }
    });
    assert_eq!(chunk_files(&root).len(), 120);
}

#[test]
fn leftovers_are_swept_when_nobody_writes() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open_or_create(dir.path()).unwrap();
    let leftover = dir.path().join("incoming/killed");
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("chunk"), b"half").unwrap();
    let other = ChunkStore::open_or_create(dir.path()).unwrap();
    assert!(leftover.exists(), "nothing is swept while somebody may write");
    drop((store, other));
    ChunkStore::open_or_create(dir.path()).unwrap();
    assert!(!leftover.exists());
}

#[test]
fn only_regular_files_are_chunked() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open_or_create(&dir.path().join("store")).unwrap();
    assert!(matches!(split(dir.path(), &store, size()).unwrap_err(), Error::Invalid { .. }));
    let missing = dir.path().join("missing");
    assert!(matches!(split(&missing, &store, size()).unwrap_err(), Error::Io { .. }));
    let (empty, report) = split(&write(dir.path(), "empty", b""), &store, size()).unwrap();
    assert_eq!((report.chunks, report.ratio), (0, 0.0));
    join(&empty, &store, &dir.path().join("out")).unwrap();
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), b"");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_file_comes_back(
        pieces in proptest::collection::vec((0u64..4, 1usize..9000), 0..40),
        shift in 12u32..15,
    ) {
        let bytes: Vec<u8> = pieces
            .iter()
            .flat_map(|&(seed, length)| match seed {
                0 => vec![0; length],
                seed => block(seed).into_iter().cycle().take(length).collect(),
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let store = ChunkStore::open_or_create(&dir.path().join("store")).unwrap();
        let file = write(dir.path(), "file", &bytes);
        let (manifest, report) = split(&file, &store, ChunkSize::new(1 << shift).unwrap()).unwrap();
        prop_assert_eq!(report.zero + report.new + report.reused, report.chunks);
        let parsed = Manifest::parse("m", &manifest.to_json()).unwrap();
        prop_assert_eq!(&parsed, &manifest);
        let out = dir.path().join("out");
        join(&parsed, &store, &out).unwrap();
        prop_assert!(fs::read(out).unwrap() == bytes);
    }
}

/// Two images on one base: what is in front of the base's data has another length in each, and most chunks are the same.
#[test]
fn images_share_the_chunks_of_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open_or_create(&dir.path().join("store")).unwrap();
    let file = |n: u64| {
        let data: Vec<u8> = (0..40).flat_map(|k| block(n * 100 + k)).skip((n * 37 % 4096) as usize).collect();
        Entry::file(format!("base/file-{n}"), data)
    };
    // 40 MiB of files whose sizes fit nothing.
    let base = layer(&(0..250).map(file).collect::<Vec<_>>());
    let own: Vec<Entry> = (0..300).map(|n| Entry::directory(format!("own-{n}"))).collect();
    let mut new = Vec::new();
    for (name, layers) in [("one", vec![base.clone()]), ("two", vec![base.clone(), layer(&own)])] {
        let image = TestImage::plain(&layers);
        let path = dir.path().join(name);
        build(&image.open(), &BuildOptions::default(), &path, &mut |_| {}).unwrap();
        assert_clean(&path);
        let (_, report) = split(&path, &store, ChunkSize::default()).unwrap();
        new.push(report.new as f64 / (report.chunks - report.zero) as f64);
    }
    assert!(new[0] > 0.95, "{new:?}");
    assert!(new[1] < 0.3, "{new:?}");
}
