//! A folder of this machine as the input.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rootfs_tools::{BuildOptions, DataSource, Error, Folder, Place, build_folder};
use rustix::fs::{FileType, Mode, mknodat};

use crate::oracle::{Mount, assert_clean, may_mount, snapshot};

/// Everything that a folder can hold, and a process without privileges can make.
fn plain_tree(root: &Path) {
    fs::create_dir_all(root.join("etc/deep/er")).unwrap();
    fs::write(root.join("etc/hostname"), "box\n").unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not-utf8-\xff\xfe")), "bytes").unwrap();
    fs::write(root.join("n".repeat(255)), "long name").unwrap();
    fs::hard_link(root.join("etc/hostname"), root.join("second-name")).unwrap();
    symlink("etc/hostname", root.join("link")).unwrap();
    symlink("x/".repeat(2000), root.join("slow-link")).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o4711)).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 10 << 20).unwrap();
    sparse.write_all_at(&[7; 5000], 30 << 20).unwrap();
    sparse.set_len(64 << 20).unwrap();
    mknodat(rustix::fs::CWD, root.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o622), 0).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(5_000_000_000, 123_456_789);
    File::open(root.join("etc")).unwrap().set_modified(time).unwrap();
}

#[test]
fn the_kernel_shows_what_the_folder_has() {
    if !may_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    plain_tree(&root);
    std::os::unix::fs::chown(root.join("empty"), Some(100_000), Some(4_000_000_000)).unwrap();
    let device = |name, kind, major, minor| {
        let device = rustix::fs::makedev(major, minor);
        mknodat(rustix::fs::CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    };
    device("null", FileType::CharacterDevice, 1, 3);
    device("disk", FileType::BlockDevice, 259, 70_000);
    xattr::set(root.join("etc/hostname"), "trusted.note", b"kept").unwrap();
    xattr::set(root.join("etc"), "user.large", &[b'v'; 3000]).unwrap();

    let image = dir.path().join("rootfs.ext4");
    let report = build_folder(&root, &BuildOptions::default(), &image, &mut |_| {}).unwrap();
    assert_clean(&image);
    assert!(report.size < 4 << 20, "holes take no room: {report:?}");
    let mut expected = snapshot(&root);
    let mount = Mount::new(&image, "ro");
    let mut got = snapshot(mount.path());
    // lost+found is a subdirectory of ours only.
    for tree in [&mut expected, &mut got] {
        tree.get_mut(&b""[..]).unwrap().links = 0;
    }
    assert!(got.keys().eq(expected.keys()));
    for (path, expected) in &expected {
        let bare = |seen: &crate::oracle::Seen| crate::oracle::Seen { contents: Vec::new(), ..seen.clone() };
        assert_eq!(bare(&got[path]), bare(expected), "{}", String::from_utf8_lossy(path));
        assert!(got[path].contents == expected.contents, "contents of {}", String::from_utf8_lossy(path));
    }
    let blocks = |root: &Path| fs::metadata(root.join("sparse")).unwrap().blocks();
    assert_eq!(blocks(mount.path()), 8 + 16);
}

#[test]
fn the_same_folder_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    plain_tree(&root);
    let build = |name: &str| {
        let image = dir.path().join(name);
        build_folder(&root, &BuildOptions::default(), &image, &mut |_| {}).unwrap();
        assert_clean(&image);
        fs::read(image).unwrap()
    };
    let first = build("1");
    assert!(first == build("2"));
    fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(first[1024 + 0x68..][..16] != build("3")[1024 + 0x68..][..16], "another tree has another UUID");
}

#[test]
fn sockets_are_left_out_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    let image = dir.path().join("rootfs.ext4");
    let report = build_folder(&root, &BuildOptions::default(), &image, &mut |_| {}).unwrap();
    assert_eq!((report.dropped_sockets, report.entries), (1, 2));
    assert_clean(&image);
}

#[test]
fn files_that_change_meanwhile_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, vec![1; 10_000]).unwrap();
    let read = |folder: &mut Folder, offset| folder.files.read(Place { source: 0, offset }, &mut [0; 5000]);

    let mut folder = Folder::read(dir.path()).unwrap();
    fs::write(&file, vec![1; 9_000]).unwrap();
    let error = read(&mut folder, 0).unwrap_err();
    assert!(
        matches!(error, Error::Invalid { .. }) && error.to_string().contains("had 10000 bytes"),
        "{error}"
    );

    let mut folder = Folder::read(dir.path()).unwrap();
    read(&mut folder, 0).unwrap();
    File::options().write(true).open(&file).unwrap().set_len(6_000).unwrap();
    let error = read(&mut folder, 4_000).unwrap_err().to_string();
    assert!(error.contains("now 6000"), "{error}");

    let mut folder = Folder::read(dir.path()).unwrap();
    read(&mut folder, 0).unwrap();
    File::options().append(true).open(&file).unwrap().write_all_at(&[1], 7_000).unwrap();
    let error = folder.files.finish().unwrap_err().to_string();
    assert!(error.contains("changed while it was read"), "{error}");

    let missing =
        build_folder(&dir.path().join("none"), &BuildOptions::default(), &dir.path().join("o"), &mut |_| {});
    assert!(matches!(missing, Err(Error::Io { .. })));
    let no_folder = build_folder(&file, &BuildOptions::default(), &dir.path().join("o"), &mut |_| {});
    assert!(matches!(no_folder, Err(Error::Invalid { .. })));
}

#[test]
fn the_command_takes_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("tree");
    fs::create_dir(&root).unwrap();
    plain_tree(&root);
    let image = dir.path().join("rootfs.ext4");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_rootfs-tools"))
        .args(["build", &format!("tree:{}", root.display()), "--json", "-o"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["size"], fs::metadata(&image).unwrap().len());
    assert!(report.get("image").is_none());
    assert_clean(&image);
}
