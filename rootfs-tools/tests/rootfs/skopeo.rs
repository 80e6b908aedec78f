//! Images that come through skopeo.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{assert_clean, succeed, view};

fn build(reference: &str, output: &Path, path: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rootfs-tools"));
    command.args(["build", reference, "-o"]).arg(output);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    command.output().unwrap()
}

/// Every folder in which something may be left holds what it held, and `expected` beside it.
fn assert_only(folder: &Path, expected: &[&str]) {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, expected);
}

#[test]
fn what_skopeo_wrote_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let made = tempfile::tempdir().unwrap();
    let image = TestImage::new(&[
        layer(&[Entry::file("a", "lower"), Entry::file("b", "gone")]),
        layer(&[Entry::file("a", "upper").owner(7, 8), Entry::file(".wh.b", "")]),
    ]);
    let source = format!("oci:{}:test", image.path().display());
    let rootfs = dir.path().join("rootfs.ext4");
    for (kind, name) in [("docker-archive", "archive.tar"), ("dir", "folder")] {
        let made = format!("{kind}:{}", made.path().join(name).display());
        let destination = if kind == "dir" { made.clone() } else { format!("{made}:example.com/app:1") };
        succeed("skopeo", &["copy".as_ref(), "--quiet".as_ref(), source.as_ref(), destination.as_ref()]);
        let output = build(&made, &rootfs, None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_only(dir.path(), &["rootfs.ext4"]);
        assert_clean(&rootfs);
        let seen = view(&rootfs);
        assert_eq!((&seen[&b"a"[..]].contents[..], seen[&b"a"[..]].uid), (&b"upper"[..], 7));
        assert!(!seen.contains_key(&b"b"[..]));
    }
}

#[test]
fn a_failing_or_missing_skopeo_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs.ext4");
    for (reference, path, text) in [
        ("dir:/nonexistent/folder", None, "/nonexistent/folder"),
        // A port that nobody has.
        ("docker://127.0.0.1:1/app", None, "refused"),
        ("dir:/nonexistent/folder", Some("/nonexistent"), "install the package skopeo"),
    ] {
        let output = build(reference, &rootfs, path);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains(text) && message.contains("skopeo"), "{message}");
        assert_only(dir.path(), &[]);
    }
}
