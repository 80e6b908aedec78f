//! The guest image, compressed.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn guest_image(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rootfs-tools"));
    command.current_dir(folder).args(["guest-image", "--envd", "envd"]).args(args).output().unwrap()
}

#[test]
fn zstd_gives_the_same_archive_in_fewer_bytes() {
    let dir = tempfile::tempdir().unwrap();
    // The smallest static program, with a tail that compresses.
    let mut binary: Vec<u8> = (0..500_000u32).map(|n| (n / 90 % 251) as u8).collect();
    binary[..64].fill(0);
    binary[..6].copy_from_slice(b"\x7fELF\x02\x01");
    fs::write(dir.path().join("envd"), binary).unwrap();
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    for args in [
        &["-o", "plain"][..],
        &["-o", "best", "--compress", "zstd", "--json"],
        &["-o", "again", "--compress", "zstd:19"],
        &["-o", "fast", "--compress", "zstd:1"],
    ] {
        let output = guest_image(dir.path(), args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        if args.contains(&"--json") {
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["digest"], oci::Hasher::digest_of(&read("best")).to_string());
            assert_eq!(report["size"], read("best").len());
        }
    }
    assert!(read("best") == read("again"), "the same binary and level give the same bytes");
    for name in ["best", "fast"] {
        let packed = read(name);
        assert!(packed.len() * 10 < read("plain").len());
        assert!(zstd::decode_all(&packed[..]).unwrap() == read("plain"));
    }
    for bad in ["gzip", "zstd:0", "zstd:20", "zstd:", "zstd:x"] {
        let output = guest_image(dir.path(), &["-o", "bad", "--compress", bad]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("expected zstd"));
        assert!(!dir.path().join("bad").exists());
    }
}
