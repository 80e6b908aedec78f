//! The agent as a service with a host, over Unix sockets, as a host sees it.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::{Value, json};

/// There only to catch a hang.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Service {
    pub(crate) child: Child,
    pub(crate) folder: tempfile::TempDir,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Service {
    pub(crate) fn start_in(folder: tempfile::TempDir) -> Self {
        let at = |name: &str| format!("unix:{}", folder.path().join(name).display());
        let child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--control", &at("control.sock"), "--listen", &at("envd.sock"), "--no-container"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    pub(crate) fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap())
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The pid of its only child, of whichever of its threads: the spawner's.
    pub(crate) fn spawner(&self) -> Option<Pid> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().flatten();
        let children =
            threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
        let children: String = children.collect();
        Pid::from_raw(children.split_whitespace().next()?.parse().unwrap())
    }

    /// Listens until the agent has dialled, and reads its hello.
    pub(crate) fn host(&self) -> (Host, Value) {
        let path = self.at("control.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let mut poll = [rustix::event::PollFd::new(&listener, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut poll, Some(&limit)).unwrap(), 1, "the agent dials");
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut host = Host(BufReader::new(stream));
        let hello = host.next("hello").unwrap();
        (host, hello)
    }

    /// One request on a connection of its own.
    pub(crate) fn call(&self, request: &str) -> String {
        let started = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(self.at("envd.sock")) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => panic!("the agent does not listen: {error}"),
            }
        };
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub(crate) fn list(&self) -> String {
        self.call(
            "POST /process.Process/List HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: 2\r\n\r\n{}",
        )
    }

    pub(crate) fn ended(&mut self) -> Option<i32> {
        let started = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status.code(),
                None if started.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(5)),
                None => panic!("the service runs on"),
            }
        }
    }
}

pub(crate) struct Host(BufReader<UnixStream>);

impl Host {
    pub(crate) fn say(&mut self, line: &[u8]) {
        // An agent that has heard enough closes while we still talk.
        let _ = self.0.get_mut().write_all(line);
    }

    /// The next message with this field; `None` at the end.
    pub(crate) fn next(&mut self, kind: &str) -> Option<Value> {
        let mut line = String::new();
        while self.0.read_line(&mut line).unwrap_or(0) > 0 {
            let mut message: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(message["generation"], 1);
            if !message[kind].is_null() {
                return Some(message[kind].take());
            }
            line.clear();
        }
        None
    }

    pub(crate) fn ask(&mut self, request: Value) -> Value {
        let mut line = request;
        line["generation"] = json!(1);
        line["id"] = json!(7);
        self.say(format!("{line}\n").as_bytes());
        let response = self.next("response").unwrap();
        assert_eq!(response["id"], "7");
        response
    }
}
