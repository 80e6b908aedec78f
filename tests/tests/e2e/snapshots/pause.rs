//! A paused sandbox is a folder, and resumed it is the same sandbox.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use e2e::process::{
    COUNTER, HOLDER, counted, printed, printed_to_the_end, printed_until, timely, type_line, type_on_terminal,
};
use e2e::{Channel, Paused, TestData, TestSandbox};
use sandbox_folder::client::{Code, SandboxClient};
use serde_json::json;

/// Everything that stays as it was.
const IDENTITY: &str = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; echo $TENANT";

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_secs()).expect("a time")
}

/// Nothing of it runs, and its RAM is the host's again: whoever had it is gone.
fn assert_nothing_runs(paused: &Paused, pids: &[i32]) {
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} runs");
    }
    assert_eq!(TestSandbox::processes_of(&paused.dir()), [0; 0]);
    let state = paused.state();
    assert_eq!((&state["phase"], &state["vmm_pid"]), (&json!("paused"), &json!(null)));
    let mut left: Vec<_> = fs::read_dir(paused.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.retain(|name| !name.starts_with("console.log"));
    left.sort();
    assert_eq!(left, ["lock", "shim.log", "snapshot", "spec.json", "state.json"]);
}

/// Megabytes of RAM that a process has.
fn resident_mib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test]
async fn a_sandbox_that_was_paused_three_times_has_lost_nothing() {
    let builder = TestSandbox::of(Channel::Serial).set("hostname", "lunchbox").set("access_token", "secret");
    let mut sandbox = builder.set("env", json!({ "TENANT": "mine" })).set("timeout_s", 3600).start().await;
    let identity = sandbox.stdout(IDENTITY).await;
    assert!(identity.ends_with("\nlunchbox\nmine\n"), "{identity}");
    let id = sandbox.state()["id"].clone();

    // Half of its output is read; what it has printed meanwhile, and prints on, nobody reads.
    let mut counter = sandbox.start_script(COUNTER).await;
    let first = printed(&mut counter).await;
    let mut holder = sandbox.start_script(HOLDER).await;
    assert_eq!(printed(&mut holder).await, b"ready\n");
    let mut terminal = sandbox.start_on_terminal("stty -echo; echo typed; exec cat").await;
    assert!(printed_until(&mut terminal, "typed\r\n").await.ends_with("typed\r\n"));
    let [counter, holder, terminal] = [counter.pid(), holder.pid(), terminal.pid()];
    let running = sandbox.pids().await;
    assert_eq!(running, [counter, holder, terminal]);
    let mut typed = "typed\r\n".len() as u64;
    let mut progress = String::new();

    for time in 1..=3 {
        let pids = [sandbox.vmm(), sandbox.shim()].map(rustix::process::Pid::as_raw_pid);
        let resident = resident_mib(pids[0]);
        let paused = sandbox.pause().await;
        assert_nothing_runs(&paused, &pids);
        println!("pause {time}, of {resident} MiB: {}", paused.taken());
        // So long that a clock that stood still would be seen.
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        let before = now();
        sandbox = paused.resume().await;
        println!("resume {time}: {} ms {}", sandbox.ready()["total_ms"], sandbox.ready()["phases"]);
        let clock: i64 = sandbox.stdout("date +%s").await.trim().parse().unwrap();
        assert!((before - 1..=now() + 1).contains(&clock), "{clock}, expected {before} or a little later");

        let state = sandbox.state();
        assert_eq!((&state["start"], &state["id"]), (&json!("resumed"), &id));
        assert_eq!(state["generation"], json!(1 + time));
        assert!(!sandbox.dir().join("snapshot").exists(), "it would be another life of the same sandbox");
        assert_eq!(sandbox.stdout(IDENTITY).await, identity);
        let nobody = SandboxClient::unix(sandbox.dir().join("vsock.sock"));
        assert_eq!(nobody.processes().await.unwrap_err().code(), Some(Code::Unauthenticated));
        assert_eq!(sandbox.pids().await, running);
        assert_eq!(sandbox.stdout("cat /root/progress 2>/dev/null; true").await, progress);
        progress = sandbox.stdout(&format!("echo {time} >> /root/progress; cat /root/progress")).await;

        type_on_terminal(&sandbox.client(), terminal, &format!("line {time}")).await;
        let expected = format!("line {time}\r\n");
        let mut reattached = sandbox.attach(terminal, typed).await;
        assert_eq!(printed_until(&mut reattached, &expected).await, expected);
        typed += expected.len() as u64;
    }

    type_line(&sandbox.client(), holder, "after").await;
    let held = printed_to_the_end(sandbox.attach(holder, 0).await).await;
    assert_eq!(String::from_utf8_lossy(&held), "ready\nbefore\nafter\n");
    sandbox.stdout("touch /tmp/stop").await;
    let rest = printed_to_the_end(sandbox.attach(counter, first.len() as u64).await).await;
    println!("the counter has come to {}", counted(&[first, rest].concat()));
    let size =
        timely("a size", sandbox.client().output("/bin/sh", ["-c", "stty size < /dev/pts/0"])).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&size.stdout), "33 91\n");
    let (status, said) = sandbox.stop().await;
    assert!(status.success(), "{said}");
}

#[tokio::test]
async fn a_paused_sandbox_goes_on_from_a_copy_of_its_folder_without_its_template() {
    let data = TestData::warmed("e2e");
    let sandbox = TestSandbox::clone_of(&data, "e2e").start().await;
    sandbox
        .stdout("head -c 3000000 /dev/urandom > /root/file; sha256sum < /root/file > /root/digest; sync")
        .await;
    let identity = sandbox.stdout(IDENTITY).await;
    let moved = |paused: Paused| {
        let old = paused.dir();
        let paused = paused.moved();
        assert!(!old.exists() && paused.dir() != old);
        paused
    };
    let paused = moved(sandbox.pause().await);
    let elsewhere = data.path().join("elsewhere");
    fs::rename(data.template("e2e"), &elsewhere).unwrap();

    // Its root file system is in the snapshot.
    assert!(paused.dir().join("snapshot/rootfs.ext4").exists());
    let sandbox = paused.resume().await;
    let check = "sha256sum < /root/file | cmp - /root/digest && echo same";
    assert_eq!(sandbox.stdout(check).await, "same\n");
    assert_eq!(sandbox.stdout(IDENTITY).await, identity);

    // In one that has none it is the template's, which is named.
    let paused = moved(sandbox.pause().await);
    let snapshot = paused.dir().join("snapshot");
    fs::remove_file(snapshot.join("rootfs.ext4")).unwrap();
    TestData::edit(&snapshot.join("manifest.json"), |manifest| {
        manifest["files"].as_object_mut().unwrap().remove("rootfs.ext4").expect("the rootfs");
    });
    let (paused, said) = paused.try_resume(&[]).await.err().expect("there is no rootfs");
    assert!(said.contains("no template at") && said.contains("(exit status: 2)"), "{said}");
    data.copy_as("clones", "other");
    let (paused, said) =
        paused.try_resume(&[data.template("other").as_os_str()]).await.err().expect("it is another rootfs");
    assert!(said.contains("was paused with the root file system sha256:"), "{said}");
    assert_eq!(paused.state()["phase"], "paused");
    let sandbox = paused.try_resume(&[elsewhere.as_os_str(), OsStr::new("--quiet")]).await;
    let sandbox = sandbox.unwrap_or_else(|(_, said)| panic!("{said}"));
    assert_eq!(sandbox.stdout(check).await, "same\n");
    assert_eq!(sandbox.stdout(IDENTITY).await, identity);
    sandbox.stop().await;
}

#[tokio::test]
async fn a_restricted_sandbox_with_two_cpus_is_paused_and_forked_like_any_other() {
    let builder = TestSandbox::of(Channel::Serial).set("cpus", 2).set("memory_mib", 200).set("disk_mib", 64);
    let sandbox = builder.set("profile", "restricted").start().await;
    let look =
        "nproc; cat /data/deep/file; dd if=/dev/vda of=/dev/null count=1 2>/dev/null || echo restricted";
    let expected = "2\nseed\nrestricted\n";
    assert_eq!(sandbox.stdout(look).await, expected);
    let mut busy = Vec::new();
    for _ in 0..2 {
        busy.push(sandbox.start_script(COUNTER).await.pid());
    }
    sandbox.stdout("echo kept > /data/kept; echo kept > /root/kept").await;
    let sandbox = sandbox.pause().await.resume().await;
    assert_eq!(sandbox.stdout(look).await, expected);
    let forked = sandbox.fork().await;
    let child = forked.child().start().await;
    for sandbox in [sandbox, child] {
        assert_eq!(sandbox.stdout(look).await, expected);
        assert_eq!(sandbox.stdout("cat /data/kept /root/kept; touch /tmp/stop").await, "kept\nkept\n");
        for pid in &busy {
            counted(&printed_to_the_end(sandbox.attach(*pid, 0).await).await);
        }
        sandbox.stop().await;
    }
}
