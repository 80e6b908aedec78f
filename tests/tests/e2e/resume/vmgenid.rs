//! A VMM with a VM generation ID: the kernel sees by itself that it was cloned, and the agent's seed works beside it.
//!
//! host-shim's machines have none (QEMU's microvm has no ACPI): what there is for them alone is the seed, of which
//! `clones::unique` is the proof.

use super::*;

/// The kernel's own words, from `add_vmfork_randomness`.
const SEEN: &str = "crng reseeded due to virtual machine fork";

/// As much as a clone draws at once.
const DRAW: &str = "cat /proc/sys/kernel/random/uuid; for n in 1 2 3; do head -c 16 /dev/urandom | hexdump -e '16/1 \"%02x\"' -v; echo; done";

/// What a clone draws when it was given this seed.
async fn draw(lab: &Lab, snapshot: &Snapshot, name: &str, seed: u8) -> Vec<String> {
    let (mut machine, mut host, mux) = restored(lab, snapshot, name).await;
    let owner_of = Configure { hostname: name.into(), ..Default::default() };
    let resumed = host.resume(Kind::Clone, seed, LATER, Some(owner_of)).await;
    assert_all_done(&resumed, &PARTS);
    let mux = connect_mux(mux, 2).await;
    let client = client(&mux);
    host.tell(Request::Thaw(Thaw {})).await;
    let seen = sh(&client, &format!("dmesg | grep -c '{SEEN}'")).await;
    assert_eq!(seen, "1\n", "the kernel has not seen that it was cloned");
    let drawn = sh(&client, DRAW).await;
    machine.stop().await;
    drawn.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn clones_with_a_vm_generation_id_differ_by_that_and_by_the_seed() {
    let lab = Lab::new(Vec::new()).with_vmgenid();
    let source = Owned::boot(&lab, Configure::default()).await;
    let before =
        sh(&source.client, &format!("dmesg | grep '{SEEN}'; cat /proc/sys/kernel/random/uuid")).await;
    assert!(!before.contains(SEEN), "{before}");
    let (busy, _) = start_printing(&source.client, COUNTER).await;
    let (snapshot, _) = source.into_snapshot(&lab, Freeze::default(), "user").await;
    drop(busy);
    let mut seen: HashSet<String> = before.lines().map(str::to_owned).collect();
    // The same seed twice, which no host gives: what tells these apart is the generation ID alone.
    for (name, seed) in [("one", 1), ("two", 1), ("three", 2), ("four", 3)] {
        let drawn = draw(&lab, &snapshot, name, seed).await;
        assert_eq!(drawn.len(), 4);
        for number in drawn {
            assert!(
                number.len() >= 32 && seen.insert(number.clone()),
                "{name} has drawn {number}, as another has"
            );
        }
    }
}
