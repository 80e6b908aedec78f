//! The doors: what can be said to the agent, and where.
//!
//! ```text
//! CLIENT_PORT   client.rs    HTTP: processes, files, health
//! PORTS_PORT    ports.rs     CONNECT <tcp port>
//!               machine.rs   of these: metrics, environment, ports
//!               linger.rs    of these: the end of a body that nobody reads
//! (browsers)    cors.rs      what a page may do at the client door
//! (dialled)     control.rs   the host alone: hello, configure, freeze, resume, rehearse, thaw, shutdown
//! (nobody)      rehearsal.rs a call of the agent's own, before the thaw
//! ```
//!
//! Client and ports streams arrive over vsock, over the mux of a serial port, or over a Unix socket; control has a
//! connection of its own, which no client's stream can become.

mod client;
mod control;
mod cors;
mod lease;
mod linger;
mod machine;
mod ports;
mod rehearsal;
mod seats;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use envd_channel::mux::MuxAcceptor;
use envd_proto::{CLIENT_PORT, HOST_CID, PORTS_PORT};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

pub use client::ClientDoor;
pub use control::{Control, Outcome};
use lease::Lease;
pub use rehearsal::REHEARSAL;
pub(crate) use rehearsal::rehearse;
use seats::Seats;

/// Connections that each door serves at one time, so that one door cannot shut the other: a client of HTTP/1.1 has one for
/// each process that it follows, and there may be a thousand of these. An idle one costs 27 KiB.
const MAX_CONNECTIONS: usize = 2048;

/// Connections that wait to be accepted: a busy agent shall not look like one that does not listen.
const BACKLOG: i32 = MAX_CONNECTIONS as i32;

/// How long an opener may take to say which door it wants.
const PORT_TIMEOUT: Duration = Duration::from_secs(10);

/// The doors that are open to clients.
#[derive(Clone, Debug)]
pub struct Doors {
    client: ClientDoor,
    client_seats: Seats,
    ports_seats: Seats,
}

impl Doors {
    /// The client door and the ports door beside it.
    pub fn new(client: ClientDoor) -> Self {
        Self { client, client_seats: Seats::new(MAX_CONNECTIONS), ports_seats: Seats::new(MAX_CONNECTIONS) }
    }

    /// Serves one door's port on a Unix socket. Runs until the listener fails.
    pub async fn serve_unix(&self, port: u32, listener: UnixListener) -> io::Result<()> {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.spawn(port, stream),
                Err(error) => accept_failed(error).await?,
            }
        }
    }

    /// Serves one door's port on vsock. Runs until the listener fails.
    pub async fn serve_vsock(&self, port: u32) -> io::Result<()> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        // The crate asks for 128; a connection beyond the backlog is refused as if nobody listened.
        rustix::net::listen(&listener, BACKLOG)?;
        loop {
            match listener.accept().await {
                // vsock has no namespaces: programs in the sandbox can dial these ports too, and are nobody's clients.
                Ok((_, peer)) if peer.cid() != HOST_CID => {}
                Ok((stream, _)) => self.spawn(port, stream),
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
            let doors = self.clone();
            tokio::spawn(async move {
                // A stream that breaks off before its port is nobody's.
                if let Ok(Ok(port)) = tokio::time::timeout(PORT_TIMEOUT, stream.read_port()).await {
                    doors.spawn(port, stream);
                }
            });
        }
        acceptor.finish().await
    }

    /// Serves a mux session of each generation in turn, over a transport that has no connections of its own.
    ///
    /// A session that ends while the tenant is frozen is one that a snapshot cut: the host's Resume begins the next.
    /// Otherwise its end is the end.
    pub async fn serve_mux_sessions<T>(&self, mut transport: T) -> io::Result<()>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let lifecycle = self.client.sandbox().lifecycle().clone();
        loop {
            let generation = lifecycle.phase().generation();
            lifecycle.channel_is_ready(generation);
            let (lease, returned) = Lease::new(transport);
            {
                let session = self.serve_mux(lease, generation);
                tokio::pin!(session);
                let ended = tokio::select! {
                    ended = &mut session => Some(ended),
                    () = lifecycle.ended(generation) => None,
                };
                if let Some(ended) = ended {
                    let phase = lifecycle
                        .wait_for(|phase| phase.generation() != generation || !phase.is_frozen())
                        .await;
                    if phase.generation() == generation {
                        ended?;
                        return Err(io::Error::other("the mux session has ended"));
                    }
                }
            }
            // The session's task gives it back when it is dropped.
            transport = returned.await.map_err(io::Error::other)?;
        }
    }

    /// Serves one stream at the door of `port`. Any other port is no door: the stream is dropped, which resets it.
    fn spawn<S>(&self, port: u32, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let seats = match port {
            CLIENT_PORT => &self.client_seats,
            PORTS_PORT if self.client.is_configured() => &self.ports_seats,
            _ => return,
        };
        let Some(seat) = seats.take().map(Arc::new) else { return };
        let client = self.client.clone();
        tokio::spawn(async move {
            let sandbox = Arc::clone(client.sandbox());
            let generation = sandbox.lifecycle().phase().generation();
            let serving = async {
                match port {
                    CLIENT_PORT => client.serve(stream, Arc::clone(&seat)).await,
                    _ => ports::serve(stream, &sandbox, &seat).await,
                }
            };
            tokio::select! {
                () = serving => {}
                () = seat.given_away() => {}
                // The connection was another life's client's.
                () = sandbox.lifecycle().ended(generation) => {}
            }
        });
    }
}

/// A failed accept is the fault of one connection, or of limits that pass; a listener is given up only when it is broken.
async fn accept_failed(error: io::Error) -> io::Result<()> {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::BADF | rustix::io::Errno::INVAL | rustix::io::Errno::NOTSOCK) => Err(error),
        _ => {
            crate::log::warn(format_args!("accepting a connection failed: {error}"));
            // Without this a lack of descriptors would spin.
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(())
        }
    }
}
