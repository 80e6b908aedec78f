//! Sparse files, as GNU tar writes them in its four ways: holes stay holes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rootfs_tools::{BuildOptions, Error, build};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Mount, assert_clean, debugfs, may_mount, succeed};

const FORMATS: [&[&str]; 4] = [
    &["--format=gnu"],
    &["--format=posix", "--sparse-version=0.0"],
    &["--format=posix", "--sparse-version=0.1"],
    &["--format=posix", "--sparse-version=1.0"],
];

/// A file of `size` bytes with `count` pieces of data, each telling its place.
fn sparse_file(path: &Path, size: u64, count: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for piece in 0..count {
        let start = size / count * piece / 4096 * 4096;
        let length = (1 + piece as usize % 3) * 4096;
        file.write_all_at(&vec![piece as u8 | 1; length], start).unwrap();
    }
}

/// The data of a file with its places, as its file system has them.
fn data(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < size {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => panic!("{error}"),
        };
        let end = seek(&file, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; (end - start) as usize];
        file.read_exact_at(&mut bytes, start).unwrap();
        parts.push((start, bytes));
        at = end;
    }
    parts
}

fn archive(folder: &Path, options: &[&str]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut args: Vec<_> = ["--create", "--sparse", "--file"].map(|arg| arg.as_ref()).to_vec();
    args.push(file.path().as_os_str());
    args.extend(options.iter().map(|option| std::ffi::OsStr::new(*option)));
    args.extend(["--directory".as_ref(), folder.as_os_str(), ".".as_ref()]);
    succeed("tar", &args);
    fs::read(file.path()).unwrap()
}

#[test]
fn every_form_of_gnu_tar_keeps_its_holes() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sparse_file(&tree.join("three"), 1 << 20, 3);
    sparse_file(&tree.join("thirty"), 10 << 20, 30);
    // More blocks of an old map than one, and a name that has a header of its own.
    sparse_file(&tree.join("l".repeat(200)), 100 << 20, 300);
    sparse_file(&tree.join("nothing"), 5_000_000, 0);
    let odd = File::create(tree.join("odd")).unwrap();
    odd.write_all_at(b"the end", (3 << 20) + 77).unwrap();
    fs::write(tree.join("dense"), vec![3; 10_000]).unwrap();

    let mut images = Vec::new();
    for options in FORMATS {
        let image = dir.path().join("rootfs.ext4");
        let source = TestImage::new(&[archive(&tree, options)]);
        let report = build(&source.open(), &BuildOptions::default(), &image, &mut |_| {}).unwrap();
        assert_clean(&image);
        assert!(report.size < 8 << 20, "{options:?}: holes take no room: {report:?}");
        let mount = Mount::new(&image, "ro");
        for entry in fs::read_dir(&tree).unwrap() {
            let name = entry.unwrap().file_name();
            let (expected, got) = (tree.join(&name), mount.path().join(&name));
            assert_eq!(got.metadata().unwrap().len(), expected.metadata().unwrap().len(), "{name:?}");
            assert!(data(&got) == data(&expected), "{options:?}: {name:?}");
        }
        drop(mount);
        images.push(fs::read(&image).unwrap().len());
    }
    assert!(images.iter().all(|length| *length == images[0]), "{images:?}");
}

/// Beyond 16 GiB, with more extents than two levels of a tree hold.
#[test]
fn a_huge_file_with_thousands_of_parts() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sparse_file(&tree.join("huge"), 20 << 30, 3000);
    let image = dir.path().join("rootfs.ext4");
    let source = TestImage::plain(&[archive(&tree, FORMATS[3])]);
    build(&source.open(), &BuildOptions::default(), &image, &mut |_| {}).unwrap();
    assert_clean(&image);
    let extents = debugfs(&image, "ex huge");
    assert!(extents.lines().any(|line| line.trim_start().starts_with("2/ 2")), "three levels: {extents}");
    let mount = Mount::new(&image, "ro");
    assert_eq!(mount.path().join("huge").metadata().unwrap().len(), 20 << 30);
    assert!(data(&mount.path().join("huge")) == data(&tree.join("huge")));
}

#[test]
fn maps_that_lie_are_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sparse_file(&tree.join("sparse"), 1 << 20, 30);
    let good = archive(&tree, FORMATS[2]);
    let find = |needle: &[u8]| good.windows(needle.len()).position(|window| window == needle).unwrap();
    let map = find(b"GNU.sparse.map=") + 15;
    let size = find(b"GNU.sparse.size=") + 16;
    for (at, digit) in [(map, b'x'), (size, b'0')] {
        let mut bad = good.clone();
        bad[at] = digit;
        let image = TestImage::plain(&[bad]);
        let error =
            build(&image.open(), &BuildOptions::default(), &dir.path().join("out"), &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::Image(oci::Error::Corrupt { .. })), "{error:?}");
        assert!(error.to_string().contains("map"), "{error}");
    }
    // A global header before plain entries, as git archive writes it.
    let mut stream = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::XGlobalHeader);
    let record = b"52 comment=0123456789abcdef0123456789abcdef01234567\n";
    header.set_size(record.len() as u64);
    header.set_cksum();
    stream.append(&header, &record[..]).unwrap();
    let mut bytes = stream.into_inner().unwrap();
    bytes.truncate(1024);
    bytes.extend(layer(&[Entry::file("f", "data")]));
    let image = TestImage::plain(&[bytes]);
    build(&image.open(), &BuildOptions::default(), &dir.path().join("out"), &mut |_| {}).unwrap();
    assert_clean(&dir.path().join("out"));
}
