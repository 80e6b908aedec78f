//! What a client may know of its machine, over the agent as an ordinary process.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// There only to catch a hang.
const DEADLINE: Duration = Duration::from_secs(60);

struct Agent {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = format!("unix:{}", folder.path().join("envd.sock").display());
        let child = Command::new(env!("CARGO_BIN_EXE_envd"))
            .args(["--listen", &listen, "--no-container"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let agent = Self { child, folder };
        let begin = Instant::now();
        while UnixStream::connect(agent.folder.path().join("envd.sock")).is_err() {
            assert!(begin.elapsed() < DEADLINE, "the agent listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    /// The head and the body of an answer.
    fn ask(&self, method: &str, path: &str, headers: &str) -> (String, String) {
        let mut stream = UnixStream::connect(self.folder.path().join("envd.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.to_owned())
    }
}

#[test]
fn metrics_are_e2bs_json_or_prometheus_text() {
    let agent = Agent::start();
    let (head, body) = agent.ask("GET", "/metrics", "");
    assert!(head.starts_with("http/1.1 200") && head.contains("content-type: application/json"), "{head}");
    let metrics: Value = serde_json::from_str(&body).unwrap();
    let keys: Vec<_> = metrics.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "cpu_count",
            "cpu_used_pct",
            "disk_total",
            "disk_used",
            "mem_cache",
            "mem_total",
            "mem_total_mib",
            "mem_used",
            "mem_used_mib",
            "ts"
        ]
    );
    assert!(metrics["mem_total"].as_u64() > metrics["mem_used"].as_u64());
    let (head, body) = agent.ask("GET", "/metrics", "accept: text/plain; version=0.0.4\r\n");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("\n# TYPE tiffin_memory_used_bytes gauge\ntiffin_memory_used_bytes "), "{body}");
    // Without cgroups of its own the agent knows nothing of classes.
    assert!(!body.contains("tiffin_class_"), "{body}");
    assert!(agent.ask("POST", "/metrics", "content-length: 0\r\n").0.starts_with("http/1.1 405"));
}

#[test]
fn envs_and_ports_are_json() {
    let agent = Agent::start();
    assert_eq!(agent.ask("GET", "/envs", "").1, "{}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let ports: Value = serde_json::from_str(&agent.ask("GET", "/ports", "").1).unwrap();
    let wanted = serde_json::json!({"address": "127.0.0.1", "port": port});
    assert!(ports.as_array().unwrap().contains(&wanted), "{ports}");
}
