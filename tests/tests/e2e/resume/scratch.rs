//! What is on the scratch disk: not written out before a snapshot, and grown after one.

use std::process::Command;
use std::time::Instant;

use envd_proto::control::Shutdown;

use super::*;

const MIB: u64 = 1 << 20;

/// What ext4 itself takes of a disk, at most: inode tables and bitmaps.
const OVERHEAD: f64 = 0.08;

/// What a tenant has written and nobody synced.
const DIRTY: &str = "head -c 8000000 /dev/urandom > /root/dirty; sha256sum < /root/dirty";

/// Bytes that df says the container's root has.
async fn disk_total(client: &SandboxClient) -> u64 {
    let text = sh(client, "df -P -k / | awk 'END {print $2}'").await;
    text.trim().parse::<u64>().expect("a number") * 1024
}

fn assert_disk(total: u64, wanted: u64) {
    let least = (wanted as f64 * (1.0 - OVERHEAD)) as u64;
    assert!((least..=wanted).contains(&total), "df says {total} of {wanted}");
}

/// A machine of 64 MiB with an unsynced file, frozen without a sync, and the file's digest.
async fn dirty_snapshot(lab: &Lab) -> (Snapshot, String) {
    let mut source = Owned::boot(lab, Configure::default()).await;
    let (mut digest, mut times) = (String::new(), Vec::new());
    for skip_sync in [true, false, true] {
        digest = sh(&source.client, DIRTY).await;
        let began = Instant::now();
        source.host.tell(Request::Freeze(Freeze { skip_sync, ..Freeze::default() })).await;
        times.push((skip_sync, began.elapsed()));
        if times.len() < 3 {
            source.host.tell(Request::Thaw(Thaw {})).await;
        }
    }
    println!("Freeze of a machine with 8 MB that are not synced: {times:?} (skip_sync, time)");
    let Owned { machine, mut host, mux, client } = source;
    is_frozen(&mut host, &client, "user").await;
    drop((mux, client));
    (machine.into_snapshot(lab).await, digest)
}

/// Ends a machine and has its disk checked by e2fsck; gives what dumpe2fs says of its features.
async fn check(machine: Machine, mut host: Host) -> String {
    host.tell(Request::Shutdown(Shutdown { grace_ms: 1000 })).await;
    let disk = machine.ended().await;
    let checked = Command::new("e2fsck").args(["-f", "-n"]).arg(&disk).output().expect("e2fsck runs");
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{said}{}", String::from_utf8_lossy(&checked.stderr));
    let shown = Command::new("dumpe2fs").arg("-h").arg(&disk).output().expect("dumpe2fs runs");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let features = shown.lines().find(|line| line.starts_with("Filesystem features:")).expect("its features");
    features.to_owned()
}

fn sized(bytes: u64) -> Configure {
    Configure { scratch_bytes: bytes, ..Configure::default() }
}

fn scratch_error(resumed: &Resumed) -> &str {
    let part = resumed.parts.iter().find(|part| part.name == "scratch").expect("the part");
    println!("scratch: {} us", part.duration_us);
    &part.error
}

#[tokio::test]
async fn a_disk_that_the_host_made_larger_is_larger_in_the_sandbox_and_nothing_unsynced_is_lost() {
    let lab = Lab::new(Vec::new());
    let (snapshot, digest) = dirty_snapshot(&lab).await;

    // Made larger before the agent is asked.
    let (mut machine, mut host, mux) = restored(&lab, &snapshot, "before").await;
    machine.resize_scratch(200 * MIB).await;
    let resumed = host.resume(Kind::Clone, 1, LATER, Some(sized(200 * MIB))).await;
    assert_eq!(scratch_error(&resumed), "");
    let mux = connect_mux(mux, 2).await;
    let client = client(&mux);
    host.tell(Request::Thaw(Thaw {})).await;
    assert_disk(disk_total(&client).await, 200 * MIB);
    assert_eq!(sh(&client, "sha256sum < /root/dirty").await, digest);
    // More than the old disk had.
    let written = sh(
        &client,
        "for n in 1 2 3 4 5 6 7 8; do cat /root/dirty /root/dirty; done > /root/large && sync && \
         cat /root/dirty /root/dirty > /root/twice && head -c 16000000 /root/large | cmp - /root/twice && \
         tail -c 16000000 /root/large | cmp - /root/twice && wc -c < /root/large; sha256sum < /root/dirty",
    )
    .await;
    assert_eq!(written, format!("128000000\n{digest}"));
    let features = check(machine, host).await;
    // More group descriptors have their room beside the first.
    assert!(features.contains("resize_inode") && !features.contains("meta_bg"), "{features}");
}

#[tokio::test]
async fn a_disk_that_becomes_larger_after_the_request_is_waited_for() {
    let lab = Lab::new(Vec::new());
    let source = Owned::boot(&lab, Configure::default()).await;
    sh(&source.client, "echo kept > /root/kept").await;
    let (snapshot, _) =
        source.into_snapshot(&lab, Freeze { skip_sync: true, ..Freeze::default() }, "user").await;

    let (mut machine, mut host, mux) = restored(&lab, &snapshot, "after").await;
    // Smaller than it is: left as it is.
    let resumed = host.resume(Kind::Clone, 1, LATER, Some(sized(MIB))).await;
    assert_eq!(scratch_error(&resumed), "");
    // Twice: a file system that was grown is grown again.
    machine.resize_scratch(130 * MIB).await;
    let resumed = host.resume(Kind::Clone, 1, LATER, Some(sized(130 * MIB))).await;
    assert_eq!(scratch_error(&resumed), "");
    // So large that one block of group descriptors is not enough.
    let wanted = 20 << 30;
    let asked = host.begin_resume(Kind::Clone, 2, LATER, Some(sized(wanted))).await;
    machine.says("waiting for the disk").await;
    // Not yet enough.
    machine.resize_scratch(wanted / 2).await;
    machine.resize_scratch(wanted).await;
    let resumed = host.resumed(asked).await;
    assert_eq!(scratch_error(&resumed), "");
    let mux = connect_mux(mux, 4).await;
    let client = client(&mux);
    host.tell(Request::Thaw(Thaw {})).await;
    assert_disk(disk_total(&client).await, wanted);
    let written =
        sh(&client, "cat /root/kept; head -c 100000000 /dev/zero > /root/large && sync; wc -c < /root/large");
    assert_eq!(written.await, "kept\n100000000\n");
    let features = check(machine, host).await;
    assert!(features.contains("resize_inode") && !features.contains("meta_bg"), "{features}");
}
