//! QEMU is killed at each command that the shim gives it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use e2e::{binary, made};
use serde_json::{Value, json};

use super::{Case, Host, Phase, every};

/// A QEMU in front of PATH that is killed when it is told.
struct Relay {
    folder: PathBuf,
}

impl Relay {
    fn new(host: &Host) -> Self {
        let folder = host.path("relay");
        fs::create_dir(&folder).expect("a folder");
        let qemu = host_shim::vmm::qemu::find().expect("QEMU is installed");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/crash/relay.py");
        let program = folder.join("qemu-system-x86_64");
        let python = made("TIFFIN_PYTHON");
        let text = format!("#!/bin/sh\nexec {} {script} {} \"$@\"\n", python.display(), qemu.display());
        fs::write(&program, text).expect("the script is written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("it can be executed");
        Self { folder }
    }

    fn prepare(&self, command: &mut Command) {
        let path = std::env::var("PATH").expect("PATH");
        command.env("PATH", format!("{}:{path}", self.folder.display())).env("TIFFIN_RELAY", &self.folder);
    }

    fn start(&self, case: &mut Case<'_>, more: &[&str]) -> Result<Value, String> {
        let mut command = Command::new(binary("host-shim"));
        command.args(case.run(more));
        case.host.prepare(&mut command);
        self.prepare(&mut command);
        case.spawn(command)
    }

    /// The commands since the last look.
    fn commands(&self) -> Vec<String> {
        let file = self.folder.join("commands");
        let seen = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(file);
        seen.lines().map(str::to_owned).collect()
    }

    /// Kills the next QEMU at this moment.
    fn kill_at(&self, when: &str, command: &str) {
        fs::write(self.folder.join("kill"), format!("{when} {command}")).expect("it is written");
    }

    fn let_live(&self) {
        let _ = fs::remove_file(self.folder.join("kill"));
        self.commands();
    }
}

/// The moments of some commands: all of them, or of each command one.
fn moments(commands: Vec<String>) -> Vec<(&'static str, String)> {
    assert!(commands.len() > 2, "{commands:?}");
    let both = commands.into_iter().enumerate().flat_map(|(index, command)| {
        let ways: &[&str] = if every() { &["before", "after"] } else { &[["before", "after"][index % 2]] };
        ways.iter().map(|&way| (way, command.clone())).collect::<Vec<_>>()
    });
    both.collect()
}

#[test]
fn a_vmm_that_is_killed_at_a_command_of_a_start_is_named_and_leaves_nothing() {
    let host = Host::warm();
    let relay = Relay::new(&host);
    let mut case = host.case();
    relay.start(&mut case, &[]).expect("it starts behind the relay");
    let commands = relay.commands();
    case.settle(false);
    for (when, command) in moments(commands) {
        let mut case = host.case();
        relay.kill_at(when, &command);
        let said = relay.start(&mut case, &[]).expect_err("it cannot start");
        relay.let_live();
        assert!(said.contains("signal 9"), "{when} {command}: {said}");
        assert_eq!(case.settle(false), Phase::Ended, "{when} {command}");
        case.remove();
    }
    host.assert_template_unchanged();
}

#[test]
fn a_paused_sandbox_stays_paused_when_its_vmm_is_killed() {
    let host = Host::warm();
    let relay = Relay::new(&host);
    let mut case = host.case();
    case.start(&[]);
    case.mark();
    assert_eq!(case.call("pause", &json!({})).expect("an answer").0, 200);
    case.ended();
    for (when, command) in moments(
        ["qmp_capabilities", "migrate-set-capabilities", "getfd", "migrate-incoming", "cont"]
            .map(str::to_owned)
            .into(),
    ) {
        relay.kill_at(when, &command);
        let said = relay.start(&mut case, &["--resume"]).expect_err("it cannot resume");
        relay.let_live();
        assert!(said.contains("signal 9"), "{when} {command}: {said}");
        assert_eq!(case.settle(false), Phase::Paused, "{when} {command}");
    }
    case.assert_resumes(Phase::Paused);
}

#[test]
fn a_vmm_that_is_killed_while_its_sandbox_is_written_down_ends_it_and_no_snapshot_is_half() {
    let host = Host::warm();
    let relay = Relay::new(&host);
    for (verb, target) in [("pause", None), ("fork", Some("forks")), ("snapshot", Some("d/templates"))] {
        let ask = |case: &Case<'_>, name: &str| {
            let body = target.map_or(json!({}), |target| json!({ "path": host.path(target).join(name) }));
            case.call(verb, &body)
        };
        let mut case = host.case();
        relay.start(&mut case, &[]).expect("it starts");
        relay.let_live();
        assert_eq!(ask(&case, "whole").expect("an answer").0, 200);
        let commands = relay.commands();
        assert!(commands.contains(&"xen-save-devices-state".to_owned()), "{commands:?}");
        case.kill();
        case.settle(true);
        case.remove();
        for (when, command) in moments(commands) {
            let mut case = host.case();
            relay.start(&mut case, &[]).expect("it starts");
            relay.kill_at(when, &command);
            let (status, said) = ask(&case, "half").expect("an answer");
            assert!(status >= 500, "{verb}, {when} {command}: {status} {said}");
            let (code, said) = case.ended();
            relay.let_live();
            assert_eq!(code, Some(1), "{said}");
            assert!(said.contains("signal 9"), "{verb}, {when} {command}: {said}");
            assert_eq!(case.settle(false), Phase::Ended, "{verb}, {when} {command}");
            host.assert_nothing_unfinished();
            assert!(target.is_none_or(|target| !host.path(target).join("half").exists()), "{verb}");
            case.remove();
        }
    }
    host.assert_template_unchanged();
}
