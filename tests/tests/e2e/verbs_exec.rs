//! `exec` without a terminal: streams, exit codes, signals.

use std::io::{BufRead, Read, Write};

use rustix::process::Signal;
use serde_json::Value;

use super::verbs::{Cli, Running};

#[test]
fn streams_codes_and_options_are_those_of_docker() {
    let cli = Cli::new();
    let id = cli.start(&["-e", "A=start", "e2e"]);
    for (args, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 42"], 42),
        (&["--", "sh", "-c", "kill -9 $$"], 137),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -31 $$"], 159),
        (&["/no/such/program"], 127),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
        (&["/tmp"], 126),
    ] {
        let said = cli.run(&[&["exec", &id], args].concat());
        assert_eq!(said.code, code, "{args:?}: {said:?}");
    }
    for (options, code) in [(&["-u", "nobody-knows"][..], 125), (&["-w", "/nope"], 125)] {
        let said = cli.run(&[&["exec"], options, &[&id, "true"]].concat());
        assert_eq!(said.code, code, "{options:?}: {said:?}");
    }

    let file = cli.path("env");
    std::fs::write(&file, "B=file\nA=file\n").unwrap();
    let said = cli.run(&[
        "exec",
        "--env-file",
        file.to_str().unwrap(),
        "-e",
        "A=exec",
        "-u",
        "user",
        "-w",
        "/data",
        &id,
        "sh",
        "-c",
        "echo $A $B; pwd; id -u; echo oops >&2",
    ]);
    assert_eq!((said.out.as_str(), said.err.as_str()), ("exec file\n/data\n1000\n", "oops\n"));
    assert_eq!(cli.ok(&["exec", &id, "sh", "-c", "echo $A"]), "start\n");

    // Without -i there is no input; with it, its end is told while output goes on.
    assert_eq!(cli.feed(&["exec", &id, "cat"], b"unread").out, "");
    let input: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8 & 0x7f).collect();
    let said = cli.feed(&["exec", "-i", &id, "sh", "-c", "cat; echo end; echo $? >&2"], &input);
    assert!(said.out.len() == input.len() + 4 && said.out.ends_with("end\n"), "{} bytes", said.out.len());

    let said = cli.run(&["exec", "--json", &id, "sh", "-c", "exit 3"]);
    let report: Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!((said.code, &report["exit_code"], &report["signal"]), (3, &3.into(), &Value::Null));
    let said = cli.run(&["exec", "--json", &id, "sh", "-c", "kill -9 $$"]);
    let report: Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!((&report["exit_code"], &report["signal"]), (&137.into(), &9.into()));

    let pid: Value = serde_json::from_str(&cli.ok(&["exec", "-d", "--json", &id, "sleep", "1000"])).unwrap();
    assert_eq!(cli.ok(&["exec", "-d", &id, "sleep", "1001"]), "");
    let listed = cli.ok(&["ps", &id]);
    assert!(listed.contains("sleep 1000") && listed.contains("sleep 1001"), "{listed}");
    assert!(listed.contains(&pid["pid"].to_string()), "{listed}");

    let said = cli.run(&["exec", "-it", &id, "sh"]);
    assert!(said.code == 1 && said.err.contains("the input device is not a TTY"), "{said:?}");
    let said = cli.run(&["shell", &id]);
    assert!(said.code == 1 && said.err.contains("not a TTY"), "{said:?}");
    // A terminal without this one's: what it shows has its line ends.
    assert_eq!(cli.ok(&["exec", "-t", &id, "sh", "-c", "test -t 1 && echo tty"]), "tty\r\n");
}

#[test]
fn signals_go_to_the_process_and_end_it_as_they_would_here() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let script = "trap 'echo usr1' USR1; trap 'echo usr2' USR2; trap 'echo hup' HUP; trap 'echo int' INT; \
                  trap 'echo quit' QUIT; trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = cli.spawn(&["exec", &id, "sh", "-c", script]);
    let mut out = running.out();
    assert_eq!(Running::line(&mut out), "ready\n");
    for (signal, said) in [
        (Signal::USR1, "usr1\n"),
        (Signal::USR2, "usr2\n"),
        (Signal::HUP, "hup\n"),
        (Signal::INT, "int\n"),
        (Signal::QUIT, "quit\n"),
        (Signal::TERM, "term\n"),
    ] {
        running.signal(signal);
        assert_eq!(Running::line(&mut out), said, "{signal:?}");
    }
    assert_eq!(running.wait(), 9);
    // The default action.
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut running = cli.spawn(&["exec", &id, "sh", "-c", "echo ready; exec sleep 1000"]);
        assert_eq!(Running::line(&mut running.out()), "ready\n");
        running.signal(signal);
        assert_eq!(running.wait(), code);
    }
}

#[test]
fn a_stopped_exec_stops_its_process_and_goes_on_with_it() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let mut running = cli.spawn(&["exec", &id, "sh", "-c", "echo $$; while :; do sleep 0.1; done"]);
    let mut out = running.out();
    let pid = Running::line(&mut out).trim().to_owned();
    let state = |file: &str| {
        let stat = std::fs::read_to_string(file).unwrap();
        stat.rsplit(')').next().unwrap().split_whitespace().next().unwrap().to_owned()
    };
    let there = || {
        let stat = cli.ok(&["exec", &id, "cat", &format!("/proc/{pid}/stat")]);
        stat.rsplit(')').next().unwrap().split_whitespace().next().unwrap().to_owned()
    };
    let here = format!("/proc/{}/stat", running.pid());
    running.signal(Signal::TSTP);
    super::verbs::until("exec has stopped", || state(&here) == "T");
    assert_eq!(there(), "T", "it was told before");
    running.signal(Signal::CONT);
    super::verbs::until("the process goes on", || there() != "T");
    running.signal(Signal::TERM);
    assert_eq!(running.wait(), 143);
}

#[test]
fn a_reader_that_is_gone_ends_it_as_sigpipe_would() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let mut running = cli.spawn(&["exec", &id, "sh", "-c", "yes; echo $? > /tmp/status"]);
    let mut out = running.out();
    let mut begin = [0; 4];
    out.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"y\ny\n");
    drop(out);
    assert_eq!(running.wait(), 141);
    // The shell that was told goes; `yes` has nobody to write to.
    super::verbs::until("nothing of it is left", || !cli.ok(&["ps", &id]).contains("yes"));
}

#[test]
fn input_and_output_at_once_do_not_wait_for_each_other() {
    let cli = Cli::new();
    let id = cli.start(&["e2e"]);
    let mut running = cli.spawn(&["exec", "-i", &id, "cat"]);
    let mut stdin = running.0.stdin.take().unwrap();
    let mut out = running.out();
    for n in 0..20 {
        writeln!(stdin, "line {n}").unwrap();
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert_eq!(line, format!("line {n}\n"));
    }
    drop(stdin);
    assert_eq!(running.wait(), 0);
}
