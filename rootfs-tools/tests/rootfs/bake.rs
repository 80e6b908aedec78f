//! What `bake` makes, seen without a mount.

use std::fs;
use std::path::{Path, PathBuf};

use rootfs_tools::{BakeOptions, BuildReport, Error, Size, bake};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Viewed, assert_clean, view};

/// A static program as far as its headers say, with contents of its own in every block.
fn binary(folder: &Path) -> (PathBuf, Vec<u8>) {
    let mut binary: Vec<u8> = (0..300_001u32).map(|n| (n / 7 % 251) as u8).collect();
    binary[..64].fill(0);
    binary[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let path = folder.join("envd");
    fs::write(&path, &binary).unwrap();
    (path, binary)
}

fn bake_to(image: &TestImage, envd: &Path, options: &BakeOptions, to: &Path) -> Result<BuildReport, Error> {
    bake(&image.open(), envd, options, to, &mut |_| {})
}

fn is(seen: &Viewed, kind: char, mode: u16) -> bool {
    (seen.kind, seen.mode, seen.uid, seen.gid) == (kind, mode, 0, 0)
}

#[test]
fn the_agent_is_where_a_kernel_starts_it() {
    let dir = tempfile::tempdir().unwrap();
    let (envd, bytes) = binary(dir.path());
    let disk = dir.path().join("disk.ext4");
    // A merged /usr, as Debian has it, and a systemd that the link takes the place of.
    let layers = [
        layer(&[
            Entry::symlink("sbin", "usr/sbin"),
            Entry::file("usr/lib/systemd/systemd", "not ours").mode(0o755),
            Entry::symlink("usr/sbin/init", "../lib/systemd/systemd"),
            Entry::file("big", vec![7; 200_000]).owner(5, 6),
        ]),
        layer(&[Entry::directory("run").mode(0o700).owner(3, 4), Entry::file("last", "of the image")]),
    ];
    for (image, init_link) in
        [(TestImage::new(&layers), true), (TestImage::plain(&layers), true), (TestImage::new(&layers), false)]
    {
        let options = BakeOptions { init_link, ..BakeOptions::default() };
        let report = bake_to(&image, &envd, &options, &disk).unwrap();
        assert_eq!(report.digest, oci::Hasher::digest_of(&fs::read(&disk).unwrap()));
        assert_clean(&disk);
        let seen = view(&disk);
        assert!(is(&seen[&b"usr/sbin/envd"[..]], '-', 0o755));
        assert!(seen[&b"usr/sbin/envd"[..]].contents == bytes);
        let link: &[u8] = if init_link { b"/sbin/envd" } else { b"../lib/systemd/systemd" };
        assert_eq!(seen[&b"usr/sbin/init"[..]].contents, link);
        for mount_point in [&b"dev"[..], b"proc", b"sys"] {
            assert!(is(&seen[mount_point], 'd', 0o755), "{}", String::from_utf8_lossy(mount_point));
        }
        assert!(is(&seen[&b"dev/console"[..]], 'c', 0o600) && is(&seen[&b"dev/null"[..]], 'c', 0o666));
        // What the image has stays as it is.
        assert_eq!((seen[&b"run"[..]].mode, seen[&b"run"[..]].uid), (0o700, 3));
        assert!(seen[&b"big"[..]].contents == [7; 200_000] && seen[&b"last"[..]].contents == b"of the image");
    }
}

#[test]
fn the_same_image_and_binary_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (envd, _) = binary(dir.path());
    let image = TestImage::new(&[layer(&[Entry::file("a", "a")])]);
    let disk = |name: &str, options: &BakeOptions| {
        let path = dir.path().join(name);
        bake_to(&image, &envd, options, &path).unwrap();
        fs::read(path).unwrap()
    };
    let options = BakeOptions { size: Size::Free(8 << 20), ..BakeOptions::default() };
    assert!(disk("1", &options) == disk("2", &options));
    let elsewhere = BakeOptions { path: "/opt/agent/envd".parse().unwrap(), ..options.clone() };
    assert!(disk("1", &options) != disk("3", &elsewhere));
    assert!(is(&view(&dir.path().join("3"))[&b"opt/agent/envd"[..]], '-', 0o755));
    assert_clean(&dir.path().join("3"));
}

#[test]
fn an_image_with_something_else_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (envd, _) = binary(dir.path());
    let disk = dir.path().join("disk.ext4");
    for (entry, reason) in [
        (Entry::directory("sbin/envd"), "/sbin/envd: not supported: the image has a directory there"),
        (Entry::file("sbin", "x"), "/sbin: not supported: the image has a file in place of a directory"),
        (Entry::symlink("proc", "proc"), "/proc: not supported: the image has a loop"),
    ] {
        let image = TestImage::new(&[layer(&[entry])]);
        let error = bake_to(&image, &envd, &BakeOptions::default(), &disk).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains(reason), "{error}");
        assert!(!disk.exists());
    }
}

#[test]
fn a_corrupt_layer_gives_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (envd, _) = binary(dir.path());
    let disk = dir.path().join("disk.ext4");
    let image = TestImage::plain(&[layer(&[Entry::file("a", vec![b'a'; 9000])])]);
    let blob = image.blob(0);
    let mut bytes = fs::read(&blob).unwrap();
    let at = bytes.windows(8).position(|window| window == b"aaaaaaaa").unwrap();
    bytes[at] = b'b';
    let mut permissions = fs::metadata(&blob).unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "the blob is the test's own")]
    permissions.set_readonly(false);
    fs::set_permissions(&blob, permissions).unwrap();
    fs::write(&blob, bytes).unwrap();
    bake_to(&image, &envd, &BakeOptions::default(), &disk).unwrap_err();
    assert!(!disk.exists());
}
