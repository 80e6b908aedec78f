//! Many streams over one: yamux behind a [`preamble`], each stream opened with the port it wants.
//!
//! ```text
//! host                                   agent
//!   preamble(generation) ───────────────►  discards up to it
//!   discards up to it    ◄───────────────  preamble(generation)
//!   yamux client         ◄──────────────►  yamux server
//!   stream: u32 port (big-endian), bytes ► the door of that port, or a reset
//! ```
//!
//! The host opens streams and the agent accepts them. The host keeps its streams below what the agent accepts, since
//! yamux ends the whole session at one stream too many.

mod guard;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use envd_proto::limits::{MAX_MUX_BUFFER, MAX_MUX_STREAMS};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use tokio_util::task::AbortOnDropHandle;
use yamux::{Config, Connection, Mode};

use crate::preamble;

pub use guard::MAX_UNREAD_FRAMES;
use guard::{Guard, Ledger, Shared};

/// Streams that the host keeps open; half of what the agent accepts, since a stream that the host has closed may
/// still count on the agent's side.
pub const MAX_OPEN_STREAMS: usize = MAX_MUX_STREAMS / 2;

/// Requests to open a stream that wait for the session's task.
const OPEN_QUEUE: usize = 16;

/// What the windows of a session's streams may grow beyond what each begins with, all together: yamux widens the window of a
/// stream that is read fast, and never narrows it. A long way for a channel inside of one machine.
const MAX_WINDOW_GROWTH: usize = 16 << 20;

type Opened = io::Result<MuxStream>;

/// Why a session has ended by itself; nothing while it goes on.
pub type Broken = watch::Receiver<Option<String>>;

/// The host's end of a session. Streams live at most as long as it does.
#[derive(Debug)]
pub struct Mux {
    open: mpsc::Sender<oneshot::Sender<Opened>>,
    slots: Arc<Semaphore>,
    broken: Broken,
    driver: AbortOnDropHandle<()>,
}

impl Mux {
    /// Begins the session of `generation`; returns when the agent has answered the preamble.
    pub async fn connect<T>(transport: T, generation: u64) -> io::Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let transport = exchange_preambles(transport, generation).await?;
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let transport = Guard::new(transport, Arc::clone(&ledger));
        let (open, requests) = mpsc::channel(OPEN_QUEUE);
        let driver = Driver::new(transport, Mode::Client, requests, None, Some(ledger));
        let (end, broken) = watch::channel(None);
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            let reason = match driver.await {
                Ok(()) => "the guest closed it".to_owned(),
                Err(error) => error.to_string(),
            };
            end.send_replace(Some(reason));
        }));
        Ok(Self { open, slots: Arc::new(Semaphore::new(MAX_OPEN_STREAMS)), broken, driver })
    }

    /// Opens a stream to a port of the agent. Waits while [`MAX_OPEN_STREAMS`] are open.
    pub async fn open(&self, port: u32) -> io::Result<MuxStream> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| ended())?;
        let (reply, opened) = oneshot::channel();
        self.open.send(reply).await.map_err(|_| ended())?;
        let mut stream = opened.await.map_err(|_| ended())??;
        stream.slot = Some(slot);
        stream.write_u32(port).await?;
        stream.flush().await?;
        Ok(stream)
    }

    /// Ends the session; nothing is read from its transport when this returns. Ending it twice is fine.
    pub async fn end(&mut self) {
        self.driver.abort();
        if !self.driver.is_finished() {
            // That it was aborted is what was asked for.
            let _ = (&mut self.driver).await;
        }
    }

    /// Tells when the session ends without having been [ended](Self::end), and why.
    pub fn broken(&self) -> Broken {
        self.broken.clone()
    }

    /// Whether the session is over.
    pub fn is_ended(&self) -> bool {
        self.driver.is_finished()
    }
}

/// The agent's end of a session. Streams live at most as long as it does.
#[derive(Debug)]
pub struct MuxAcceptor {
    incoming: mpsc::Receiver<Compat<yamux::Stream>>,
    driver: AbortOnDropHandle<io::Result<()>>,
}

impl MuxAcceptor {
    /// Waits for the host's preamble of `generation` and answers it.
    pub async fn accept<T>(transport: T, generation: u64) -> io::Result<Self>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let transport = exchange_preambles(transport, generation).await?;
        let (deliver, incoming) = mpsc::channel(MAX_MUX_STREAMS);
        let (_, no_requests) = mpsc::channel(1);
        let driver = Driver::new(transport, Mode::Server, no_requests, Some(deliver), None);
        Ok(Self { incoming, driver: AbortOnDropHandle::new(tokio::spawn(driver)) })
    }

    /// The next stream, before its port was read; `None` at the end of the session. Cancel safe.
    pub async fn next(&mut self) -> Option<MuxStream> {
        let stream = self.incoming.recv().await?;
        Some(MuxStream { stream: Arc::new(Mutex::new(Some(stream))), counted: None, slot: None })
    }

    /// How the session ended.
    pub async fn finish(self) -> io::Result<()> {
        self.driver.await.map_err(io::Error::other)?
    }
}

/// A stream of a session.
#[derive(Debug)]
pub struct MuxStream {
    /// Empty once it was cut.
    stream: Shared,
    /// The host counts what is not read of its streams.
    counted: Option<(u32, Arc<Mutex<Ledger>>)>,
    slot: Option<OwnedSemaphorePermit>,
}

impl MuxStream {
    /// Reads the port that the opener wants; the first four bytes of every stream.
    pub async fn read_port(&mut self) -> io::Result<u32> {
        self.read_u32().await
    }
}

impl MuxStream {
    fn with<R>(
        &self,
        act: impl FnOnce(Pin<&mut Compat<yamux::Stream>>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        match self.stream.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(stream) => act(Pin::new(stream)),
            None => Poll::Ready(Err(cut())),
        }
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = self.with(|stream| stream.poll_read(cx, buf));
        if let Some((id, ledger)) = &self.counted {
            let count = buf.filled().len() - before;
            ledger.lock().unwrap_or_else(PoisonError::into_inner).read(*id, count);
        }
        read
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_shutdown(cx))
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        if let Some((id, ledger)) = &self.counted {
            ledger.lock().unwrap_or_else(PoisonError::into_inner).close(*id);
        }
    }
}

async fn exchange_preambles<T>(mut transport: T, generation: u64) -> io::Result<T>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    transport.write_all(&preamble::encode(generation)).await?;
    transport.flush().await?;
    let mut scanner = preamble::Scanner::new(generation);
    // A byte at a time: what follows the preamble belongs to yamux. It is 16 bytes and what a dead session left.
    while !scanner.push(transport.read_u8().await?) {}
    Ok(transport)
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the mux session has ended")
}

fn cut() -> io::Error {
    let reason = "the stream was cut: the guest has said much on it that nobody has read";
    io::Error::new(io::ErrorKind::ConnectionReset, reason)
}

fn config() -> Config {
    let mut config = Config::default();
    config.set_max_num_streams(MAX_MUX_STREAMS);
    config.set_max_connection_receive_window(Some(MAX_MUX_BUFFER + MAX_WINDOW_GROWTH));
    config
}

/// The task that owns a session's yamux connection: yamux makes progress only while it is polled.
struct Driver<T> {
    connection: Connection<Compat<T>>,
    requests: mpsc::Receiver<oneshot::Sender<Opened>>,
    opening: Option<oneshot::Sender<Opened>>,
    deliver: Option<mpsc::Sender<Compat<yamux::Stream>>>,
    ledger: Option<Arc<Mutex<Ledger>>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    fn new(
        transport: T,
        mode: Mode,
        requests: mpsc::Receiver<oneshot::Sender<Opened>>,
        deliver: Option<mpsc::Sender<Compat<yamux::Stream>>>,
        ledger: Option<Arc<Mutex<Ledger>>>,
    ) -> Self {
        let connection = Connection::new(transport.compat(), config(), mode);
        Self { connection, requests, opening: None, deliver, ledger }
    }

    /// A stream of ours, which is known before the other side can say anything on it.
    fn opened(&self, stream: yamux::Stream) -> MuxStream {
        let id = stream.id().val();
        let stream = Arc::new(Mutex::new(Some(stream.compat())));
        let counted = self.ledger.as_ref().map(|ledger| {
            ledger.lock().unwrap_or_else(PoisonError::into_inner).open(id, Arc::clone(&stream));
            (id, Arc::clone(ledger))
        });
        MuxStream { stream, counted, slot: None }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Driver<T> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            if this.opening.is_none()
                && let Poll::Ready(Some(reply)) = this.requests.poll_recv(cx)
            {
                this.opening = Some(reply);
            }
            let mut progress = false;
            if let Some(reply) = this.opening.take() {
                match this.connection.poll_new_outbound(cx) {
                    Poll::Ready(opened) => {
                        // A requester that went away drops the stream, which resets it.
                        let opened = opened.map(|stream| this.opened(stream)).map_err(io::Error::other);
                        let _ = reply.send(opened);
                        progress = true;
                    }
                    Poll::Pending => this.opening = Some(reply),
                }
            }
            match this.connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    if let Some(deliver) = &this.deliver {
                        // Full cannot be: it holds as many as yamux lets in. Closed drops the stream, a reset.
                        let _ = deliver.try_send(stream.compat());
                    }
                    progress = true;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(io::Error::other(error))),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            if !progress {
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn session() -> (Mux, MuxAcceptor) {
        let (mut host, agent) = tokio::io::duplex(64 << 10);
        host.write_all(b"what a dead session left").await.unwrap();
        let (mux, acceptor) = tokio::join!(Mux::connect(host, 3), MuxAcceptor::accept(agent, 3));
        (mux.unwrap(), acceptor.unwrap())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_streams_carry_their_own_bytes_both_ways() {
        let (mux, mut acceptor) = session().await;
        let echo = tokio::spawn(async move {
            while let Some(mut stream) = acceptor.next().await {
                tokio::spawn(async move {
                    let port = stream.read_port().await.unwrap();
                    stream.write_u32(port).await.unwrap();
                    let (mut read, mut write) = tokio::io::split(stream);
                    tokio::io::copy(&mut read, &mut write).await.unwrap();
                    write.shutdown().await.unwrap();
                });
            }
            acceptor.finish().await
        });
        let mux = Arc::new(mux);
        let clients = (0..50u32).map(|n| {
            let mux = Arc::clone(&mux);
            tokio::spawn(async move {
                let stream = mux.open(n).await.unwrap();
                let (mut read, mut write) = tokio::io::split(stream);
                let data = vec![n as u8; 100_000];
                let sent = data.clone();
                let writing = tokio::spawn(async move {
                    write.write_all(&sent).await.unwrap();
                    write.shutdown().await.unwrap();
                });
                assert_eq!(read.read_u32().await.unwrap(), n);
                let mut back = Vec::new();
                read.read_to_end(&mut back).await.unwrap();
                assert!(back == data);
                writing.await.unwrap();
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
        drop(mux);
        let _ = echo.await.unwrap();
    }

    #[tokio::test]
    async fn streams_beyond_the_limit_wait_instead_of_ending_the_session() {
        let (mux, mut acceptor) = session().await;
        let accept = tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Some(stream) = acceptor.next().await {
                kept.push(stream);
                if kept.len() == MAX_OPEN_STREAMS {
                    break;
                }
            }
            // A reset of all of them gives the slots back.
            drop(kept);
            acceptor.next().await.is_some()
        });
        let mut open = Vec::new();
        for port in 0..MAX_OPEN_STREAMS as u32 {
            open.push(mux.open(port).await.unwrap());
        }
        assert_eq!(mux.slots.available_permits(), 0);
        open.clear();
        let _last = mux.open(1).await.unwrap();
        assert!(accept.await.unwrap());
    }

    #[tokio::test]
    async fn a_dead_transport_ends_the_session() {
        let (host, agent) = tokio::io::duplex(1024);
        let (mux, acceptor) = tokio::join!(Mux::connect(host, 1), MuxAcceptor::accept(agent, 1));
        let (mux, acceptor) = (mux.unwrap(), acceptor.unwrap());
        let mut stream = mux.open(5).await.unwrap();
        drop(acceptor);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        assert!(mux.open(5).await.is_err());
        assert!(mux.is_ended());
    }
}
