//! Archives that mean no good, and what they become.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::symlink;

use oci::layer::{Compression, LayerWriter, Metadata, Timestamp};
use tar::EntryType;

use super::*;
use crate::rooted::Rooted;

/// An entry: path, type, link target or data.
type Written<'a> = (&'a str, EntryType, &'a str);

/// A title, the entries, and what they become, or what is said.
type Hostile = (&'static str, &'static [Written<'static>], Result<&'static [&'static str], &'static str>);

const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;
const DIR: EntryType = EntryType::Directory;

fn header(path: &str, kind: EntryType, target: &str, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    // Not with the crate's own setters, which refuse what is hostile.
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o4751);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_500_000_000);
    header.set_size(size);
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_cksum();
    header
}

fn tar(entries: &[Written<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (path, kind, text) in entries {
        let (target, data) = if *kind == FILE { ("", *text) } else { (*text, "") };
        bytes.extend(header(path, *kind, target, data.len() as u64).as_bytes());
        bytes.extend(data.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(TAR_BLOCK), 0);
    }
    bytes.extend([0; 2 * TAR_BLOCK]);
    bytes
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    /// A tree with `/opt/dest`, a file, a folder and links in it, and a file beside it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("opt/dest/full/sub")).unwrap();
        fs::write(root.join("opt/dest/there"), "there").unwrap();
        fs::write(root.join("secret"), "secret").unwrap();
        symlink("/etc", root.join("opt/dest/abs")).unwrap();
        symlink("../..", root.join("opt/dest/up")).unwrap();
        symlink("full", root.join("opt/dest/rel")).unwrap();
        Self { dir }
    }

    fn unpack_within(&self, bounds: Option<Bounds>, bytes: &[u8]) -> Result<Vec<String>, Error> {
        let shown = Path::new("x.tar");
        let root = Rooted::open(&self.dir.path().join("root")).unwrap();
        let mut new = NewLayer::new(&root, Timestamp { seconds: 1, nanoseconds: 0 });
        let size = bytes.len() as u64;
        let archive = open(|| Ok(Box::new(Cursor::new(bytes)) as Box<dyn Read>), size, shown)?;
        let archive = archive.expect("an archive");
        let bounds = bounds.unwrap_or(Bounds::of(size));
        let destination = LayerPath::parse(b"opt/dest").unwrap();
        unpack_within(bounds, archive, shown, self.dir.path(), &mut new, &destination)?;
        let store = oci::Store::open_or_create(&self.dir.path().join("store")).unwrap();
        let mut writer = LayerWriter::new(&store, Compression::None)?;
        new.write(None, &mut writer)?;
        let layer = writer.finish()?;
        let mut reader = LayerReader::new(store.open_blob(&layer.descriptor)?);
        let mut lines = Vec::new();
        while let Some(change) = reader.next_change()? {
            lines.push(match change {
                Change::Node(Node { path, metadata: Metadata { mode, uid, gid, .. }, kind }) => {
                    let mut text = String::new();
                    if let Kind::File { .. } = kind {
                        reader.read_to_string(&mut text).unwrap();
                    }
                    let kind = match kind {
                        Kind::File { .. } => format!("file {text}"),
                        Kind::Symlink(target) => format!("-> {}", String::from_utf8_lossy(&target)),
                        Kind::HardLink(target) => format!("= {target}"),
                        other => format!("{other:?}").to_lowercase(),
                    };
                    format!("{path} {mode:o} {uid}:{gid} {kind}")
                }
                other => format!("{other:?}"),
            });
        }
        Ok(lines)
    }

    fn unpack(&self, entries: &[Written<'_>]) -> Result<Vec<String>, Error> {
        self.unpack_within(None, &tar(entries))
    }
}

#[test]
fn hostile_archives_stay_in_the_destination() {
    let cases: &[Hostile] = &[
        ("a path out", &[("../x", FILE, "")], Err("leads out of the image")),
        ("a path out, later", &[("a/../../x", FILE, "")], Err("leads out of the image")),
        (
            "an absolute path",
            &[("/etc/x", FILE, "1")],
            Ok(&["/opt/dest/etc 755 0:0 directory", "/opt/dest/etc/x 4751 7:8 file 1"]),
        ),
        (
            "through its own absolute link",
            &[("l", LINK, "/etc"), ("l/x", FILE, "1")],
            Ok(&[
                "/opt/dest/etc 755 0:0 directory",
                "/opt/dest/etc/x 4751 7:8 file 1",
                "/opt/dest/l 4751 7:8 -> /etc",
            ]),
        ),
        (
            "through its own link out",
            &[("l", LINK, "../.."), ("l/x", FILE, "")],
            Err("leads out of the destination"),
        ),
        (
            "through two links out",
            &[("a", LINK, "."), ("b", LINK, "a/.."), ("b/x", FILE, "")],
            Err("leads out of the destination"),
        ),
        (
            "through the image's absolute link",
            &[("abs/x", FILE, "1")],
            Ok(&["/opt/dest/etc 755 0:0 directory", "/opt/dest/etc/x 4751 7:8 file 1"]),
        ),
        ("through the image's link out", &[("up/x", FILE, "")], Err("leads out of the destination")),
        (
            "through the image's link inside",
            &[("rel/x", FILE, "1")],
            Ok(&["/opt/dest/full/x 4751 7:8 file 1"]),
        ),
        ("a loop", &[("a", LINK, "b"), ("b", LINK, "a"), ("a/x", FILE, "")], Err("too many symbolic links")),
        ("a hard link out", &[("h", HARD, "../../secret")], Err("leads out of the image")),
        ("a hard link through a link out", &[("h", HARD, "up/secret")], Err("leads out of the destination")),
        ("a hard link to nothing", &[("h", HARD, "missing")], Err("what is not there")),
        ("a hard link to a folder", &[("h", HARD, "full")], Err("what is no file")),
        ("a hard link to itself", &[("there", HARD, "there")], Ok(&[])),
        (
            "a hard link to a file of the image",
            &[("a", HARD, "there")],
            Ok(&["/opt/dest/a 4751 7:8 file there", "/opt/dest/there 4751 7:8 = /opt/dest/a"]),
        ),
        (
            "a hard link whose target is replaced",
            &[("a", FILE, "1"), ("b", HARD, "a"), ("a", FILE, "2")],
            Ok(&["/opt/dest/a 4751 7:8 file 2", "/opt/dest/b 4751 7:8 file 1"]),
        ),
        (
            "devices and pipes",
            &[("n", EntryType::Char, ""), ("there", EntryType::Block, ""), ("p", EntryType::Fifo, "")],
            Ok(&[]),
        ),
        ("a whiteout", &[(".wh.there", FILE, "")], Err("begins with .wh.")),
        ("a whiteout of all", &[("full/.wh..wh..opq", FILE, "")], Err("begins with .wh.")),
        ("a whiteout that is a folder", &[(".wh.full", DIR, "")], Err("begins with .wh.")),
        ("the root itself", &[("./", DIR, ""), ("..", DIR, "")], Err("leads out of the image")),
        ("its root stays", &[("./", DIR, "")], Ok(&[])),
        ("a file for a folder", &[("full", FILE, "1")], Ok(&["/opt/dest/full 4751 7:8 file 1"])),
        ("a folder for a file", &[("there", DIR, "")], Ok(&["/opt/dest/there 4751 7:8 directory"])),
        (
            "a folder for a link",
            &[("abs", DIR, ""), ("abs/x", FILE, "1")],
            Ok(&["/opt/dest/abs 4751 7:8 directory", "/opt/dest/abs/x 4751 7:8 file 1"]),
        ),
        (
            "an emptied folder",
            &[("full", FILE, "1"), ("full", DIR, "")],
            Ok(&["/opt/dest/full 4751 7:8 directory", "Opaque(\"opt/dest/full\")"]),
        ),
        ("below a file", &[("f", FILE, "1"), ("f/x", FILE, "")], Err("a file or link is there")),
        ("in itself", &[("a/x", FILE, "1"), ("a", FILE, "2")], Ok(&["/opt/dest/a 4751 7:8 file 2"])),
    ];
    for (title, entries, expected) in cases {
        let case = Case::new();
        match (case.unpack(entries), expected) {
            (Ok(lines), Ok(expected)) => assert_eq!(lines, *expected, "{title}"),
            (Err(error), Err(expected)) => {
                assert!(error.to_string().contains(expected), "{title}: {error}");
                assert!(error.is_bad_input(), "{title}");
            }
            (got, _) => panic!("{title}: {got:?}"),
        }
    }
}

#[test]
fn bombs_are_bounded() {
    let case = Case::new();
    let small = Bounds { bytes: 10_000, entries: 3, names: 100 };
    let said =
        |bounds: Option<Bounds>, bytes: &[u8]| case.unpack_within(bounds, bytes).unwrap_err().to_string();
    let zeros = "0".repeat(20_000);
    let packed = zstd::bulk::compress(&tar(&[("zeros", FILE, &zeros)]), 1).unwrap();
    assert!(packed.len() < 1000);
    assert!(said(Some(small), &packed).contains("more than 10000 bytes"));
    let many: Vec<_> = ["a", "b", "c", "d"].map(|name| (name, FILE, "")).to_vec();
    assert!(said(Some(small), &tar(&many)).contains("more than 3 entries"));
    let long = "l".repeat(90);
    assert!(
        said(Some(small), &tar(&[("a", LINK, &long), ("b", LINK, &long)])).contains("100 bytes of names")
    );
    // A file that is a hole of 1 TiB, in 2 KiB, with the real bounds.
    let mut hole = header("hole", EntryType::GNUSparse, "", 0);
    hole.as_mut_bytes()[257..265].copy_from_slice(b"ustar  \0");
    hole.as_mut_bytes()[386..482].fill(b'0');
    hole.as_mut_bytes()[482] = 0;
    hole.as_mut_bytes()[483..495].copy_from_slice(format!("{:011o}\0", (1u64 << 33) - 1).as_bytes());
    hole.set_cksum();
    let bytes = [hole.as_bytes().as_slice(), &[0; 1024]].concat();
    let error = said(None, &bytes);
    assert!(error.contains("more than 1073741824 bytes"), "{error}");
    assert_eq!(Bounds::of(8 << 20).bytes, (8 << 20) * MAX_RATIO);
    assert_eq!(Bounds::of(1 << 40).bytes, MAX_UNPACKED);
}

#[test]
fn archives_are_known_by_their_contents() {
    use std::io::Write as _;
    let plain = tar(&[("x", FILE, "1")]);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let bzip2 = {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let xz = |level| {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), level);
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = zstd::bulk::compress(&plain, 1).unwrap();
    let is_archive = |bytes: &[u8]| {
        let reopen = || Ok(Box::new(Cursor::new(bytes.to_vec())) as Box<dyn Read>);
        open(reopen, bytes.len() as u64, Path::new("x")).unwrap().is_some()
    };
    let case = Case::new();
    for bytes in [&plain, &gzip(&plain), &bzip2, &xz(1), &xz(9), &zstd] {
        assert_eq!(case.unpack_within(None, bytes).unwrap(), ["/opt/dest/x 4751 7:8 file 1"]);
    }
    // Two members of gzip are one stream.
    let (first, second) = plain.split_at(300);
    assert!(case.unpack_within(None, &[gzip(first), gzip(second)].concat()).is_ok());
    for other in [
        &b""[..],
        b"text",
        b"\x1f\x8b\x08",
        b"\x1f\x8b\x08garbage",
        b"BZh9",
        b"\xfd7zXZ\0",
        &gzip(b"no archive"),
        &[0; 4096],
        &plain[..511],
    ] {
        assert!(!is_archive(other), "{other:?}");
    }
    let mut wrong = plain.clone();
    wrong[0] ^= 1;
    assert!(!is_archive(&wrong), "the checksum is wrong");
    let cut = case.unpack_within(None, &plain[..700]).unwrap_err().to_string();
    assert!(cut.contains("cannot be unpacked"), "{cut}");
}
