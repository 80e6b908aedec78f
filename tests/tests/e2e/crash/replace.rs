//! Templates change under the sandboxes that run from them.

use std::fs;
use std::path::Path;

use e2e::template;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use template::{NewTemplate, TemplateFolder};

use super::{Case, Host, Phase, every, until};

/// Replaces the template by one with another root file system, in which nothing can run.
fn replace(host: &Host) {
    let path = host.template();
    let mut other = TemplateFolder::open(&path).expect("the template").template().clone();
    let new = NewTemplate::begin(path.parent().expect("a folder"), &"e2e".parse().expect("a name"))
        .expect("a template");
    let bytes = vec![b'x'; usize::try_from(other.rootfs.size).expect("a size")];
    fs::write(new.rootfs(), bytes).expect("the root file system is written");
    other.rootfs.digest = format!("sha256:{}", "0".repeat(64)).parse().expect("a digest");
    new.publish(&other).expect("the template is replaced");
}

/// A program that nobody has run yet is read from the root file system now.
fn assert_reads_its_own(case: &Case<'_>) {
    case.sh("echo 3 > /proc/sys/vm/drop_caches; sha256sum /bin/busybox");
    case.assert_marked();
}

#[test]
fn a_sandbox_whose_template_was_replaced_is_paused_forked_and_made_a_template() {
    for restore in ["auto", "never"] {
        let host = Host::warm();
        let mut case = host.case();
        let spec = case.dir.join("spec.json");
        let mut asked: Value = serde_json::from_slice(&fs::read(&spec).expect("a spec")).expect("JSON");
        asked["restore"] = restore.into();
        fs::write(&spec, asked.to_string()).expect("the spec is written");
        case.start(&[]);
        case.mark();
        let busybox = case.sh("sha256sum /bin/busybox");
        replace(&host);
        assert_reads_its_own(&case);

        let made = host.data().join("templates/made");
        let (status, said) = case.call("snapshot", &json!({ "path": made })).expect("an answer");
        assert_eq!(status, 200, "{said}");
        let original = fs::read(template().join("rootfs.ext4")).expect("the original");
        assert!(fs::read(made.join("rootfs.ext4")).expect("a root file system") == original, "another one");

        assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
        assert_eq!(case.ended().0, Some(3));
        assert_eq!(case.settle(false), Phase::Paused);
        assert!(fs::read(case.dir.join("snapshot/rootfs.ext4")).expect("a root file system") == original);
        // Twice: the second time it is its own snapshot's.
        for _ in 0..2 {
            case.start(&["--resume"]);
            assert_reads_its_own(&case);
            assert_eq!(case.sh("sha256sum /bin/busybox"), busybox);
            assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
            case.ended();
        }

        let mut clone = host.case();
        let spec =
            json!({ "schema_version": 1, "template": made, "accelerator": "tcg", "restore": "always" });
        fs::write(clone.dir.join("spec.json"), spec.to_string()).expect("the spec is written");
        clone.start(&[]);
        assert_reads_its_own(&clone);
        clone.settle(false);
        case.settle(false);
    }
}

/// Clones are started while the snapshot that they are of is made again and again; each is a clone, of one or of the other.
#[test]
fn clones_start_while_their_template_is_made_warm() {
    let host = Host::warm();
    let warm = || {
        let mut command = host.command(&["template", "warm", "--accel", "tcg", "e2e"]);
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("it starts")
    };
    let rounds = if every() { 10 } else { 1 };
    for _ in 0..rounds {
        // Two at once.
        let mut warming = [warm(), warm()];
        let mut clones = 0;
        while warming.iter_mut().any(|warming| warming.try_wait().expect("a child").is_none()) {
            let mut case = host.case();
            let spec = case.dir.join("spec.json");
            let mut asked: Value = serde_json::from_slice(&fs::read(&spec).expect("a spec")).expect("JSON");
            asked["restore"] = "always".into();
            fs::write(&spec, asked.to_string()).expect("the spec is written");
            assert_eq!(case.start(&[])["start"], "cloned");
            case.kill();
            clones += 1;
        }
        for mut warming in warming {
            assert!(warming.wait().expect("a child").success());
        }
        assert!(clones > 0);
    }
    host.assert_nothing_unfinished();
    host.assert_template_whole();
}

/// What is wrong with the snapshot of a paused sandbox is said; whatever it is, the folder stays as it is.
#[test]
fn a_snapshot_that_is_not_what_was_written_is_refused_and_stays() {
    let host = Host::warm();
    let mut paused = host.case();
    paused.start(&[]);
    paused.mark();
    assert_eq!(paused.call("pause", &json!({})).expect("an answer").0, 200);
    paused.ended();
    let snapshot = paused.dir.join("snapshot");
    let manifest = snapshot.join("manifest.json");
    let text = fs::read_to_string(&manifest).expect("a manifest");
    let rewrite = |text: &str| {
        fs::remove_file(&manifest).expect("it is there");
        fs::write(&manifest, text).expect("it is written");
    };
    let mut refused = |expected: &str| {
        let said = paused.try_start(&["--resume"]).expect_err(expected);
        assert!(said.contains(expected), "{expected}: {said}");
        assert_eq!(paused.settle(false), Phase::Paused);
    };
    rewrite(&text.replacen("\"schema_version\": 2", "\"schema_version\": 99", 1));
    refused("schema version 99");
    rewrite(&text[..text.len() / 2]);
    refused("manifest.json");
    rewrite(&" ".repeat(1 << 20));
    refused("expected at most 65536");
    rewrite(&text.replacen("tcg", "kvm", 1));
    refused("kvm");
    rewrite(&text);
    for name in ["state", "ram.delta", "scratch.qcow2"] {
        let (file, away) = (snapshot.join(name), host.path("away"));
        fs::rename(&file, &away).expect("it is there");
        refused("it is missing");
        std::os::unix::fs::symlink("/etc/passwd", &file).expect("a link");
        refused(name);
        fs::remove_file(&file).expect("the link");
        assert!(std::process::Command::new("mkfifo").arg(&file).status().expect("mkfifo runs").success());
        refused("expected a regular file");
        fs::remove_file(&file).expect("the FIFO");
        let mut bytes = fs::read(&away).expect("its contents");
        let at = bytes.len() / 3;
        bytes[at] ^= 1;
        fs::write(&file, &bytes).expect("it is written");
        refused("expected sha256");
        fs::remove_file(&file).expect("the copy");
        fs::rename(&away, &file).expect("it comes back");
    }
    // More than there was is nobody's business.
    fs::write(snapshot.join("notes"), "mine").expect("a file");
    let spec = paused.dir.join("spec.json");
    let asked = fs::read(&spec).expect("a spec");
    fs::remove_file(&spec).expect("it is there");
    let said = paused.try_start(&["--resume"]).expect_err("without a spec");
    assert!(said.contains("spec.json"), "{said}");
    fs::write(&spec, asked).expect("it is written");

    // Another shim has it.
    let mut other = Case { host: &host, dir: paused.dir.clone(), shim: None };
    paused.start(&["--resume"]);
    let said = other.try_start(&["--resume"]).expect_err("one sandbox, one shim");
    assert!(said.contains("belongs to a host-shim that is running"), "{said}");
    paused.assert_marked();
    paused.settle(false);
    assert!(!Path::new(&snapshot).exists());
}

#[test]
fn of_two_owners_calls_one_waits_for_the_other() {
    let host = Host::warm();
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    let answers = std::thread::scope(|scope| {
        let fork = json!({ "path": host.path("fork") });
        let calls = [
            ("fork", fork),
            ("pause", json!({})),
            ("pause", json!({})),
            ("stop", json!({ "grace_ms": 1000 })),
        ];
        let case = &case;
        let calls = calls.map(|(call, body)| {
            let calling = scope.spawn(move || case.call(call, &body));
            (call, calling)
        });
        calls.map(|(call, calling)| (call, calling.join().expect("an answer or none")))
    });
    let (code, said) = case.ended();
    let paused = answers.iter().filter(|(call, answer)| {
        *call == "pause" && answer.as_ref().is_some_and(|(status, _)| *status == 200)
    });
    let paused = paused.count();
    assert!(paused <= 1, "{answers:?}");
    assert_eq!(code, Some(if paused == 1 { 3 } else { 0 }), "{answers:?}: {said}");
    let phase = case.settle(false);
    assert_eq!(phase, if paused == 1 { Phase::Paused } else { Phase::Ended });
    case.assert_resumes(phase);
    host.assert_nothing_unfinished();
}

/// A signal in the middle of a verb ends the shim in order: the sandbox is paused, or has ended.
#[test]
fn a_signal_in_the_middle_of_a_verb_ends_the_sandbox_in_order() {
    let host = Host::warm();
    for (verb, body) in [
        ("pause", json!({})),
        ("fork", json!({ "path": host.path("fork") })),
        ("snapshot", json!({ "path": host.data().join("templates/made") })),
    ] {
        let mut case = host.case();
        case.start(&[]);
        case.mark();
        let shim = case.pid();
        std::thread::scope(|scope| {
            let calling = scope.spawn(|| case.call(verb, &body));
            // It has begun when something unfinished is there, or it is over already.
            until("the verb begins", || {
                calling.is_finished()
                    || case.state().is_some_and(|state| state["phase"] != "running")
                    || !super::host::unfinished(host.path("").as_path()).is_empty()
            });
            let _ = kill_process(shim, Signal::TERM);
            let _ = calling.join().expect("an answer or none");
        });
        let (code, said) = case.ended();
        let phase = case.settle(false);
        assert_eq!(code, Some(if phase == Phase::Paused { 3 } else { 0 }), "{verb}: {said}");
        host.assert_nothing_unfinished();
        case.assert_resumes(phase);
    }
    host.assert_template_unchanged();
}

/// The machine stands still for longer than an answer may take: its Freeze is late, and undone.
#[test]
fn a_freeze_that_is_done_late_is_undone() {
    if !every() {
        eprintln!("skipped: it takes the 30 s of an answer's deadline (TIFFIN_CRASH_EVERY=1 runs it)");
        return;
    }
    let host = Host::warm();
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    let vmm = case.vmm();
    kill_process(vmm, Signal::STOP).expect("it runs");
    let (status, said) = std::thread::scope(|scope| {
        let calling = scope.spawn(|| case.call("fork", &json!({ "path": host.path("fork") })));
        let goes_on = std::time::Instant::now() + std::time::Duration::from_secs(35);
        until("the deadline of the Freeze", || std::time::Instant::now() > goes_on);
        kill_process(vmm, Signal::CONT).expect("it is there");
        calling.join().expect("a call").expect("an answer")
    });
    assert_eq!(status, 500, "{said}");
    assert!(
        said["message"].as_str().is_some_and(|said| said.contains("did not answer the Freeze")),
        "{said}"
    );
    // The machine comes to the Freeze and to its end only now.
    case.assert_thaws();
    case.assert_marked();
    assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
    case.ended();
    let phase = case.settle(false);
    case.assert_resumes(phase);
}
