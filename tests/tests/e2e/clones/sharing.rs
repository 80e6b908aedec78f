//! Clones of one snapshot share its RAM and its disks, and never write them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{TestData, TestSandbox};
use serde_json::{Value, json};

use super::{Mapped, many, spread};

/// What a clone writes: 8 MiB to its disk, as much to its RAM, and who it is.
const WRITE: &str = "head -c 8388608 /dev/urandom > /root/own && head -c 8388608 /dev/urandom > /dev/shm/own && sync && \
                     hostname > /root/name && ls /root /dev/shm";

/// Every file below a folder, with its digest.
fn digests(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let said = Command::new("sha256sum").arg("--").arg(entry.path()).output().unwrap();
            let digest = String::from_utf8(said.stdout).unwrap().split(' ').next().map(str::to_owned);
            all.insert(entry.path(), digest.filter(|digest| digest.len() == 64).unwrap());
        }
    }
    all
}

/// What qemu-img says of a disk and of what lies under it.
pub(super) fn chain(disk: &Path) -> Vec<Value> {
    let said = Command::new("qemu-img")
        .args(["info", "--force-share", "--backing-chain", "--output=json"])
        .arg(disk)
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    serde_json::from_slice(&said.stdout).unwrap()
}

async fn share(count: usize) {
    let data = TestData::warmed("e2e");
    let template = data.template("e2e");
    let before = digests(&template);
    println!("{before:#?}");
    for name in ["ram", "state", "scratch.ext4", "manifest.json", "rootfs.ext4", "template.json"] {
        assert!(before.keys().any(|path| path.ends_with(name)), "{name}");
    }
    let ram = data.snapshot("e2e").join("ram");

    let clones = many(
        count,
        |_| TestSandbox::clone_of(&data, "e2e"),
        |_, clone| async move {
            let idle = Mapped::of(clone.vmm().as_raw_pid(), "");
            let said = clone.stdout(WRITE).await;
            assert_eq!(said, "/dev/shm:\nown\n\n/root:\nname\nown\n", "another's files");
            (clone, idle)
        },
    )
    .await;
    let mut own = Vec::new();
    for (clone, _) in &clones {
        let (id, pid) = (clone.state()["id"].as_str().unwrap().to_owned(), clone.vmm().as_raw_pid());
        own.push((clone.stdout("cat /root/name; sha256sum /root/own /dev/shm/own").await, id));
        // The RAM is mapped from the template's file, and what was read of it is there once for all.
        let mapped = Mapped::of(pid, ram.to_str().unwrap());
        assert!(mapped.shared_clean > 4 << 10, "{mapped:?}");
        assert!(mapped.private_clean < mapped.shared_clean / 4, "{mapped:?}");
        let shared = mapped.pss - mapped.private_clean - mapped.private_dirty;
        assert!(shared <= mapped.shared_clean / 2, "{mapped:?}");
        // One overlay, over the template's disk.
        let together = tempfile::tempdir_in(data.path()).unwrap();
        for name in ["scratch.qcow2", "base/scratch.ext4"] {
            let path = clone.dir().join(name);
            fs::hard_link(&path, together.path().join(path.file_name().unwrap())).unwrap();
        }
        let chain = chain(&together.path().join("scratch.qcow2"));
        assert_eq!(chain.iter().map(|disk| &disk["format"]).collect::<Vec<_>>(), ["qcow2", "raw"]);
    }
    for (said, id) in &own {
        assert!(said.starts_with(&format!("{id}\n")), "{said}");
        assert_eq!(own.iter().filter(|(other, _)| other == said).count(), 1);
    }
    let all: Vec<_> = clones.iter().map(|(clone, _)| Mapped::of(clone.vmm().as_raw_pid(), "")).collect();
    let kib = |pick: fn(&Mapped) -> u64| spread(all.iter().map(pick).collect());
    println!(
        "{count} clones, each with 16 MiB written, in KiB (median, largest): Rss {:?}, Pss {:?}, shared {:?}",
        kib(|mapped| mapped.rss),
        kib(|mapped| mapped.pss),
        kib(|mapped| mapped.shared_clean)
    );
    println!("Pss at their starts: {:?}", spread(clones.iter().map(|(_, idle)| idle.pss).collect()));
    assert_eq!(digests(&template), before, "the template was written");
    for (clone, _) in clones {
        let (status, said) = clone.stop().await;
        assert!(status.success(), "{said}");
    }
    assert_eq!(digests(&template), before, "the template was written");
}

#[tokio::test]
async fn eight_clones_share_a_snapshot_that_nobody_writes() {
    share(8).await;
}

#[tokio::test]
#[ignore = "minutes: `make test-long`"]
async fn a_hundred_clones_share_a_snapshot_that_nobody_writes() {
    share(100).await;
}

#[tokio::test]
async fn a_clone_has_a_larger_disk_than_its_snapshot_when_it_asks_for_one() {
    const SMALL: u64 = 48;
    const LARGE: u64 = 160;
    let data = TestData::new();
    data.copy("e2e");
    TestData::edit(&data.template("e2e").join("template.json"), |template| {
        template["machine"]["disk_mib"] = json!(SMALL);
    });
    data.warm("e2e");
    let before = digests(&data.template("e2e"));

    let clone = TestSandbox::clone_of(&data, "e2e").set("disk_mib", LARGE).start().await;
    assert_eq!(clone.state()["start"], "cloned");
    let size = "df -P -m / | awk 'END {print $2}'";
    let has: u64 = clone.stdout(size).await.trim().parse().unwrap();
    assert!((LARGE * 9 / 10..=LARGE).contains(&has), "{has} MiB");
    // More than the snapshot's disk could hold.
    let write =
        "head -c 100000000 /dev/urandom > /root/large && sha256sum < /root/large > /root/digest && sync";
    clone.stdout(write).await;
    let check =
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/large | cmp - /root/digest && echo same";
    assert_eq!(clone.stdout(check).await, "same\n");

    // A snapshot of it is as large, and can become larger again.
    let paused = clone.pause().await;
    let snapshot = paused.dir().join("snapshot");
    assert_eq!(fs::metadata(snapshot.join("scratch.ext4")).unwrap().len(), SMALL << 20);
    assert_eq!(chain(&snapshot.join("scratch.qcow2"))[0]["virtual-size"], json!(LARGE << 20));
    let clone = paused.resume().await;
    assert_eq!(clone.stdout(check).await, "same\n");
    let forked = clone.fork().await;
    let larger = forked.child().set("disk_mib", 2 * LARGE).start().await;
    let has: u64 = larger.stdout(size).await.trim().parse().unwrap();
    assert!((2 * LARGE * 9 / 10..=2 * LARGE).contains(&has), "{has} MiB");
    assert_eq!(larger.stdout(check).await, "same\n");
    larger.stop().await;
    let smaller = forked.child().set("disk_mib", SMALL).try_start().await.err().expect("it is too small");
    assert!(smaller.contains("--disk 160 MiB, the sandbox asks for 48 MiB"), "{smaller}");

    // The disk of a machine that has powered off is a whole file system.
    let kept = data.path().join("kept.qcow2");
    fs::hard_link(clone.dir().join("scratch.qcow2"), &kept).unwrap();
    let (status, said) = clone.stop().await;
    assert!(status.success(), "{said}");
    let base = data.snapshot("e2e").join("scratch.ext4");
    let (flat, file) =
        (data.path().join("flat.ext4"), |path: &Path| json!({ "driver": "file", "filename": path }));
    let disk = json!({
        "driver": "qcow2",
        "file": file(&kept),
        "backing": { "driver": "raw", "file": file(&base) },
    });
    let converted = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(format!("json:{disk}"))
        .arg(&flat)
        .output()
        .unwrap();
    assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
    assert_eq!(fs::metadata(&flat).unwrap().len(), LARGE << 20);
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&flat).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    assert_eq!(digests(&data.template("e2e")), before, "the template was written");
}
