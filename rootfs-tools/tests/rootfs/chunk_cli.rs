//! `chunk`, `unchunk` and `prune-chunks` as a program.

use std::fs;
use std::process::{Command, Output};

fn rootfs_tools(folder: &tempfile::TempDir, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rootfs-tools")).current_dir(folder.path()).args(args).output().unwrap()
}

fn fails_with(output: &Output, code: i32, text: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.contains(text), "{message}");
}

#[test]
fn files_go_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..400_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(dir.path().join("a"), &bytes).unwrap();
    fs::write(dir.path().join("b"), &bytes[..1 << 20]).unwrap();
    let output = rootfs_tools(&dir, &["chunk", "a", "b", "--store", "s", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let reports: Vec<serde_json::Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((&reports[0]["new"], &reports[0]["reused"]), (&25.into(), &0.into()), "{}", reports[0]);
    assert_eq!((&reports[1]["new"], &reports[1]["reused"]), (&0.into(), &16.into()), "{}", reports[1]);
    let manifest = fs::read(dir.path().join("a.chunks.json")).unwrap();
    assert_eq!(reports[0]["manifest_digest"], oci::Hasher::digest_of(&manifest).to_string());
    assert_eq!(reports[0]["digest"], oci::Hasher::digest_of(&bytes).to_string());

    let output = rootfs_tools(&dir, &["unchunk", "a.chunks.json", "--store", "s", "-o", "c", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["stored"], &report["digest"]), (&25.into(), &reports[0]["digest"]));
    assert!(fs::read(dir.path().join("c")).unwrap() == bytes);

    let output = rootfs_tools(&dir, &["prune-chunks", "b.chunks.json", "--store", "s", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["kept"], &report["removed"]), (&16.into(), &9.into()));
    let output = rootfs_tools(&dir, &["unchunk", "a.chunks.json", "--store", "s", "-o", "d"]);
    fails_with(&output, 2, "is missing");
    assert!(!dir.path().join("d").exists());
}

#[test]
fn bad_usage_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    fs::write(dir.path().join("next.json"), "{\"schema_version\":7}").unwrap();
    for (args, text) in [
        (&["chunk", "--store", "s"][..], "FILE"),
        (&["chunk", "a", "b", "--store", "s", "-o", "m"], "expected one FILE, got 2"),
        (&["chunk", ".", "--store", "s"], "regular file"),
        (&["unchunk", "a", "--store", "s", "-o", "x"], "manifest a"),
        (&["unchunk", "next.json", "--store", "s", "-o", "x"], "schema version is 7, only 1"),
        (&["prune-chunks", "--store", "s"], "MANIFEST"),
        (&["prune-chunks", "next.json", "--store", "s"], "schema version is 7"),
    ] {
        fails_with(&rootfs_tools(&dir, args), 2, text);
        assert!(!dir.path().join("x").exists());
    }
    fails_with(&rootfs_tools(&dir, &["chunk", "missing", "--store", "s"]), 1, "missing");
    for command in ["chunk", "unchunk", "prune-chunks"] {
        let help = rootfs_tools(&dir, &[command, "--help"]);
        assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes:"));
    }
}
