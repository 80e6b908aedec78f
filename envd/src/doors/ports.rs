//! The ports door: `CONNECT <tcp port>\n`, `OK\n`, then the bytes of that connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::seats::Seat;
use crate::listening;
use crate::sandbox::Sandbox;

/// `CONNECT 65535\n` and some room for spaces.
const MAX_LINE: usize = 32;

/// How long a client may take for its line.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one direction may go on after the other has ended.
const LINGER: Duration = Duration::from_secs(60);

/// The port of SSH, whose server may wait for its host keys.
const SSH: u16 = 22;

/// Serves one stream. A port where nobody listens is an end of the stream without `OK`; so is a sandbox that is frozen,
/// whose programs cannot answer.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, sandbox: &Sandbox, seat: &Seat) {
    // Whatever goes wrong, the client sees its stream end.
    let _ = connect_and_copy(&mut stream, sandbox, seat).await;
}

async fn connect_and_copy<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    sandbox: &Sandbox,
    seat: &Seat,
) -> io::Result<()> {
    let port = tokio::time::timeout(LINE_TIMEOUT, read_port(stream)).await??;
    if sandbox.lifecycle().phase().is_frozen() {
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the sandbox is frozen"));
    }
    if port == SSH {
        sandbox.ssh_keys().ensure(sandbox).await;
    }
    let mut connection = connect(port).await?;
    seat.used();
    connection.set_nodelay(true)?;
    stream.write_all(b"OK\n").await?;
    stream.flush().await?;
    let (mut client_read, mut client_write) = tokio::io::split(stream);
    let (mut server_read, mut server_write) = connection.split();
    let to_server = async {
        tokio::io::copy(&mut client_read, &mut server_write).await?;
        server_write.shutdown().await
    };
    let to_client = async {
        tokio::io::copy(&mut server_read, &mut client_write).await?;
        client_write.shutdown().await
    };
    tokio::pin!(to_server, to_client);
    // One side is done: the other may finish its answer, but a server that never ends must not keep a client's place.
    tokio::select! {
        done = &mut to_server => {
            done?;
            tokio::time::timeout(LINGER, to_client).await?
        }
        done = &mut to_client => {
            done?;
            tokio::time::timeout(LINGER, to_server).await?
        }
    }
}

/// Programs listen on either loopback address, on all, or on one of the machine's own alone.
async fn connect(port: u16) -> io::Result<TcpStream> {
    for loopback in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        if let Ok(stream) = TcpStream::connect(SocketAddr::new(loopback, port)).await {
            return Ok(stream);
        }
    }
    let address = tokio::task::spawn_blocking(move || listening::address_of(port)).await;
    match address.map_err(io::Error::other)?? {
        Some(address) => TcpStream::connect(address).await,
        None => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

async fn read_port<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<u16> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if line.len() < MAX_LINE => line.push(byte),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    let text = std::str::from_utf8(&line).map_err(|_| io::ErrorKind::InvalidData)?;
    let port = text
        .strip_prefix("CONNECT ")
        .and_then(|port| port.trim().parse::<u16>().ok())
        .filter(|port| *port > 0);
    port.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Phase;
    use crate::root::Root;
    use crate::spawner::Spawner;
    use std::process::{Child, Command, Stdio};
    use std::sync::Arc;
    use tokio::net::TcpListener;

    fn sandbox() -> Arc<Sandbox> {
        let (socket, _spawner) = Spawner::socketpair().unwrap();
        Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None)
    }

    async fn talk(sandbox: &Arc<Sandbox>, line: &str) -> String {
        let (mut near, far) = tokio::io::duplex(1024);
        let seat = super::super::seats::Seats::new(1).take().unwrap();
        let serving = tokio::spawn({
            let sandbox = Arc::clone(sandbox);
            async move { serve(far, &sandbox, &seat).await }
        });
        // A refused client may find the stream closed already.
        let _ = near.write_all(line.as_bytes()).await;
        near.shutdown().await.unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        serving.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_listening_port_is_reached_on_every_address_and_others_end_the_stream() {
        let sandbox = sandbox();
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let serving = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut got = String::new();
                stream.read_to_string(&mut got).await.unwrap();
                stream.write_all(got.to_uppercase().as_bytes()).await.unwrap();
            });
            assert_eq!(talk(&sandbox, &format!("CONNECT {port}\nhello")).await, "OK\nHELLO", "{address}");
            serving.await.unwrap();
        }
        assert_eq!(talk(&sandbox, "CONNECT 1\n").await, "");
        for bad in ["CONNECT 0\n", "CONNECT 65536\n", "GET / HTTP/1.1\n", "\n", &"x".repeat(100)] {
            assert_eq!(talk(&sandbox, bad).await, "", "{bad:?}");
        }
    }

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn a_port_of_another_address_alone_is_reached_and_a_frozen_one_is_not() {
        let sandbox = sandbox();
        // Another address of the machine than the two that are tried: all of 127/8 is its own.
        let listener = std::net::TcpListener::bind("127.9.8.7:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        // The agent's own sockets are nobody's ports: a child holds this one too, as its program would.
        let held = Stdio::from(std::os::fd::OwnedFd::from(listener));
        let _child = Killed(Command::new("sleep").arg("600").stdin(held).spawn().unwrap());
        // The kernel takes the connection, the backlog holds it: `OK` says that it was made.
        assert!(talk_until_ok(&sandbox, port).await);
        sandbox.lifecycle().enter(Phase::Frozen { generation: 1 });
        assert!(!talk_until_ok(&sandbox, port).await);
    }

    async fn talk_until_ok(sandbox: &Arc<Sandbox>, port: u16) -> bool {
        let (mut near, far) = tokio::io::duplex(1024);
        let sandbox = Arc::clone(sandbox);
        let seat = super::super::seats::Seats::new(1).take().unwrap();
        let serving = tokio::spawn(async move { serve(far, &sandbox, &seat).await });
        near.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
        let mut answer = [0; 3];
        let ok = near.read_exact(&mut answer).await.is_ok() && &answer == b"OK\n";
        serving.abort();
        ok
    }
}
