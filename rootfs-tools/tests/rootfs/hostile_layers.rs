//! A table of layers that want to do harm: each ends in one clear error or in the outcome that the OCI image-spec gives it,
//! and nothing is written but the output.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use oci::layer::Compression;
use oci::{Hasher, Image, MediaType, Store};
use rootfs_tools::{BuildOptions, Error, build};
use serde_json::json;

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{assert_clean, view};

/// There to catch a hang; the slowest case takes seconds.
const BOUNDED: Duration = Duration::from_secs(300);

/// A header of a tar stream that nobody has checked, and its data.
fn raw(name: &[u8], kind: u8, size: [u8; 12], link: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_old();
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name);
    old.linkname[..link.len()].copy_from_slice(link);
    old.size = size;
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn octal(size: usize) -> [u8; 12] {
    let mut field = [0; 12];
    field[..11].copy_from_slice(format!("{size:011o}").as_bytes());
    field
}

fn pax(records: &[u8]) -> Vec<u8> {
    raw(b"pax", b'x', octal(records.len()), b"", records)
}

/// A PAX record whose length is right.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let length = (body..).find(|length| length.to_string().len() + body == *length).unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn file(name: &[u8], data: &[u8]) -> Vec<u8> {
    raw(name, b'0', octal(data.len()), b"", data)
}

/// A folder of its own for the output, inside one that must stay as it is.
struct Place {
    outside: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("canary"), "alive").unwrap();
        fs::create_dir(outside.path().join("output")).unwrap();
        Self { outside }
    }

    fn build(&self, image: &Image) -> Result<std::path::PathBuf, Error> {
        let folder = self.outside.path().join("output");
        let path = folder.join("rootfs.ext4");
        let started = Instant::now();
        let result = build(image, &BuildOptions::default(), &path, &mut |_| {});
        assert!(started.elapsed() < BOUNDED);
        assert_eq!(fs::read_to_string(self.outside.path().join("canary")).unwrap(), "alive");
        assert_eq!(fs::read_dir(self.outside.path()).unwrap().count(), 2, "something was written outside");
        assert_eq!(fs::read_dir(folder).unwrap().count(), usize::from(result.is_ok()), "{result:?}");
        result.map(|_| path)
    }

    fn refuse(&self, name: &str, image: &Image) -> String {
        let error = self.build(image).expect_err(name);
        assert!(error.is_bad_input(), "{name}: {error:?}");
        let text = error.to_string();
        assert!((10..2000).contains(&text.len()), "{name}: {text}");
        text
    }
}

/// An image whose manifest and config say whatever they are told.
struct Forged {
    folder: tempfile::TempDir,
}

impl Forged {
    fn new(blobs: &[(Vec<u8>, Compression, String)], size_of: impl Fn(u64) -> u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(folder.path()).unwrap();
        let mut layers = Vec::new();
        for (blob, compression, _) in blobs {
            let descriptor = store.put_blob(compression.media_type(), &blob[..]).unwrap();
            layers.push(json!({
                "mediaType": descriptor.media_type(), "digest": descriptor.digest(), "size": size_of(descriptor.size()),
            }));
        }
        let diff_ids: Vec<_> = blobs.iter().map(|(_, _, diff_id)| diff_id.clone()).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": layers,
        });
        let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
        store.tag("test", &manifest).unwrap();
        Self { folder }
    }

    /// One layer that is what it says.
    fn honest(blob: Vec<u8>, compression: Compression, tar: &[u8]) -> Self {
        Self::new(&[(blob, compression, Hasher::digest_of(tar).to_string())], |size| size)
    }

    fn open(&self) -> Result<Image, oci::Error> {
        Store::open(self.folder.path()).unwrap().image("test")
    }
}

fn pack(tar: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => tar.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(tar, 1).unwrap(),
    }
}

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Gzip, Compression::Zstd];

fn some_layer() -> Vec<u8> {
    let noise: Vec<u8> = (0..30_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    layer(&[Entry::directory("d"), Entry::file("d/noise", noise), Entry::symlink("l", "d/noise")])
}

/// The digest of the blob fits the damage here, so that the decompressor and the tar reader meet it.
#[test]
fn damaged_streams_under_digests_that_fit() {
    let place = Place::new();
    let tar = some_layer();
    for compression in COMPRESSIONS {
        let good = pack(&tar, compression);
        let step = (good.len() / 12).max(1);
        for at in (0..good.len() - 1).step_by(step) {
            let cut = Forged::honest(good[..at].to_vec(), compression, &tar);
            place.refuse(&format!("{compression:?} cut at {at}"), &cut.open().unwrap());
            let mut bytes = good.clone();
            bytes[at] ^= 0x55;
            let flipped = Forged::honest(bytes, compression, &tar);
            // gzip's header has bytes that mean nothing: the layer is then what its diff_id says.
            let harmless = compression == Compression::Gzip && at < 10;
            let image = flipped.open().unwrap();
            match place.build(&image) {
                Ok(path) if harmless => fs::remove_file(path).unwrap(),
                Ok(_) => panic!("{compression:?} flipped at {at} was taken"),
                Err(error) => assert!(error.is_bad_input(), "{error}"),
            }
        }
    }
}

#[test]
fn manifests_that_lie_about_a_layer() {
    let place = Place::new();
    let tar = some_layer();
    let diff_id = Hasher::digest_of(&tar).to_string();
    for compression in COMPRESSIONS {
        let blob = pack(&tar, compression);
        let other = Hasher::digest_of(b"other").to_string();
        let wrong = Forged::new(&[(blob.clone(), compression, other.clone())], |size| size);
        let text = place.refuse("diff_id", &wrong.open().unwrap());
        assert!(text.contains(&other) && text.contains(&diff_id), "{text}");
        for lie in [|size| size - 1, |size| size + 1, |_| 0, |_| u64::MAX / 4] {
            let lying = Forged::new(&[(blob.clone(), compression, diff_id.clone())], lie);
            place.refuse("size", &lying.open().unwrap());
        }
    }
    let many = vec![(pack(&[0; 1024], Compression::Zstd), Compression::Zstd, diff_id); 501];
    let error = Forged::new(&many, |size| size).open().unwrap_err().to_string();
    assert!(error.contains("501 layers") && error.contains("at most 500"), "{error}");
}

#[test]
fn entries_that_are_refused() {
    let place = Place::new();
    let long = vec![b'n'; 4096];
    let deep = b"d/".repeat(2500);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("more data than there is", raw(b"f", b'0', octal(100_000), b"", b"short")),
        ("a negative size", raw(b"f", b'0', *b"-0000000001\0", b"", b"")),
        ("a size of base-256 ones", raw(b"f", b'0', [0xff; 12], b"", b"")),
        ("the largest octal size", raw(b"f", b'0', *b"77777777777\0", b"", b"")),
        ("no number as a size", raw(b"f", b'0', *b"size\0\0\0\0\0\0\0\0", b"", b"")),
        ("a PAX size beyond the end", [pax(&record("size", b"999999")), file(b"f", b"data")].concat()),
        ("a PAX size of 2^64", [pax(&record("size", b"18446744073709551616")), file(b"f", b"")].concat()),
        ("a negative PAX size", [pax(&record("size", b"-1")), file(b"f", b"")].concat()),
        ("a negative PAX uid", [pax(&record("uid", b"-1")), file(b"f", b"")].concat()),
        ("a PAX uid beyond 32 bits", [pax(&record("uid", b"4294967296")), file(b"f", b"")].concat()),
        ("a PAX header of 4 GiB", raw(b"p", b'x', octal(0o40000000000 - 1), b"", b"")),
        ("a PAX record longer than its header", [pax(b"99999 path=x\n"), file(b"f", b"")].concat()),
        ("a PAX record of no length", [pax(b"0 path=x\n"), file(b"f", b"")].concat()),
        ("a PAX record without an end", [pax(b"10 path=xyz"), file(b"f", b"")].concat()),
        ("a NUL in a PAX path", [pax(&record("path", b"a\0b")), file(b"f", b"")].concat()),
        ("a GNU name of 1 GiB", raw(b"l", b'L', octal(1 << 30), b"", b"")),
        ("a name of 4 KiB", [pax(&record("path", &long)), file(b"f", b"")].concat()),
        ("a path longer than PATH_MAX", [pax(&record("path", &deep)), file(b"f", b"")].concat()),
        ("a traversal", file(b"a/../../etc/passwd", b"x")),
        ("a traversal in a whiteout", file(b"../.wh.canary", b"")),
        ("a whiteout of the parent", file(b"a/.wh...", b"")),
        ("a link to itself", raw(b"f", b'1', octal(0), b"f", b"")),
        ("a link to what comes later", [raw(b"f", b'1', octal(0), b"g", b""), file(b"g", b"")].concat()),
        (
            "two links to each other",
            [raw(b"f", b'1', octal(0), b"g", b""), raw(b"g", b'1', octal(0), b"f", b"")].concat(),
        ),
        (
            "a link to a directory",
            [raw(b"d", b'5', octal(0), b"", b""), raw(b"f", b'1', octal(0), b"d", b"")].concat(),
        ),
        ("a link to the root", raw(b"f", b'1', octal(0), b".", b"")),
        ("a link out of the root", raw(b"f", b'1', octal(0), b"../canary", b"")),
        ("a file below a file", [file(b"f", b""), file(b"f/g", b"")].concat()),
        ("a type that nobody knows", raw(b"f", b'Z', octal(0), b"", b"")),
        ("text in place of a tar", b"<html>not a layer</html>".repeat(100)),
    ];
    for (name, stream) in cases {
        for compression in [Compression::None, Compression::Gzip] {
            let image = Forged::honest(pack(&stream, compression), compression, &stream);
            place.refuse(name, &image.open().unwrap());
        }
    }
}

/// What looks bad and is well defined.
#[test]
fn entries_that_have_an_outcome() {
    let place = Place::new();
    let lower = layer(&[
        Entry::symlink("out", "/"),
        Entry::symlink("up", "../../../.."),
        Entry::symlink("dangling", "/nowhere/at/all"),
        Entry::file("twice", "first"),
        Entry::file("twice", "second"),
        Entry::directory("becomes-file"),
        Entry::file("becomes-file/child", "goes"),
        Entry::file("becomes-directory", "goes"),
        Entry::file("same", "linked"),
        Entry::hard_link("same2", "same"),
    ]);
    let upper = layer(&[
        Entry::file("/absolute", "inside"),
        Entry::file("out/through", "inside"),
        Entry::file("up/canary", "inside"),
        Entry::file("dangling/made", "inside"),
        Entry::file("becomes-file", "file"),
        Entry::directory("becomes-directory"),
        Entry::file("becomes-directory/child", "inside"),
        Entry::file(".wh.never-there", ""),
        Entry::file("never/there/.wh.either", ""),
        Entry::hard_link("/rooted-link", "/same"),
    ]);
    let image = TestImage::new(&[lower, layer(&[]), upper]);
    let path = place.build(&image.open()).unwrap();
    assert_clean(&path);
    let seen = view(&path);
    for (name, contents) in [
        ("absolute", "inside"),
        ("through", "inside"),
        ("canary", "inside"),
        ("nowhere/at/all/made", "inside"),
        ("twice", "second"),
        ("becomes-file", "file"),
        ("becomes-directory/child", "inside"),
        ("rooted-link", "linked"),
    ] {
        assert_eq!(seen[name.as_bytes()].contents, contents.as_bytes(), "{name}");
    }
    assert!(!seen.contains_key(&b"becomes-file/child"[..]));
}

/// zstd packs zeros a thousandfold and more; what bounds them is oci's ratio and its floor of 256 MiB.
#[test]
fn bombs_end() {
    let place = Place::new();
    let size = 400u64 << 20;
    let header = raw(b"zeros", b'0', octal(size as usize), b"", b"");
    for levels in [1, 19] {
        let mut encoder = zstd::Encoder::new(Vec::new(), levels).unwrap();
        encoder.write_all(&header).unwrap();
        std::io::copy(&mut std::io::repeat(0).take(size + 1024), &mut encoder).unwrap();
        let blob = encoder.finish().unwrap();
        assert!(blob.len() < 1 << 20);
        let bomb = Forged::honest(blob, Compression::Zstd, b"whatever");
        let text = place.refuse("a bomb", &bomb.open().unwrap());
        assert!(text.contains("expected at most"), "{text}");
    }
}

/// More entries than are taken, as empty files without data: 2 GiB of headers in a blob that is small.
#[test]
fn millions_of_entries_end() {
    let place = Place::new();
    let count = oci::layer::MAX_ENTRIES + 1;
    let header = file(b"same", b"");
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let many = header.repeat(8192);
    let mut left = count;
    while left > 0 {
        let now = left.min(8192);
        encoder.write_all(&many[..now as usize * 512]).unwrap();
        left -= now;
    }
    let image = Forged::honest(encoder.finish().unwrap(), Compression::Zstd, b"whatever");
    let text = place.refuse("too many entries", &image.open().unwrap());
    assert!(text.contains("entries") || text.contains("expected at most"), "{text}");
}

#[test]
fn a_blob_that_is_a_folder_or_gone() {
    let place = Place::new();
    let image = TestImage::new(&[some_layer()]);
    let opened = image.open();
    let blob = image.blob(0);
    remove(&blob);
    assert!(place.refuse("gone", &opened).contains("not found"));
    fs::create_dir(&blob).unwrap();
    assert!(place.build(&opened).is_err());
}

fn remove(path: &Path) {
    fs::remove_file(path).unwrap();
}
