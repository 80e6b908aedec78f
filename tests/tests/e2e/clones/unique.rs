//! Fifty clones of one snapshot at once, and nothing that must be one's own is in two of them.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use e2e::process::timely;
use e2e::{TestData, TestSandbox};
use host_shim::network::GUEST_MAC;
use serde_json::{Value, json};

use super::{Mapped, many, spread};
use crate::snapshots::ask;

const CLONES: usize = 50;

/// What a clone's kernel, its libraries and its identity say, from the image's draw.py, and its SSH host key.
type Drawn = BTreeMap<String, String>;

/// One server of which nobody thinks, and one that heeds the image's hook.
const START: &str = "python3 /root/serve.py 8000 & exec python3 /root/serve.py 8001 reseed";

/// The first run of what each clone runs warms the page cache that they share.
const READY: &str =
    "exec 3<>/dev/tcp/127.0.0.1/8000 4<>/dev/tcp/127.0.0.1/8001 && python3 /root/draw.py > /root/drawn";

async fn draw(clone: &TestSandbox) -> Drawn {
    let mut drawn: Drawn = serde_json::from_str(&clone.stdout("python3 /root/draw.py").await).expect("JSON");
    // Nobody listens; but whoever connects has waited for the host keys.
    assert!(timely("the port of SSH", clone.client().connect_port(22)).await.is_err());
    let key = clone.stdout("cd /etc/ssh; ls ssh_host_*; cut -d ' ' -f 2 ssh_host_ed25519_key.pub").await;
    let key = key.strip_prefix("ssh_host_ed25519_key\nssh_host_ed25519_key.pub\n");
    drawn.insert("SSH host key".to_owned(), key.expect("the keys of the image's ssh-keygen").to_owned());
    drawn
}

/// In each of these, everything is different from the others.
fn assert_all_differ(all: &[Drawn]) {
    let names: Vec<_> = all[0].keys().cloned().collect();
    println!("distinct over {}: {}", all.len(), names.join(", "));
    assert!(names.len() >= 13, "{names:?}");
    let mut seen = HashSet::new();
    for drawn in all {
        assert_eq!(drawn.keys().cloned().collect::<Vec<_>>(), names);
        for (name, value) in drawn {
            assert!(value.len() >= 8 && seen.insert(value), "{name} {value} was drawn twice");
        }
    }
}

#[tokio::test]
async fn fifty_clones_at_once_have_nothing_in_common_that_must_be_ones_own() {
    let data = TestData::new();
    data.copy("clones");
    TestData::edit(&data.template("clones").join("template.json"), |template| {
        template["runtime"]["start_command"] = json!(START);
        template["runtime"]["ready_command"] = json!(READY);
    });
    data.warm("clones");

    let began = Instant::now();
    let clones = many(
        CLONES,
        |_| TestSandbox::clone_of(&data, "clones"),
        |_, clone| async move {
            // What its live processes draw comes first: the servers' next number after the snapshot.
            let unaware = ask(&clone, 8000, "random").await;
            let aware = ask(&clone, 8001, "random").await;
            let pss = Mapped::of(clone.vmm().as_raw_pid(), "").pss;
            let drawn = draw(&clone).await;
            (clone, (drawn, unaware, aware, pss))
        },
    )
    .await;
    println!("{CLONES} clones have started, and drawn, after {:?}", began.elapsed());

    // All of them live.
    let mut ids = HashSet::new();
    let mut later = Vec::new();
    for (clone, _) in &clones {
        let said = clone.stdout("cat /proc/sys/kernel/random/uuid /root/drawn").await;
        let (uuid, of_template) = said.split_once('\n').expect("two lines");
        let of_template: Drawn = serde_json::from_str(of_template).expect("JSON");
        later.push((uuid.to_owned(), of_template));
        let state: Value = clone.state();
        assert_eq!((&state["start"], &state["phase"]), (&json!("cloned"), &json!("running")));
        assert!(ids.insert(state["id"].as_str().expect("an id").to_owned()));
    }
    let mut all: Vec<Drawn> = clones.iter().map(|(_, (drawn, ..))| drawn.clone()).collect();
    for (clone, drawn) in clones.iter().zip(&all) {
        assert_eq!(clone.0.state()["id"], drawn["hostname"]);
    }
    // Each is alone with its gateway on its network, where this address is part of the snapshot.
    for drawn in all.iter_mut().chain(later.iter_mut().map(|(_, of_template)| of_template)) {
        assert_eq!(drawn.remove("MAC of eth0").as_deref(), Some(GUEST_MAC));
    }
    assert_all_differ(&all);
    // Nor is anything what the template's machine had drawn, nor is there a second time of it.
    let of_template = &later[0].1;
    assert!(later.iter().all(|(_, drawn)| drawn == of_template), "it is the snapshot's");
    for (name, value) in of_template {
        assert!(all.iter().all(|drawn| drawn[name] != *value), "{name} {value} is the template's");
    }
    let uuids: HashSet<_> =
        all.iter_mut().filter_map(|drawn| drawn.remove("/proc/sys/kernel/random/uuid")).collect();
    let again: HashSet<_> = later.into_iter().map(|(uuid, _)| uuid).collect();
    assert!(again.len() == CLONES && uuids.is_disjoint(&again));

    // What cannot be one's own: a process that runs on has its generator in its memory, as the snapshot has it. Only the
    // process can draw anew, and the hook of the image tells it to.
    let unaware: HashSet<_> = clones.iter().map(|(_, (_, unaware, ..))| unaware).collect();
    assert_eq!(unaware.len(), 1, "a live generator was made anew: say so in envd/README.md");
    let aware: HashSet<_> = clones.iter().map(|(_, (_, _, aware, _))| aware).collect();
    assert_eq!(aware.len(), CLONES, "the hook has not renewed the generators");

    let pss = |pid: i32| Mapped::of(pid, "").pss;
    println!(
        "Pss of the VMMs in KiB (median, largest): {:?} at the first question, {:?} in the end; of the shims {:?}",
        spread(clones.iter().map(|(_, (.., pss))| *pss).collect()),
        spread(clones.iter().map(|(clone, _)| pss(clone.vmm().as_raw_pid())).collect()),
        spread(clones.iter().map(|(clone, _)| pss(clone.shim().as_raw_pid())).collect())
    );
    for (clone, _) in clones {
        // Nothing is left to be saved.
        clone.call("POST /stop", json!({ "grace_ms": 0 })).await;
        let (status, said) = clone.ended().await;
        assert!(status.success(), "{said}");
    }
}
