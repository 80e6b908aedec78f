//! The program itself with a model of Firecracker (`examples/firecracker_model`): every verb that it can do, and every way in
//! which Firecracker can fail under it.

mod host;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use host::{Host, until};

const BOOT: [&str; 6] = [
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/rootfs",
    "PUT /drives/scratch",
    "PUT /vsock",
    "PUT /actions",
];

#[test]
fn a_command_runs_and_nothing_is_left() {
    let host = Host::new();
    let run = ["run", "--vmm", "firecracker", "--accel", "kvm", "--json", "demo", "--entrypoint", "", "--"];
    let (code, stdout, stderr) = host.run(&[&run[..], &["count"]].concat());
    assert_eq!((code, stdout.as_str()), (0, "1\n"), "{stderr}");
    let report: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert_eq!((&report["accelerator"], &report["channel"]), (&"kvm".into(), &"hybrid-vsock".into()));
    assert_eq!(host.requests(), BOOT);
    host.assert_nothing_left();
    let (code, stdout, _) = host.run(&[&run[..], &["line"]].concat());
    assert_eq!(code, 0);
    for word in
        ["reboot=k", "panic=-1", "envd.channel=vsock", "envd.rootfs=/dev/vda", "envd.scratch=/dev/vdb"]
    {
        assert!(stdout.split_whitespace().any(|found| found == word), "{word}: {stdout}");
    }
    let (code, _, _) = host.run(&[&run[..], &["novel"]].concat());
    assert_eq!(code, 1, "the exit code is the command's");
    host.assert_nothing_left();
}

#[test]
fn a_sandbox_that_stays_is_used_and_stopped() {
    let host = Host::new();
    let id = host.start();
    let state = host.state(&id);
    assert_eq!((&state["phase"], &state["start"]), (&"running".into(), &"booted".into()));
    assert_eq!((&state["accelerator"], &state["channel"]), (&"kvm".into(), &"hybrid-vsock".into()));
    assert_eq!((host.exec(&id, &["count"]), host.exec(&id, &["count"])), ("1".into(), "2".into()));
    let folder = host.path("data/sandboxes").join(&id);
    until("the console is kept", || {
        fs::read_to_string(folder.join("console.log")).is_ok_and(|text| text.contains("Linux version"))
    });
    until("the VMM's log is kept", || {
        fs::read_to_string(folder.join("vmm.log")).is_ok_and(|text| text.contains("Running the model"))
    });
    // The ports door, by the shim's own socket; the model gives back what it gets.
    let mut stream = UnixStream::connect(folder.join("vsock.sock")).unwrap();
    stream.write_all(b"CONNECT 49984\nping").unwrap();
    let mut said = String::new();
    while !said.ends_with("ping") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        said.push(char::from(byte[0]));
    }
    assert!(said.starts_with("OK "), "{said}");
    // One connection to the control door, and nobody behind it afterwards.
    assert!(!folder.join("vmm/vsock_1024").exists());
    host.ok(&["stop", &id]);
    until("every VMM is gone", || host.models().is_empty());
    let state = host.state(&id);
    assert_eq!((&state["phase"], &state["end"]["reason"]), (&"ended".into(), &"stopped".into()));
    assert!(!folder.join("vmm").exists() && folder.join("vmm.log").exists());
    host.ok(&["rm", &id]);
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_takes_its_vmm_with_it() {
    let host = Host::new();
    let id = host.start();
    let shim = host.state(&id)["shim_pid"].as_i64().unwrap();
    assert_eq!(host.models().len(), 1);
    kill_process(Pid::from_raw(shim.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    until("the VMM is gone", || host.models().is_empty());
    until("its reaper has swept", || {
        host.ok(&["sweep"]);
        host.state(&id)["phase"] == "ended"
    });
    host.ok(&["rm", &id]);
    host.assert_nothing_left();
}

#[test]
fn a_vmm_that_dies_ends_its_sandbox() {
    let host = Host::new();
    let id = host.start();
    let [vmm] = host.models()[..] else { panic!("one VMM") };
    kill_process(Pid::from_raw(vmm).unwrap(), Signal::KILL).unwrap();
    until("the sandbox has ended", || host.state(&id)["phase"] == "ended");
    assert!(host.state(&id)["end"]["message"].as_str().unwrap().contains("the VMM was killed by signal 9"));
    // Its shim may still be on its way out.
    host.ok(&["rm", "--force", &id]);
    host.assert_nothing_left();
}

#[test]
fn sandboxes_of_a_warm_template_are_clones() {
    let host = Host::new();
    let snapshot = host.ok(&["template", "warm", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    let snapshot = Path::new(&snapshot);
    let name = snapshot.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("firecracker-1.16.1-kvm-"), "{name}");
    let boot_and_full = [&BOOT[..], &["PATCH /vm", "PUT /snapshot/create", "PATCH /vm"]].concat();
    assert!(host.said().contains(r#""snapshot_type":"Full""#));
    assert_eq!(host.requests(), boot_and_full);
    host.assert_nothing_left();
    use std::os::unix::fs::MetadataExt;
    let ram = snapshot.join("ram");
    assert_eq!(ram.metadata().unwrap().len(), 64 << 20);
    assert!(ram.metadata().unwrap().blocks() * 512 < 1 << 20, "the zero pages are holes");
    let before = fs::read(&ram).unwrap();

    let ids = [host.start(), host.start()];
    assert_eq!(host.requests(), ["PUT /snapshot/load", "PATCH /vm", "PUT /snapshot/load", "PATCH /vm"]);
    for id in &ids {
        assert_eq!(host.state(id)["start"], "cloned", "{}", host.state(id));
        assert_eq!(host.state(id)["generation"], 2);
        assert_eq!(host.exec(id, &["count"]), "1", "a RAM of its own");
        host.exec(id, &["write", id]);
    }
    for id in &ids {
        assert_eq!(host.exec(id, &["read"]), *id, "a disk of its own");
    }
    assert!(fs::read(&ram).unwrap() == before, "the template's RAM is never written");
    // Where it does not fit the sandbox boots, or says so.
    let (code, _, stderr) =
        host.run(&["run", "--vmm", "firecracker", "--accel", "kvm", "--cpus", "1", "demo"]);
    assert!(code == 0 && stderr.contains("made with --cpus 2"), "{stderr}");
    host.end(&[&ids[0], &ids[1]]);
}

#[test]
fn a_parked_clone_is_made_somebodys() {
    let host = Host::new();
    host.ok(&["template", "warm", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    let (spec, dir) = (host.path("spec.json"), host.path("s"));
    let text = r#"{"schema_version":1,"template":"data/templates/demo","vmm":"firecracker","accelerator":"kvm","restore":"always"}"#;
    fs::write(&spec, text).unwrap();
    let (spec, dir) = (spec.to_str().unwrap(), dir.to_str().unwrap());
    let shim = host.command(&["run", "--spec", spec, "--dir", dir, "--park"]);
    let mut shim = { shim }.stdout(Stdio::piped()).spawn().unwrap();
    let state = || fs::read_to_string(Path::new(dir).join("state.json")).unwrap_or_default();
    until("it is parked", || state().contains("\"parked\"") && Path::new(dir).join("api.sock").exists());
    host.ok(&["configure", dir]);
    assert!(state().contains("\"running\"") && state().contains("\"generation\": 3"), "{}", state());
    assert_eq!(host.exec(dir, &["count"]), "1");
    host.ok(&["stop", dir]);
    assert_eq!(shim.wait().unwrap().code(), Some(0));
    host.assert_nothing_left();
}

#[test]
fn a_clone_can_have_a_larger_disk() {
    let host = Host::new();
    host.ok(&["template", "warm", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    host.requests();
    let id = host.ok(&["start", "--vmm", "firecracker", "--accel", "kvm", "--disk", "24", "demo"]);
    assert_eq!(host.requests(), ["PUT /snapshot/load", "PATCH /vm", "PATCH /drives/scratch"]);
    assert_eq!(host.exec(&id, &["size"]), (24 << 20).to_string());
    host.end(&[&id]);
}

#[test]
fn a_paused_sandbox_goes_on_and_again() {
    let host = Host::new();
    let id = host.start();
    host.exec(&id, &["poke", "700", "first"]);
    host.exec(&id, &["write", "on disk"]);
    host.requests();
    for (round, kind) in [(1, "Full"), (2, "Diff"), (3, "Diff")] {
        host.ok(&["pause", &id]);
        until("every VMM is gone", || host.models().is_empty());
        assert!(host.said().contains(&format!(r#""snapshot_type":"{kind}""#)), "{}", host.said());
        assert_eq!(host.requests(), ["PATCH /vm", "PUT /snapshot/create"]);
        assert_eq!(host.state(&id)["phase"], "paused");
        host.ok(&["resume", &id]);
        assert_eq!(host.state(&id)["start"], "resumed");
        assert!(host.said().contains("track_dirty_pages\":true"), "{}", host.said());
        assert_eq!(host.requests(), ["PUT /snapshot/load", "PATCH /vm"]);
        assert_eq!(host.exec(&id, &["count"]), round.to_string());
        assert_eq!(host.exec(&id, &["peek", "700"]), "first");
        assert_eq!(host.exec(&id, &["read"]), "on disk");
        assert!(!host.path("data/sandboxes").join(&id).join("snapshot").exists(), "it is used up");
    }
    host.end(&[&id]);
}

/// The source of a snapshot goes on, with an agent that has dialled again, and its clients are told.
#[test]
fn a_snapshot_of_a_running_sandbox_is_a_template() {
    let host = Host::new();
    let id = host.start();
    host.exec(&id, &["poke", "9", "kept"]);
    let (mut waiting, mut out) = waiting(&host, &id);
    host.ok(&["snapshot", &id, "snap"]);
    // Its stream was cut, and it attached to its process again where it was.
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "again from 8\n");
    assert!(waiting.wait().unwrap().success());
    assert_eq!(host.state(&id)["phase"], "running");
    assert_eq!(host.exec(&id, &["count"]), "1");

    let clone = host.ok(&["start", "--accel", "kvm", "snap"]);
    assert_eq!(host.state(&clone)["channel"], "hybrid-vsock", "the snapshot says which VMM");
    assert_eq!(host.exec(&clone, &["peek", "9"]), "kept");
    assert_eq!(host.exec(&clone, &["count"]), "1");
    assert_eq!(host.exec(&id, &["count"]), "2");
    host.end(&[&id, &clone]);
}

/// A command that does not end, once its first words have come.
fn waiting(host: &Host, id: &str) -> (Child, impl Read + use<>) {
    let mut child = host.command(&["exec", id, "--", "wait"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut word = [0; 8];
    out.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"waiting\n");
    (child, out)
}

#[test]
fn forks_go_on_from_each_other_and_from_where_they_are() {
    let host = Host::new();
    let source = host.start();
    host.exec(&source, &["poke", "5", "source"]);
    let child = host.ok(&["fork", &source]);
    assert_eq!(host.exec(&child, &["peek", "5"]), "source");
    host.exec(&child, &["poke", "6", "child"]);
    host.exec(&child, &["write", "child's disk"]);
    host.requests();
    // Twice from a restored one: the second begins from what the first has written.
    let first = host.ok(&["fork", &child]);
    host.exec(&child, &["poke", "7", "later"]);
    let second = host.ok(&["fork", &child]);
    assert_eq!(host.said().matches(r#""snapshot_type":"Diff""#).count(), 2, "{}", host.said());
    for (id, page, expected) in [
        (&first, "5", "source"),
        (&first, "6", "child"),
        (&first, "7", ""),
        (&second, "5", "source"),
        (&second, "6", "child"),
        (&second, "7", "later"),
        (&source, "6", ""),
    ] {
        assert_eq!(host.exec(id, &["peek", page]), expected, "page {page}");
    }
    assert_eq!(host.exec(&second, &["read"]), "child's disk");
    assert_eq!(host.exec(&source, &["read"]), "");
    host.end(&[&source, &child, &first, &second]);
}

#[test]
fn an_older_version_is_asked_for_no_more_than_it_knows() {
    for (version, field, kind) in [("1.12.0", Some("enable_diff_snapshots"), "Diff"), ("1.5.0", None, "Full")]
    {
        let host = Host::of_version(version);
        let id = host.start();
        let child = host.ok(&["fork", &id]);
        host.exec(&child, &["poke", "5", "x"]);
        assert!(!host.said().contains("track_dirty_pages"), "{}", host.said());
        assert_eq!(host.said().contains("enable_diff_snapshots"), field.is_some());
        host.requests();
        let second = host.ok(&["fork", &child]);
        assert!(host.said().contains(&format!(r#""snapshot_type":"{kind}""#)), "{}", host.said());
        assert_eq!(host.exec(&second, &["peek", "5"]), "x");
        host.end(&[&id, &child, &second]);
    }
}

#[test]
fn a_snapshot_of_another_version_does_not_fit() {
    let mut host = Host::new();
    host.ok(&["template", "warm", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    let id = host.start();
    host.ok(&["pause", &id]);
    host.version = "1.17.0".to_owned();
    fs::remove_dir_all(host.path("data/cache")).unwrap();
    let (code, _, stderr) = host.run(&["run", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    assert!(code == 0 && stderr.contains("made with Firecracker 1.16.1, this host has 1.17.0"), "{stderr}");
    let (code, _, stderr) = host.run(&["resume", &id]);
    assert!(code != 0 && stderr.contains("it can be resumed only where it fits"), "{stderr}");
    assert_eq!(host.state(&id)["phase"], "paused", "and is still paused");
    host.ok(&["rm", "--force", &id]);
    host.assert_nothing_left();
}

#[test]
fn what_it_cannot_do_is_said_before_anything_starts() {
    let host = Host::new();
    for (args, expected) in [
        (&["--channel", "serial"][..], "has a channel of its own and not serial: leave --channel out"),
        (&["--channel", "vhost-user-vsock"], "not vhost-user-vsock"),
        (&["--accel", "tcg"], "runs guests on KVM only"),
        (&["--cpus", "33"], "at most 32 virtual CPUs, and not 33"),
    ] {
        let (code, _, stderr) = host.run(&[&["run", "--vmm", "firecracker"], args, &["demo"]].concat());
        assert_eq!(code, 125, "{stderr}");
        assert!(stderr.contains(expected) && stderr.contains("--vmm qemu can do it"), "{stderr}");
    }
    // Whether this host has no KVM at all, or one on which no kernel runs.
    let host = Host::with_fault("kvm=no");
    let (code, _, stderr) = host.run(&["run", "--vmm", "firecracker", "demo"]);
    assert!(
        code == 125 && stderr.contains("KVM, without which Firecracker runs nothing, is missing: "),
        "{stderr}"
    );
    assert!(host.requests().is_empty());
    host.assert_nothing_left();
}

/// Each request that it makes for a boot and for a restore, failing in each way.
#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    let warm = Host::new();
    warm.ok(&["template", "warm", "--vmm", "firecracker", "--accel", "kvm", "demo"]);
    let run = ["run", "--vmm", "firecracker", "--accel", "kvm", "demo"];
    let cold = |place: &str, fault: &str| {
        let host = Host::with_fault(&format!("{place}={fault}"));
        // Nobody waits long for what does not come; what comes may take its time.
        let deadline = if ["silent", "deaf"].contains(&fault) { "1" } else { "60" };
        let (code, _, stderr) = host.run(&[&run[..1], &["--boot-timeout", deadline], &run[1..]].concat());
        assert_eq!(code, 125, "{place} {fault}: {stderr}");
        host.assert_nothing_left();
        stderr
    };
    for place in BOOT {
        let said = cold(place, "refuse");
        assert!(
            said.contains(&format!("Firecracker refused {place}: The model was told to refuse this.")),
            "{said}"
        );
        let said = cold(place, "die");
        assert!(said.contains("the VMM exited with code 1"), "{place}: {said}");
        let said = cold(place, "garbage");
        assert!(said.contains(&format!("Firecracker answered {place} with")), "{said}");
        let said = cold(place, "silent");
        assert!(
            said.contains("not ready within 1 s: the start of the machine did not happen"),
            "{place}: {said}"
        );
    }
    let said = cold("PUT /actions", "late");
    assert!(said.contains("the VMM exited with code 1"), "{said}");
    let said = cold("start", "die");
    assert!(said.contains("the VMM exited with code 1: Error: RunWithApi(FailedToBindSocket)"), "{said}");
    let said = cold("start", "deaf");
    assert!(said.contains("not ready within 1 s: the start of the machine did not happen"), "{said}");

    let mut warm = warm;
    for place in ["PUT /snapshot/load", "PATCH /vm"] {
        for (fault, expected) in [
            ("refuse", format!("Firecracker refused {place}")),
            ("die", "the VMM exited with code 1".to_owned()),
            ("garbage", format!("Firecracker answered {place} with")),
        ] {
            warm.fault = format!("{place}={fault}");
            let (code, _, stderr) = warm.run(&run);
            assert_eq!(code, 125, "{place} {fault}: {stderr}");
            assert!(stderr.contains(&expected), "{place} {fault}: {stderr}");
            warm.assert_nothing_left();
        }
    }
}

/// A snapshot that fails half-way leaves the sandbox as it was, although its connections were cut.
#[test]
fn a_snapshot_that_fails_leaves_a_sandbox_that_goes_on() {
    let host = Host::with_fault("PUT /snapshot/create=fail");
    let id = host.start();
    for verb in [&["pause", &id][..], &["fork", &id], &["snapshot", &id, "snap"]] {
        let (code, _, stderr) = host.run(verb);
        assert!(code != 0, "{verb:?}");
        assert!(stderr.contains("Firecracker refused PUT /snapshot/create"), "{verb:?}: {stderr}");
        assert_eq!(host.state(&id)["phase"], "running");
    }
    assert_eq!(host.exec(&id, &["count"]), "1");
    let folder = host.path("data/sandboxes").join(&id);
    assert!(!folder.join("snapshot").exists() && !folder.join("vmm/snapshot").exists());
    let left = fs::read_dir(host.path("data/templates")).unwrap().count();
    assert_eq!(left, 1, "of the template nothing is left");
    host.end(&[&id]);
}

#[test]
fn a_full_disk_is_told_as_what_it_is() {
    let host = Host::with_fault("PUT /snapshot/create=full");
    let id = host.start();
    let (code, _, stderr) = host.run(&["pause", &id]);
    assert!(code != 0 && stderr.contains("No space left on device (os error 28)"), "{stderr}");
    assert!(!stderr.contains("refused"), "{stderr}");
    assert_eq!(host.exec(&id, &["count"]), "1");
    host.end(&[&id]);
}

/// It cannot be seen whether a request that was refused has cut the connections: they are what goes on if nobody dials again.
#[test]
fn a_snapshot_that_was_not_begun_leaves_the_connections() {
    let host = Host::with_fault("PUT /snapshot/create=refuse");
    let id = host.start();
    let (code, _, stderr) = host.run(&["pause", &id]);
    assert!(code != 0 && stderr.contains("Firecracker refused PUT /snapshot/create"), "{stderr}");
    assert_eq!(host.exec(&id, &["count"]), "1");
    host.end(&[&id]);
}

#[test]
fn a_vmm_that_dies_in_a_snapshot_ends_its_sandbox() {
    for place in ["PATCH /vm", "PUT /snapshot/create"] {
        let host = Host::with_fault(&format!("{place}=die"));
        let id = host.start();
        let (code, _, stderr) = host.run(&["pause", &id]);
        assert!(code != 0 && stderr.contains("Firecracker's API is gone"), "{place}: {stderr}");
        until("the sandbox has ended", || host.state(&id)["phase"] == "ended");
        assert!(!host.path("data/sandboxes").join(&id).join("snapshot").exists());
        // Its shim may still be on its way out.
        host.ok(&["rm", "--force", &id]);
        host.assert_nothing_left();
    }
}

#[test]
fn auto_takes_what_can_do_it() {
    let host = Host::new();
    // Without the device nobody tries Firecracker; with it the model says that a kernel runs.
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let qemu = host.path("qemu-system-x86_64");
    fs::write(
        &qemu,
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo QEMU emulator version 0.1; exit; }\nexit 9\n",
    )
    .unwrap();
    fs::set_permissions(&qemu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let run = |more: &[&str], fault: &str| {
        let mut command = host.command(&[&["run"], more, &["demo"]].concat());
        command.env("PATH", format!("{}:/usr/bin:/bin", host.path("").display())).env("MODEL_FAULT", fault);
        let output = command.output().unwrap();
        // Answers are kept until the next boot of the host.
        let _ = fs::remove_dir_all(host.path("data/cache"));
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = run(&[], "");
    assert_eq!(code == 0, kvm, "{stderr}");
    assert_eq!(host.requests() == BOOT, kvm);
    for more in [
        &["--accel", "tcg"][..],
        &["--channel", "serial", "--accel", "tcg"],
        &["--vmm", "qemu", "--accel", "tcg"],
    ] {
        let (code, stderr) = run(more, "");
        assert!(code == 125 && stderr.contains("the VMM exited with code 9"), "{more:?}: {stderr}");
    }
    let (code, stderr) = run(&[], "kvm=no");
    assert!(code == 125 && stderr.contains("the VMM exited with code 9"), "QEMU is tried: {stderr}");
    assert!(host.requests().is_empty());

    let mut command = host.command(&["run", "demo"]);
    let output = command.env("FIRECRACKER_BIN", host.path("none")).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("invalid FIRECRACKER_BIN") && stderr.contains("is no executable file"),
        "{stderr}"
    );
    let mut command = host.command(&["run", "--vmm", "firecracker", "demo"]);
    let output = command.env_remove("FIRECRACKER_BIN").env("PATH", host.path("bin")).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("firecracker is missing") && stderr.contains("--vmm qemu"), "{stderr}");
    host.assert_nothing_left();
}

#[test]
fn the_doctor_looks_at_it() {
    let host = Host::new();
    let (_, stdout, stderr) = host.run(&["doctor", "--json"]);
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stderr}"));
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "firecracker").unwrap();
    assert!(check["found"].as_str().unwrap().contains("Firecracker v1.16.1"), "{check}");
}
