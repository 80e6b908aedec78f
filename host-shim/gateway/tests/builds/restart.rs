//! Gateways and builders that are killed at each stage.

use rustix::process::{Pid, Signal, kill_process};

use crate::host::{Host, until};

const STAGES: [&str; 4] = ["base", "steps", "create", "push"];

/// Whether it runs: one that has ended, and that nobody has waited for, has no command line.
fn is_alive(pid: Pid) -> bool {
    std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).is_ok_and(|line| !line.is_empty())
}

#[test]
fn a_build_outlives_a_gateway_that_is_killed_at_any_stage() {
    let host = Host::new();
    let registry = ["--registry", "http://127.0.0.1:1"];
    for stage in STAGES {
        let mut gateway = host.serve(&registry);
        host.hang_at(stage);
        let build = gateway.begin(&format!("at-{stage}"), &["true"]);
        let waiting = gateway.begin(&format!("behind-{stage}"), &["true"]);
        let builder = host.at_stage();
        let seen = gateway.status(&build)["logEntries"].as_array().unwrap().clone();
        gateway.kill();
        assert!(is_alive(builder), "the builder does not know yet");
        host.go_on();

        let mut gateway = host.serve(&registry);
        // Two would write the same template.
        assert!(!is_alive(builder), "{stage}: the old builder is ended before the gateway serves");
        gateway.until(&build, "ready");
        gateway.until(&waiting, "ready");
        let status = gateway.status(&build);
        let entries = status["logEntries"].as_array().unwrap();
        assert_eq!(entries[..seen.len()], seen[..], "{stage}: an offset means the same");
        let again = entries.iter().any(|entry| entry["message"].as_str().unwrap().contains("was restarted"));
        assert!(again, "{stage}: {entries:?}");
        assert!(host.names("templates").contains(&build.folder()));
        gateway.stop();
    }
    assert_eq!(host.processes(), [0; 0]);
}

#[test]
fn a_builder_that_is_killed_at_any_stage_is_an_error_and_leaves_nothing() {
    let host = Host::new();
    let mut gateway = host.serve(&["--registry", "http://127.0.0.1:1"]);
    for (stage, step) in STAGES.into_iter().zip([Some("base"), None, Some("finalize"), Some("finalize")]) {
        host.hang_at(stage);
        let build = gateway.begin("box", &["true"]);
        kill_process(host.at_stage(), Signal::KILL).unwrap();
        let reason = gateway.until(&build, "error")["reason"].clone();
        assert!(reason["message"].as_str().unwrap().contains("ended by signal 9"), "{stage}: {reason}");
        assert_eq!(reason["step"].as_str(), step, "{stage}");
        until("nothing is left", || {
            let left = [host.names("templates"), host.names("images")].concat();
            (left.is_empty() && host.processes().is_empty()).then_some(())
        });
    }
    host.go_on();
    gateway.build("box");
    gateway.stop();
}

#[test]
fn a_gateway_that_is_stopped_ends_the_builder_and_the_next_goes_on() {
    let host = Host::new();
    let mut gateway = host.serve(&[]);
    host.hang_at("steps");
    let build = gateway.begin("box", &["true"]);
    host.at_stage();
    gateway.stop();
    assert_eq!(host.processes(), [0; 0]);
    host.go_on();
    let mut gateway = host.serve(&[]);
    gateway.until(&build, "ready");
    gateway.stop();
}

#[test]
fn a_build_that_ends_its_gateway_each_time_is_given_up() {
    let host = Host::new();
    host.hang_at("steps");
    let mut gateway = host.serve(&[]);
    let build = gateway.begin("box", &["true"]);
    for _ in 0..2 {
        host.at_stage();
        gateway.kill();
        gateway = host.serve(&[]);
    }
    host.at_stage();
    gateway.kill();
    let mut gateway = host.serve(&[]);
    let reason = gateway.until(&build, "error")["reason"]["message"].clone();
    assert_eq!(reason, "the gateway ended 3 times while it was building this: build again");
    assert_eq!(host.processes(), [0; 0]);
    gateway.stop();
}
