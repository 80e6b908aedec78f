//! Stages side by side: what runs at the same time, what is done once, and what an error does to the rest.

#[path = "support/project.rs"]
mod project;
mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;

use project::{BASE, Project, counts, failure, json};
use serde_json::Value;

/// A place where steps wait until so many of them are there: a server on loopback, which steps reach because they have the
/// host's network. A step that waits in vain ends with an error after a minute.
struct Meeting {
    port: u16,
    /// Ends the connections.
    _server: std::thread::JoinHandle<()>,
}

impl Meeting {
    fn of(count: usize) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let all: Vec<_> = listener.incoming().take(count).collect();
            drop(all);
        });
        Self { port, _server: server }
    }

    /// The command of a step that waits for the others.
    fn wait(&self) -> String {
        format!("timeout 60 nc 127.0.0.1 {} </dev/null", self.port)
    }
}

/// The base under another name.
fn stage(name: &str) -> String {
    BASE.replace("FROM scratch", &format!("FROM scratch AS {name}"))
}

#[test]
fn independent_stages_run_at_the_same_time() {
    let Some(test) = Project::new() else { return };
    let meeting = Meeting::of(2);
    let wait = meeting.wait();
    let dockerfile = format!(
        "{}FROM base AS a\nRUN {wait} && echo a > /a\nFROM base AS b\nRUN {wait} && echo b > /b\n\
         FROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /\n",
        stage("base")
    );
    let report = test.build(&dockerfile, &["--jobs", "2"]);
    assert_eq!(counts(&report), (6, 0, 0), "the base is built once");
    assert_eq!((test.file("app", "/a"), test.file("app", "/b")), (b"a\n".to_vec(), b"b\n".to_vec()));
}

#[test]
fn the_same_step_of_two_stages_is_done_once() {
    let Some(test) = Project::new() else { return };
    let random = "RUN head -c 32 /dev/urandom > /random\n";
    let dockerfile = format!(
        "{}{random}{}{random}FROM scratch\nCOPY --from=a /random /a\nCOPY --from=b /random /b\n",
        stage("a"),
        stage("b")
    );
    for options in [&[][..], &["--no-cache"]] {
        let report = test.build(&dockerfile, options);
        assert_eq!(counts(&report), (5, 0, 3), "{options:?}");
        assert_eq!(test.file("app", "/a"), test.file("app", "/b"), "{options:?}");
    }
    assert_eq!(counts(&test.build(&dockerfile, &[])), (0, 8, 0));
}

#[test]
fn the_image_does_not_depend_on_the_order() {
    let Some(test) = Project::new() else { return };
    let mut dockerfile = stage("base");
    for number in 0..6 {
        dockerfile
            .push_str(&format!("FROM base AS s{number}\nRUN echo {number} > /{number}\nENV N={number}\n"));
    }
    dockerfile.push_str("FROM base\n");
    (0..6).for_each(|number| dockerfile.push_str(&format!("COPY --from=s{number} /{number} /out/\n")));
    let mut reports = BTreeSet::new();
    for (data, jobs) in [("one", "1"), ("two", "2"), ("eight", "8")] {
        let options = [
            "-t",
            "app",
            "--jobs",
            jobs,
            "--rewrite-timestamp",
            "--build-arg",
            "SOURCE_DATE_EPOCH=1700000000",
        ];
        reports.insert(json(&test.build_on(data, &dockerfile, &options).output().unwrap()).to_string());
    }
    assert_eq!(reports.len(), 1, "{reports:#?}");
}

#[test]
fn an_error_ends_the_other_branches_and_is_the_one_that_is_told() {
    let Some(test) = Project::new() else { return };
    let meeting = Meeting::of(2);
    let wait = meeting.wait();
    let dockerfile = format!(
        "{}FROM base AS bad\nRUN {wait} && exit 7\nFROM base AS slow\nRUN {wait}; sleep 100000\n\
         FROM scratch\nCOPY --from=slow /x /\nCOPY --from=bad /x /\n",
        stage("base")
    );
    let stderr = failure(&test.output(&dockerfile, &["-t", "app"]), 1);
    assert!(stderr.contains("the command exited with code 7"), "{stderr}");
    assert!(stderr.contains(&format!("RUN {wait} && exit 7")) && !stderr.contains("interrupted"), "{stderr}");
    assert!(test.leftovers().is_empty());
    assert_eq!(json(&test.run(&["images", "--json"])), serde_json::json!([]));
    // What was done before is not done again.
    let again = test.build(&format!("{}FROM base\nRUN true\n", stage("base")), &[]);
    assert_eq!(counts(&again), (1, 2, 0));
}

#[test]
fn lines_of_parallel_steps_are_whole_and_say_whose_they_are() {
    let Some(test) = Project::new() else { return };
    let words = "x".repeat(300);
    let lines = |name: &str| {
        format!(
            "FROM base AS {name}\nRUN for i in $(seq 200); do echo \"{name} $i {words}\"; done; touch /{name}\n"
        )
    };
    let dockerfile = format!(
        "{}{}{}FROM scratch\nCOPY --from=left /left /\nCOPY --from=right /right /\n",
        stage("base"),
        lines("left"),
        lines("right")
    );
    let output = test.output(&dockerfile, &["-t", "app", "--progress", "plain"]);
    json(&output);
    let stderr = String::from_utf8(output.stderr).unwrap();
    for name in ["left", "right"] {
        let mine: Vec<_> =
            stderr.lines().filter(|line| line.starts_with(&format!("[{name} 2/2] | "))).collect();
        let expected: Vec<_> = (1..=200).map(|i| format!("[{name} 2/2] | {name} {i} {words}")).collect();
        assert_eq!(mine, expected);
    }
    assert!(stderr.contains("\n[stage-3 1/3] FROM scratch\n"), "{stderr}");
}

#[test]
fn ctrl_c_ends_all_that_runs() {
    let Some(test) = Project::new() else { return };
    let dockerfile = format!(
        "{}FROM base AS a\nRUN echo running; sleep 100000\nFROM base AS b\nRUN echo running; sleep 200000\n\
         FROM scratch\nCOPY --from=a /x /\nCOPY --from=b /x /\n",
        stage("base")
    );
    let mut command = test.build_on("data", &dockerfile, &["-t", "app"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(lines.by_ref().filter(|line| line.ends_with("| running")).take(2).count(), 2);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let rest: Vec<_> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(test.leftovers().is_empty());
}

#[test]
fn progress_as_json_is_one_object_a_line() {
    let Some(test) = Project::new() else { return };
    let dockerfile = format!("{}FROM base\nRUN echo \"said \\\"so\\\"\"\nRUN exit 3\n", stage("base"));
    let output = test.output(&dockerfile, &["-t", "app", "--progress", "json"]);
    let stderr = failure(&output, 1);
    let events: Vec<Value> = stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    for event in &events {
        let time = event["time"].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && event["type"].is_string(), "{event}");
    }
    let has = |wanted: Value| {
        let fits =
            |event: &&Value| wanted.as_object().unwrap().iter().all(|(key, value)| event[key] == *value);
        assert!(events.iter().any(|event| fits(&event)), "{wanted} is not in {stderr}");
    };
    use serde_json::json;
    has(
        json!({"type": "step", "step": "[base 2/3]", "status": "started", "message": "COPY busybox /bin/busybox"}),
    );
    has(json!({"type": "step", "step": "[base 2/3]", "status": "done"}));
    has(json!({"type": "output", "step": "[stage-1 2/3]", "message": "said \"so\""}));
    has(json!({"type": "step", "step": "[stage-1 3/3]", "status": "failed"}));
    let last = events.last().unwrap();
    assert_eq!(last["type"], "error");
    assert!(last["message"].as_str().unwrap().contains("exited with code 3"), "{last}");
    let quiet = test.output(&dockerfile, &["-t", "app", "--progress", "quiet"]);
    assert_eq!(failure(&quiet, 1).lines().count(), 2, "the error and its text");
}
