//! The doors: what can be said to the agent, and where.
//!
//! ```text
//! CLIENT_PORT   client.rs    HTTP: processes, files, health
//! PORTS_PORT    ports.rs     CONNECT <tcp port>
//! (dialled)     control.rs   the host alone: hello, configure, shutdown
//! ```
//!
//! Client and ports streams arrive over vsock, over the mux of a serial port, or over a Unix socket; control has a
//! connection of its own, which no client's stream can become.

mod client;
mod control;
mod ports;

use std::io;
use std::sync::Arc;

use envd_channel::mux::MuxAcceptor;
use envd_proto::{CLIENT_PORT, PORTS_PORT};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

pub use client::ClientDoor;
pub use control::{Control, Outcome};
use envd_proto::limits::MAX_MUX_STREAMS;

/// Connections that are served at one time; more wait to be accepted.
const MAX_CONNECTIONS: usize = MAX_MUX_STREAMS;

/// The doors that are open to clients.
#[derive(Clone, Debug)]
pub struct Doors {
    client: ClientDoor,
    connections: Arc<Semaphore>,
}

impl Doors {
    /// The client door and the ports door beside it.
    pub fn new(client: ClientDoor) -> Self {
        Self { client, connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }

    /// Serves client connections on a Unix socket. Runs until the listener fails.
    pub async fn serve_unix(&self, listener: UnixListener) -> io::Result<()> {
        loop {
            let permit = self.permit().await?;
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(CLIENT_PORT, stream, permit),
                Err(error) => accept_failed(error).await?,
            }
        }
    }

    /// Serves one door's port on vsock. Runs until the listener fails.
    pub async fn serve_vsock(&self, port: u32) -> io::Result<()> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        loop {
            let permit = self.permit().await?;
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(port, stream, permit),
                Err(error) => accept_failed(error).await?,
            }
        }
    }

    /// Serves the streams of a mux session, each at the door that it asks for, until the session ends.
    pub async fn serve_mux<T>(&self, transport: T, generation: u64) -> io::Result<()>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut acceptor = MuxAcceptor::accept(transport, generation).await?;
        while let Some(mut stream) = acceptor.next().await {
            let permit = self.permit().await?;
            let doors = self.clone();
            tokio::spawn(async move {
                // A stream that breaks off before its port is nobody's.
                if let Ok(port) = stream.read_port().await {
                    doors.spawn(port, stream, permit);
                }
            });
        }
        acceptor.finish().await
    }

    async fn permit(&self) -> io::Result<tokio::sync::OwnedSemaphorePermit> {
        Arc::clone(&self.connections).acquire_owned().await.map_err(io::Error::other)
    }

    /// Serves one stream at the door of `port`. Any other port is no door: the stream is dropped, which resets it.
    fn spawn<S>(&self, port: u32, stream: S, permit: tokio::sync::OwnedSemaphorePermit)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let client = self.client.clone();
        tokio::spawn(async move {
            let _permit = permit;
            match port {
                CLIENT_PORT => client.serve(stream).await,
                PORTS_PORT if client.is_configured() => ports::serve(stream).await,
                _ => {}
            }
        });
    }
}

/// A failed accept is the fault of one connection, or of limits that pass; a listener is given up only when it is broken.
async fn accept_failed(error: io::Error) -> io::Result<()> {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::BADF | rustix::io::Errno::INVAL | rustix::io::Errno::NOTSOCK) => Err(error),
        _ => {
            eprintln!("envd: accepting a connection failed: {error}");
            // Without this a lack of descriptors would spin.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            Ok(())
        }
    }
}
