//! A sandbox that is killed under a verb: a message, an exit code, no hang.

use std::io::{Read, Write};

use super::verbs::{Cli, Running, until};

#[test]
fn a_sandbox_killed_under_a_verb_is_told() {
    let cli = Cli::new();
    let ended = |said: super::verbs::Said, code: i32| {
        assert!(
            said.code == code && said.err.contains("the sandbox ended: its host-shim was killed"),
            "{said:?}"
        );
    };

    let id = cli.start(&["e2e", "--", "sh", "-c", "echo up; sleep 1000"]);
    let mut exec = cli.spawn(&["exec", "-i", &id, "sh", "-c", "echo up; cat"]);
    let mut out = exec.out();
    assert_eq!(Running::line(&mut out), "up\n");
    let mut logs = cli.spawn(&["logs", "-f", &id]);
    let mut log = logs.out();
    assert_eq!(Running::line(&mut log), "up\n");
    let mut console = cli.spawn(&["logs", "-f", "--shim", &id]);
    let mut shim_log = console.out();
    assert!(!Running::line(&mut shim_log).is_empty());
    let mut stats = cli.spawn(&["stats", "--json", &id]);
    let mut stat = stats.out();
    assert!(Running::line(&mut stat).starts_with('{'));
    // An upload that has begun, and does not end by itself.
    let mut upload = cli.spawn(&["cp", "-", &format!("{id}:/tmp")]);
    let mut header = tar::Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    let mut stdin = upload.0.stdin.take().unwrap();
    stdin.write_all(header.as_bytes()).unwrap();
    stdin.write_all(&vec![7; 4 << 20]).unwrap();

    cli.kill_shim(&id);
    ended(exec.said(), 125);
    ended(logs.said(), 1);
    ended(upload.said(), 1);
    let mut rest = String::new();
    shim_log.read_to_string(&mut rest).unwrap();
    assert_eq!(console.wait(), 0, "a file ends with its writer");
    let said = stats.said();
    assert!(said.code == 1 && (said.err.contains("ended") || said.err.contains("dead")), "{said:?}");
    until("it is swept", || cli.inspect(&id)["phase"] == "ended");
    for (args, code) in [
        (&["exec", &id, "true"][..], 125),
        (&["ps", &id], 1),
        (&["pause", &id], 1),
        (&["fork", &id], 1),
        (&["snapshot", &id, "new"], 1),
        (&["configure", &id], 1),
        (&["port-forward", &id, ":80"], 1),
        (&["cp", &format!("{id}:/etc/passwd"), "/tmp/never"], 1),
    ] {
        let said = cli.run(args);
        assert!(
            said.code == code && said.err.contains(&format!("Sandbox {id} is ended")),
            "{args:?}: {said:?}"
        );
    }
}

#[test]
fn a_download_from_a_killed_sandbox_leaves_no_half_file() {
    let cli = Cli::new();
    let id = cli.start(&["--disk", "512", "e2e"]);
    cli.ok(&["exec", &id, "sh", "-c", "head -c 150000000 /dev/zero > /big"]);
    let target = cli.path("big");
    let mut download = cli.spawn(&["cp", &format!("{id}:/big"), target.to_str().unwrap()]);
    let temporary = || {
        let names = std::fs::read_dir(cli.path("")).unwrap().map(|entry| entry.unwrap());
        names.filter(|entry| entry.file_name().to_string_lossy().starts_with(".host-shim-cp-")).count()
    };
    until("it has begun", || temporary() == 1);
    cli.kill_shim(&id);
    let said = download.said();
    assert!(said.code == 1 && said.err.contains("the sandbox ended"), "{said:?}");
    assert!(!target.exists() && temporary() == 0);
}

#[test]
fn a_stop_that_waits_sees_the_end_of_a_killed_one() {
    let cli = Cli::new();
    let id = cli.start(&["e2e", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"]);
    until("it ignores SIGTERM", || cli.ok(&["logs", &id]) == "up\n");
    let mut stop = cli.spawn(&["stop", "-t", "3000", &id]);
    until("it is being stopped", || cli.inspect(&id)["phase"] == "stopping");
    cli.kill_shim(&id);
    let said = stop.said();
    assert_eq!((said.code, said.out), (0, format!("{id}\n")));
}
