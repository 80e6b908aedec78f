//! The program: what it prints, where, and how it exits.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{assert_clean, succeed};

fn rootfs_tools(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rootfs-tools")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn path_in(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().unwrap().to_owned()
}

#[test]
fn build_prints_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let image = TestImage::new(&[layer(&[Entry::file("a", "a")])]);
    let out = path_in(&dir, "rootfs.ext4");
    let reference = format!("oci:{}:test", image.path().display());
    let output = rootfs_tools(&["build", &reference, "-o", &out, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["size"], fs::metadata(&out).unwrap().len());
    assert_eq!(report["digest"], oci::Hasher::digest_of(&fs::read(&out).unwrap()).to_string());
    assert!(text(&output.stderr).contains("reading the entries of layer 1 of 1"));
    assert_clean(Path::new(&out));
}

#[test]
fn the_local_store_is_found_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let image = TestImage::new(&[layer(&[Entry::file("a", "a")])]);
    let from = oci::Store::open(image.path()).unwrap();
    let store = oci::Store::open_or_create(&dir.path().join("images")).unwrap();
    let descriptor = oci::copy_image(&from, &image.open().descriptor, &store).unwrap();
    store.tag("docker.io/library/demo:latest", &descriptor).unwrap();
    let out = path_in(&dir, "rootfs.ext4");
    let data_dir = dir.path().to_str().unwrap();
    let output = rootfs_tools(&["build", "demo", "-o", &out, "--data-dir", data_dir]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("sha256:"));

    let missing = rootfs_tools(&["build", "other", "-o", &out, "--data-dir", data_dir]);
    assert_eq!(missing.status.code(), Some(2));
    let message = text(&missing.stderr);
    assert!(message.contains("other") && message.contains("--data-dir"), "{message}");
}

#[test]
fn bad_input_exits_with_2_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = path_in(&dir, "out");
    let image = TestImage::new(&[layer(&[Entry::file("a", vec![1; 3 << 20])])]);
    let reference = format!("oci:{}", image.path().display());
    let not_elf = image.path().join("index.json");
    let not_elf = not_elf.to_str().unwrap();
    for args in [
        &["build", "Not A Name", "-o", &out][..],
        &["build", "oci:/nonexistent", "-o", &out],
        &["build", &reference, "-o", &out, "--size", "1"],
        &["build", &reference, "-o", dir.path().to_str().unwrap()],
        &["empty", "-o", &out],
        &["empty", "--size", "0", "-o", &out],
        &["empty", "--size", "8", "-o", &out, "--label", "much too long a label"],
        &["guest-image", "--envd", not_elf, "-o", &out],
        &["bake", &reference, "--envd", not_elf, "-o", &out],
        &["bake", &reference, "--envd", not_elf, "--path", "sbin/envd", "-o", &out],
        &["bake", &reference, "-o", &out],
    ] {
        let output = rootfs_tools(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
        assert!(!output.stderr.is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{args:?} left something");
    }
}

#[test]
fn a_failing_machine_exits_with_1() {
    let output = rootfs_tools(&["empty", "--size", "8", "-o", "/nonexistent/folder/out"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nonexistent/folder"), "{}", text(&output.stderr));
}

#[test]
fn help_shows_examples_and_exit_codes() {
    for args in [
        &["--help"][..],
        &["build", "--help"],
        &["empty", "--help"],
        &["guest-image", "--help"],
        &["bake", "--help"],
    ] {
        let help = text(&rootfs_tools(args).stdout);
        assert!(help.contains("Exit codes:"), "{help}");
    }
    assert!(text(&rootfs_tools(&["build", "--help"]).stdout).contains("oci-archive:app.tar"));
}

/// cpio reads what is written, as the kernel does.
#[test]
fn the_guest_image_is_a_cpio_archive() {
    let dir = tempfile::tempdir().unwrap();
    // The smallest static program: an ELF header with no program headers.
    let mut binary = vec![0; 70_001];
    binary[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let envd = path_in(&dir, "envd");
    fs::write(&envd, &binary).unwrap();
    let (first, second) = (path_in(&dir, "1.cpio"), path_in(&dir, "2.cpio"));
    let output = rootfs_tools(&["guest-image", "--envd", &envd, "-o", &first, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let bytes = fs::read(&first).unwrap();
    assert_eq!(report["digest"], oci::Hasher::digest_of(&bytes).to_string());
    assert_eq!(bytes.len() % 512, 0);
    rootfs_tools(&["guest-image", "--envd", &envd, "-o", &second]);
    assert!(bytes == fs::read(&second).unwrap(), "the same binary gives the same bytes");

    let list = format!("TZ=UTC cpio -itv --quiet < {first}");
    let listing = succeed("sh", &["-c".as_ref(), list.as_ref()]);
    let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
    let seen: Vec<(&str, &str)> = lines.iter().map(|line| (line[0], line[line.len() - 1])).collect();
    assert_eq!(
        seen,
        [
            ("drwxr-xr-x", "dev"),
            ("crw-------", "dev/console"),
            ("drwxr-xr-x", "proc"),
            ("drwxr-xr-x", "sys"),
            ("-rwxr-xr-x", "init")
        ]
    );
    assert!(listing.contains("5,   1 Jan  1  1970 dev/console"), "{listing}");
    let extract = format!("cpio -i --quiet --to-stdout init < {first} | cmp - {envd}");
    succeed("sh", &["-c".as_ref(), extract.as_ref()]);
}
