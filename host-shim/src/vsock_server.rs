//! `vsock.sock`: the hybrid vsock dialect for everybody who may reach the sandbox folder.
//!
//! `CONNECT <port>\n` is answered with `OK <n>\n`, and then the connection is a stream to that port of the agent. Only
//! the client and ports doors are reachable; the control door is not a port that can be asked for at all.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use envd_channel::mux::MAX_OPEN_STREAMS;
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use sandbox_folder::client::Dial;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// `CONNECT 4294967295\n` and nothing longer.
const MAX_LINE: usize = 19;

/// How long a client may take to say which port it wants.
const LINE_DEADLINE: Duration = Duration::from_secs(10);

/// How long to stop accepting when the process is out of file descriptors; others close theirs meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until it is dropped.
pub async fn serve(listener: UnixListener, dial: Dial) {
    // The shim's own calls need streams too, so clients together get fewer than the channel has.
    let slots = Arc::new(Semaphore::new(MAX_OPEN_STREAMS - 16));
    let numbers = Arc::new(AtomicU32::new(1));
    // A set, and not detached tasks: dropped, it ends the connections.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (dial, number) = (Arc::clone(&dial), numbers.fetch_add(1, Ordering::Relaxed));
        connections.spawn(async move {
            if let Err(error) = connection(stream, dial, number).await {
                tracing::debug!(%error, "a client's connection ended");
            }
            drop(slot);
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut client: UnixStream, dial: Dial, number: u32) -> io::Result<()> {
    let port = tokio::time::timeout(LINE_DEADLINE, read_port(&mut client))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let mut agent = dial(port).await?;
    client.write_all(format!("OK {number}\n").as_bytes()).await?;
    tokio::io::copy_bidirectional(&mut client, &mut agent).await.map(drop)
}

async fn read_port(client: &mut UnixStream) -> io::Result<u32> {
    // Byte by byte: what follows the line is the stream's.
    let mut line = Vec::new();
    loop {
        match client.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
        if line.len() >= MAX_LINE {
            return Err(invalid("expected `CONNECT <port>` and an end of line"));
        }
    }
    let port = std::str::from_utf8(&line).ok().and_then(|line| line.strip_prefix("CONNECT "));
    match port.and_then(|port| port.parse().ok()) {
        Some(port @ (CLIENT_PORT | PORTS_PORT)) => Ok(port),
        Some(port) => Err(invalid(&format!("expected port {CLIENT_PORT} or {PORTS_PORT}, got {port}"))),
        None => Err(invalid("expected `CONNECT <port>`")),
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sandbox_folder::client::Stream;
    use std::sync::Mutex;

    struct Server {
        path: std::path::PathBuf,
        dialled: Arc<Mutex<Vec<u32>>>,
        _dir: tempfile::TempDir,
        _task: tokio_util::task::AbortOnDropHandle<()>,
    }

    /// A server whose agent echoes.
    fn server() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let dialled = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&dialled);
        let dial: Dial = Arc::new(move |port| {
            seen.lock().unwrap().push(port);
            Box::pin(async move {
                let (near, far) = tokio::io::duplex(4096);
                tokio::spawn(async move {
                    let (mut read, mut write) = tokio::io::split(far);
                    tokio::io::copy(&mut read, &mut write).await.unwrap();
                    write.shutdown().await.unwrap();
                });
                Ok(Box::new(near) as Stream)
            })
        });
        let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(serve(listener, dial)));
        Server { path, dialled, _dir: dir, _task: task }
    }

    async fn exchange(server: &Server, sent: &[u8]) -> Vec<u8> {
        let mut stream = UnixStream::connect(&server.path).await.unwrap();
        // A refused client is cut off while it still writes.
        let _ = stream.write_all(sent).await;
        let _ = stream.shutdown().await;
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got).await;
        got
    }

    #[tokio::test]
    async fn both_doors_are_byte_streams() {
        let server = server();
        assert_eq!(exchange(&server, b"CONNECT 49983\nGET / \xff\n").await, b"OK 1\nGET / \xff\n");
        assert_eq!(exchange(&server, b"CONNECT 49984\n").await, b"OK 2\n");
        assert_eq!(*server.dialled.lock().unwrap(), [CLIENT_PORT, PORTS_PORT]);
    }

    #[tokio::test]
    async fn the_control_door_and_every_other_port_are_out_of_reach() {
        let server = server();
        for line in [
            &b"CONNECT 1024\n"[..],
            b"CONNECT 1025\n",
            b"CONNECT 0\n",
            b"CONNECT 49985\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 115519\n", // 49983 + 65536
            b"CONNECT  49983\n",
            b"connect 49983\n",
            b"CONNECT 49983 \n",
            b"CONNECT 49983\r\n",
            b"\n",
            b"",
            b"CONNECT 4998300000000000000000000000",
            b"\xff\xff\xff\xff",
        ] {
            let got = exchange(&server, line).await;
            assert!(got.is_empty(), "{:?} was answered {got:?}", String::from_utf8_lossy(line));
        }
        assert!(server.dialled.lock().unwrap().is_empty());
    }
}
