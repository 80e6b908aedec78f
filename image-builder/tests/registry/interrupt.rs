//! Ctrl-C in the middle of a transfer.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::host::{Host, names};

/// A registry with a good manifest whose blobs begin and never end; tells when one has begun.
fn endless() -> (String, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let (begun, beginning) = mpsc::channel();
    // Ends with the test's process.
    std::thread::spawn(move || {
        let blob = |text: &str| {
            serde_json::json!({
                "mediaType": oci::MediaType::ImageLayer, "digest": oci::Hasher::digest_of(text.as_bytes()), "size": 1 << 30,
            })
        };
        let mut config = blob("config");
        config["mediaType"] = serde_json::json!(oci::MediaType::ImageConfig);
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": oci::MediaType::ImageManifest, "config": config,
            "layers": [blob("a"), blob("b"), blob("c")],
        });
        let manifest = manifest.to_string();
        for connection in listener.incoming() {
            let (mut connection, begun, manifest) = (connection.unwrap(), begun.clone(), manifest.clone());
            std::thread::spawn(move || {
                let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = lines.next().unwrap_or_default();
                while lines.next().is_some_and(|header| !header.is_empty()) {}
                if request.contains("/manifests/") {
                    let length = manifest.len();
                    let _ = write!(
                        connection,
                        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{manifest}"
                    );
                    return;
                }
                let _ = write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1 << 30);
                let _ = connection.write_all(&[b'x'; 1 << 20]);
                let _ = begun.send(());
                // Until the client goes away.
                while lines.next().is_some() {}
            });
        }
    });
    (host, beginning)
}

#[test]
fn an_interrupted_pull_leaves_nothing() {
    for signal in [Signal::INT, Signal::TERM] {
        let host = Host::new();
        let (registry, begun) = endless();
        let name = format!("{registry}/x:1");
        let mut command = host.command(&["pull", &name]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        begun.recv_timeout(Duration::from_secs(120)).unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        // What the next command finds, whatever it is about.
        assert_eq!(host.json(&["images"]), serde_json::json!([]));
        assert!(names(&host.path("data/images/.incoming")).is_empty());
        // The manifest had come whole.
        assert_eq!(names(&host.path("data/images/blobs/sha256")).len(), 1);
    }
}
