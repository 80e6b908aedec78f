//! The promises of `run --help` to whoever starts a shim: readiness, exit codes, signals, what is left, where words go.

use e2e::TestData;
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::shim::{Place, lines_of_json, until};

const OK: (Option<i32>, String, String) = (Some(0), String::new(), String::new());

#[test]
fn readiness_is_told_once_on_each_way_and_a_stop_is_too() {
    let place = Place::new();
    let mut shim = place.start(&["--spec"]);
    let ready = shim.ready();
    assert_eq!((&ready["ready"], &ready["phase"]), (&json!(true), &json!("running")));
    assert_eq!(ready["dir"], place.dir().to_str().unwrap());
    let phases = ready["phases"].as_array().unwrap();
    for name in ["probe", "vmm", "kernel"] {
        assert!(phases.iter().any(|phase| phase["name"] == name), "{ready}");
    }
    let sum: f64 = phases.iter().map(|phase| phase["ms"].as_f64().unwrap()).sum();
    assert!(sum > 0.0 && ready["total_ms"].as_f64().unwrap() > 0.0, "{ready}");
    // Once it is told, all of it is there.
    assert_eq!(place.state()["phase"], "running");
    let id = ready["id"].as_str().unwrap();
    let told = place.told();
    assert_eq!(told[0], "READY=1");
    assert!(told[1].starts_with(&format!("STATUS={id} is running, booted on ")), "{told:?}");
    place.assert_nothing_told();
    assert_eq!(place.exec("echo inside"), "inside\n");

    shim.signal(Signal::TERM);
    assert_eq!(shim.ended(), OK);
    assert_eq!(place.told(), ["STOPPING=1", "STATUS=stopping"]);
    place.assert_nothing_told();
    let state = place.state();
    assert_eq!((&state["phase"], &state["end"]["reason"]), (&json!("ended"), &json!("stopped")));
    assert!(place.left().is_empty(), "{:?}", place.left());
    let log = lines_of_json(&place.dir().join("shim.log"));
    assert!(log.iter().all(|event| event["timestamp"].is_string() && event["level"].is_string()), "{log:?}");
    assert!(log.iter().any(|event| event["fields"]["phase"] == "Stopping"), "{log:?}");
}

#[test]
fn a_sandbox_that_is_stopped_before_it_is_ready_has_not_failed() {
    let place = Place::new();
    let shim = place.start(&["--spec"]);
    until("its machine boots", || place.is("booting"));
    shim.signal(Signal::TERM);
    let (code, stdout, stderr) = shim.ended();
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
    assert_eq!(stderr, "host-shim: stopped before the sandbox was ready\n");
    assert_eq!(place.told()[0], "STOPPING=1");
    let state = place.state();
    assert_eq!((&state["phase"], &state["end"]["reason"]), (&json!("ended"), &json!("stopped")));
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn exit_codes_say_what_a_restart_is_good_for() {
    let place = Place::new();
    // 2: another try does not help.
    place.write_spec(&json!({ "schema_version": 1, "template": "/no/such/template" }));
    let (code, _, stderr) = place.start(&["--spec"]).ended();
    assert!(code == Some(2) && stderr.contains("/no/such/template"), "{code:?}: {stderr}");
    let (code, _, stderr) = place.start(&["--resume"]).ended();
    assert!(code == Some(2), "{stderr}");

    // 1: the machine crashed; whose folder it is, is 2 meanwhile.
    let place = Place::new();
    let mut shim = place.start(&["--spec"]);
    shim.ready();
    let (code, _, stderr) = place.start(&["--spec"]).ended();
    assert!(
        code == Some(2) && stderr.contains("belongs to a host-shim that is running"),
        "{code:?}: {stderr}"
    );
    kill_process(place.vmm(), Signal::KILL).unwrap();
    let (code, _, stderr) = shim.ended();
    assert!(code == Some(1) && stderr.contains("the sandbox ended"), "{code:?}: {stderr}");
    assert_eq!(place.state()["end"]["reason"], "guest_ended");
}

#[test]
fn a_machine_that_does_not_answer_any_more_is_stopped_all_the_same() {
    for signals in [1, 2] {
        let place = Place::new();
        let mut shim = place.start(&["--spec"]);
        shim.ready();
        let vmm = place.vmm();
        kill_process(vmm, Signal::STOP).unwrap();
        for _ in 0..signals {
            shim.signal(Signal::TERM);
            // Two signals of a kind that wait are one.
            until("it stops", || place.is("stopping"));
        }
        assert_eq!(shim.ended(), OK);
        assert!(rustix::process::test_kill_process(vmm).is_err(), "the VMM is still there");
        let log = lines_of_json(&place.dir().join("shim.log"));
        let skipped =
            log.iter().any(|event| event["fields"]["message"] == "the rest of the grace was skipped");
        assert_eq!(skipped, signals == 2, "{log:?}");
    }
}

#[test]
fn a_pause_under_way_is_finished_before_the_end() {
    let place = Place::new();
    let mut shim = place.start(&["--spec"]);
    shim.ready();
    assert_eq!(place.told()[0], "READY=1");
    place.exec("echo kept > /root/note");
    let vmm = place.vmm();
    kill_process(vmm, Signal::STOP).unwrap();
    let mut pause = place.verb("pause");
    until("it is being paused", || place.is("pausing"));
    shim.signal(Signal::TERM);
    let told = place.told();
    assert_eq!(told[0], "EXTEND_TIMEOUT_USEC=30000000", "{told:?}");
    kill_process(vmm, Signal::CONT).unwrap();
    assert_eq!(shim.ended(), (Some(3), String::new(), String::new()));
    assert!(pause.wait().unwrap().success());
    assert_eq!(place.told(), ["STOPPING=1", "STATUS=paused"]);
    assert!(place.left().is_empty(), "{:?}", place.left());

    // The way of a unit that is started again, whatever is in its folder; its template is not needed for that.
    place.spec().metadata().unwrap();
    let mut shim = place.start(&["--spec", "--resume"]);
    assert_eq!(shim.ready()["start"], "resumed");
    assert_eq!(place.told()[0], "READY=1");
    assert_eq!(place.exec("cat /root/note"), "kept\n");
    shim.signal(Signal::TERM);
    assert_eq!(shim.ended(), OK);
    let mut shim = place.start(&["--spec", "--resume"]);
    assert_eq!(shim.ready()["start"], "booted", "nothing is paused any more");
    assert_eq!(place.exec("ls /root"), "");
}

#[test]
fn a_template_that_is_never_ready_does_not_hold_an_end_back() {
    let data = TestData::new();
    data.copy_as("clones", "never");
    TestData::edit(&data.template("never").join("template.json"), |template| {
        template["runtime"]["ready_command"] = json!("touch /root/asked; false");
    });
    let place = Place::new();
    place.write_spec(&json!({ "schema_version": 1, "template": data.template("never") }));
    let mut shim = place.start(&["--spec", "--park"]);
    assert_eq!(shim.ready()["phase"], "parked");
    // What it starts has five minutes.
    let mut configure = place.verb("configure");
    until("its ready command runs", || place.answers("test -e /root/asked"));
    shim.signal(Signal::TERM);
    assert_eq!(shim.ended(), OK);
    assert_eq!(configure.wait().unwrap().code(), Some(1));
    assert_eq!(place.state()["end"]["reason"], "stopped");
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn what_a_killed_shim_leaves_is_swept_by_the_next_run() {
    let place = Place::new();
    let mut shim = place.start(&["--spec"]);
    let first = shim.ready();
    let vmm = place.vmm();
    // Nobody is there to clean up.
    kill_process(shim.reaper(), Signal::KILL).unwrap();
    shim.signal(Signal::KILL);
    assert_eq!(shim.ended().0, None);
    until("the VMM dies with it", || rustix::process::test_kill_process(vmm).is_err());
    assert!(place.left().contains(&"api.sock"), "{:?}", place.left());
    assert_eq!(place.state()["phase"], "running", "the state is a lie that only a lock tells");

    let mut shim = place.start(&["--spec", "--resume"]);
    let second = shim.ready();
    assert_eq!((&second["start"], &second["id"]), (&json!("booted"), &first["id"]));
    assert_eq!(place.exec("echo inside"), "inside\n");
    shim.signal(Signal::TERM);
    assert_eq!(shim.ended(), OK);
    assert!(place.left().is_empty(), "{:?}", place.left());
}
