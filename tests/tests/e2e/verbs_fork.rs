//! `fork`, `pause`, `snapshot` and `configure` against an `api.sock` whose answers are the test's.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use e2e::template;
use serde_json::{Value, json};

use super::verbs::Cli;

/// A folder that looks like a running sandbox's; its shim is a shell that holds the lock.
struct Scripted {
    shim: Arc<Mutex<Child>>,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    id: String,
    dir: PathBuf,
}

type Answers = fn(&str, &Value) -> (u16, Value);

impl Scripted {
    fn new(cli: &Cli, answers: Answers) -> Self {
        let id = "scripted1".to_owned();
        let dir = cli.path("sandboxes").join(&id);
        std::fs::create_dir_all(&dir).unwrap();
        let mut shim = Command::new("sh")
            .args(["-c", "exec 9>>lock; echo held; read line"])
            .current_dir(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 5];
        shim.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        let spec = json!({"schema_version": 1, "template": template(), "labels": {"tiffin.name": "source"}});
        std::fs::write(dir.join("spec.json"), spec.to_string()).unwrap();
        let state = json!({
            "schema_version": 1, "id": id, "phase": "running", "shim_pid": shim.id(), "labels": {"tiffin.name": "source"},
        });
        std::fs::write(dir.join("state.json"), state.to_string()).unwrap();
        let listener = UnixListener::bind(dir.join("api.sock")).unwrap();
        let (shim, asked) = (Arc::new(Mutex::new(shim)), Arc::new(Mutex::new(Vec::new())));
        let (held, seen) = (Arc::clone(&shim), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let (call, body) = request(&mut stream);
                let (status, answer) = answers(&call, &body);
                seen.lock().unwrap().push((call.clone(), body));
                let answer = answer.to_string();
                write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{answer}", answer.len())
                    .unwrap();
                if call == "/pause" && status == 200 {
                    // The shim ends once it is paused.
                    drop(held.lock().unwrap().stdin.take());
                    held.lock().unwrap().wait().unwrap();
                }
            }
        });
        Self { shim, asked, id, dir }
    }

    fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let mut shim = self.shim.lock().unwrap();
        let _ = shim.kill();
        let _ = shim.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn request(stream: &mut impl Read) -> (String, Value) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let call = head.split(' ').nth(1).unwrap().to_owned();
    (call, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

#[test]
fn forks_start_from_what_the_source_says_and_have_changes_of_their_own() {
    let cli = Cli::new();
    let source = Scripted::new(&cli, |call, body| {
        assert_eq!(call, "/fork");
        let path = body["path"].as_str().unwrap();
        assert!(path.contains("/fork-"), "{path}");
        std::fs::create_dir(path).unwrap();
        std::fs::write(format!("{path}/ram"), "x").unwrap();
        let spec = json!({
            "schema_version": 1, "template": template(), "env": {"A": "source", "B": "source"},
            "labels": {"tiffin.name": "source", "job": "7"},
            "kernel": e2e::made("TIFFIN_KERNEL"), "guest_image": e2e::made("TIFFIN_GUEST_IMAGE"),
        });
        (200, json!({"spec": spec, "stopped_ms": 12.5}))
    });
    let out = cli.ok(&["fork", "source", "-n", "3", "-e", "B=fork", "-l", "n=1"]);
    let ids: Vec<_> = out.lines().collect();
    assert_eq!(ids.len(), 3, "{out}");
    for id in &ids {
        assert_eq!(cli.ok(&["exec", id, "sh", "-c", "echo $A $B"]), "source fork\n");
        let seen = cli.inspect(id);
        assert_eq!((&seen["labels"], &seen["name"]), (&json!({"job": "7", "n": "1"}), &Value::Null));
    }
    let mut folders = cli.folders();
    folders.sort();
    let mut expected: Vec<_> = ids.iter().map(|id| (*id).to_owned()).chain([source.id.clone()]).collect();
    expected.sort();
    assert_eq!(folders, expected, "what the source wrote is gone");
}

#[test]
fn forks_that_fail_are_told_and_leave_nothing() {
    let cli = Cli::new();
    let _source = Scripted::new(&cli, |_, body| {
        std::fs::create_dir(body["path"].as_str().unwrap()).unwrap();
        (200, json!({"spec": {"schema_version": 1, "template": "/nonexistent"}}))
    });
    let said = cli.run(&["fork", "source", "-n", "2"]);
    assert_eq!((said.code, said.out.as_str()), (1, ""));
    assert_eq!(said.err.matches("/nonexistent").count(), 2, "{said:?}");
    assert_eq!(cli.folders(), ["scripted1"]);
    let said = cli.run(&["fork", "source", "--json"]);
    let line: Value = serde_json::from_str(&said.out).unwrap();
    assert!(line["error"].as_str().unwrap().contains("/nonexistent"), "{said:?}");
}

#[test]
fn a_refusal_is_told_in_the_shims_words() {
    let cli = Cli::new();
    let source =
        Scripted::new(&cli, |call, _| (409, json!({"code": 409, "message": format!("no {call} now")})));
    for (args, call) in [
        (&["pause", "source"][..], "/pause"),
        (&["fork", "source"], "/fork"),
        (&["snapshot", "source", "fresh-name"], "/snapshot"),
        (&["configure", "source"], "/configure"),
    ] {
        let said = cli.run(args);
        assert!(
            said.code == 1 && said.err.contains(&format!("no {call} now")) && said.out.is_empty(),
            "{said:?}"
        );
    }
    let asked = source.asked();
    assert_eq!(asked[0], ("/pause".to_owned(), json!({})));
    assert_eq!(asked[2].1, json!({"path": cli.path("templates").join("fresh-name")}));
    assert_eq!(cli.folders(), ["scripted1"]);
    for (args, words) in [
        (&["snapshot", "source", "e2e"][..], "is there already"),
        (&["snapshot", "source", "Not a name"], "name of a template"),
        (&["resume", "source"], "is running: only a paused one can be resumed"),
    ] {
        let said = cli.run(args);
        assert!(said.code == 1 && said.err.contains(words), "{args:?}: {said:?}");
    }
}

#[test]
fn a_pause_is_over_when_the_shim_is_gone() {
    let cli = Cli::new();
    let source = Scripted::new(&cli, |call, _| match call {
        "/pause" => (200, json!({"paused": true, "ms": 5})),
        "/configure" => (200, json!({"phase": "running", "id": "scripted1"})),
        _ => (404, json!({})),
    });
    let out = cli.ok(&[
        "configure",
        "source",
        "--hostname",
        "box",
        "-e",
        "A=1",
        "-u",
        "user",
        "-w",
        "/srv",
        "-l",
        "k=v",
        "--timeout",
        "1m",
        "--access-token",
        "secret",
    ]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["phase"], "running");
    let wish = json!({
        "hostname": "box", "env": {"A": "1"}, "user": "user", "workdir": "/srv", "labels": {"k": "v"}, "timeout_s": 60,
        "access_token": "secret",
    });
    assert_eq!(source.asked()[0], ("/configure".to_owned(), wish));
    assert_eq!(cli.ok(&["pause", "source"]), "source\n");
    // A paused one is listed, and can be removed.
    let state = json!({"schema_version": 1, "id": "scripted1", "phase": "paused", "shim_pid": 1});
    std::fs::write(source.dir.join("state.json"), state.to_string()).unwrap();
    assert_eq!(cli.ok(&["ls", "-q"]), "scripted1\n");
    let said = cli.run(&["exec", "scripted1", "true"]);
    assert!(
        said.code == 125 && said.err.contains("is paused: `host-shim resume` brings it back"),
        "{said:?}"
    );
    cli.ok(&["stop", "scripted1"]);
    assert_eq!(cli.ok(&["rm", "scripted1"]), "scripted1\n");
    assert_eq!(cli.folders(), [""; 0]);
}
