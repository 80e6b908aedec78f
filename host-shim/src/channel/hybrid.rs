//! The hybrid vsock dialect: a guest's ports as Unix sockets.
//!
//! The host connects to `PATH`, writes `CONNECT <port>\n` and reads `OK <n>\n`; what the guest dials on CID 2 port N arrives
//! at `PATH_N`. Firecracker's `docs/vsock.md`, and vhost-device-vsock after it.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Attempts to reach a port, each after twice the wait of the one before: 10 ms to 5 s together. A guest that is
/// busy can take that long to accept.
const DIAL_ATTEMPTS: u32 = 10;
const FIRST_WAIT: Duration = Duration::from_millis(10);

/// The longest answer to a CONNECT: `OK 4294967295\n`.
const MAX_ANSWER: usize = 16;

/// Opens a stream to a port of the guest behind `socket`.
pub(super) async fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut wait = FIRST_WAIT;
    for _ in 1..DIAL_ATTEMPTS {
        match dial_once(socket, port).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            done => return done,
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    dial_once(socket, port).await
}

pub(super) async fn dial_once(socket: &Path, port: u32) -> io::Result<UnixStream> {
    ask(UnixStream::connect(socket).await?, port).await
}

/// Asks for a port of the guest on a connection to the VMM's socket; what follows the answer is the stream's.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, port: u32) -> io::Result<S> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line is the stream's.
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER {
        match stream.read_u8().await {
            Ok(b'\n') if answer.starts_with(b"OK ") => return Ok(stream),
            Ok(byte) => answer.push(byte),
            // This is how it says that nobody listens on the port.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
            {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("guest port {port} is closed"),
                ));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "expected `OK <port>` in answer to CONNECT"))
}
