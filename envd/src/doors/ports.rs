//! The ports door: `CONNECT <tcp port>\n`, `OK\n`, then the bytes of that connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::seats::Seat;

/// `CONNECT 65535\n` and some room for spaces.
const MAX_LINE: usize = 32;

/// How long a client may take for its line.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one direction may go on after the other has ended.
const LINGER: Duration = Duration::from_secs(60);

/// Serves one stream. A port where nobody listens is an end of the stream without `OK`.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, seat: &Seat) {
    // Whatever goes wrong, the client sees its stream end.
    let _ = connect_and_copy(&mut stream, seat).await;
}

async fn connect_and_copy<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, seat: &Seat) -> io::Result<()> {
    let port = tokio::time::timeout(LINE_TIMEOUT, read_port(stream)).await??;
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

/// Programs listen on either loopback address.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)).await {
        Ok(stream) => Ok(stream),
        Err(_) => TcpStream::connect(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port)).await,
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
    use tokio::net::TcpListener;

    async fn talk(line: &str) -> String {
        let (mut near, far) = tokio::io::duplex(1024);
        let seat = super::super::seats::Seats::new(1).take().unwrap();
        let serving = tokio::spawn(async move { serve(far, &seat).await });
        near.write_all(line.as_bytes()).await.unwrap();
        near.shutdown().await.unwrap();
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        serving.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_listening_port_is_reached_and_others_end_the_stream() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = String::new();
            stream.read_to_string(&mut got).await.unwrap();
            stream.write_all(got.to_uppercase().as_bytes()).await.unwrap();
        });
        assert_eq!(talk(&format!("CONNECT {port}\nhello")).await, "OK\nHELLO");
        assert_eq!(talk("CONNECT 1\n").await, "");
        for bad in ["CONNECT 0\n", "CONNECT 65536\n", "GET / HTTP/1.1\n", "\n", &"x".repeat(100)] {
            assert_eq!(talk(bad).await, "", "{bad:?}");
        }
    }
}
