//! The vsock that the VMM itself shows as Unix sockets ([`hybrid`]).
//!
//! A snapshot cuts all of its streams: the guest is told when it goes on, the host never. So the host's ends are closed
//! here, and the control door is opened again for one connection, which is the agent's: the tenant is frozen meanwhile.
//!
//! Such a stream has no half that is closed: Firecracker takes the end of what the host writes for the end of the stream
//! (`csm/connection.rs`, `LocalClosed`). What the host has written arrives; what the guest says after its end does not.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use envd_proto::CONTROL_PORT;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::net::{RecvFlags, Shutdown};
use sandbox_folder::client::Stream;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

use super::{PreparedKind, hybrid};
use crate::Error;
use crate::vmm::{Wiring, firecracker};

pub(super) struct Prepared {
    socket: PathBuf,
    door: Door,
    reset: Reset,
}

impl Prepared {
    pub(super) fn prepare(folder: &Path) -> Result<super::Prepared, Error> {
        let socket = folder.join(firecracker::VSOCK);
        let reset = Reset {
            door: folder.join(format!("{}_{CONTROL_PORT}", firecracker::VSOCK)),
            streams: Arc::default(),
        };
        let door = reset.listen()?;
        Ok(super::Prepared {
            wiring: Wiring::HybridVsock,
            fds: Vec::new(),
            helper: None,
            kind: PreparedKind::VmmVsock(Self { socket, door, reset }),
        })
    }

    pub(super) fn reset(&self) -> Reset {
        self.reset.clone()
    }

    pub(super) async fn control(&mut self) -> io::Result<Stream> {
        self.door.accept().await
    }

    pub(super) fn open(self) -> VmmVsock {
        VmmVsock { socket: self.socket, streams: self.reset.streams }
    }
}

/// Connections to the control door that nobody has spoken on yet; the tenant's requests of before its freeze, if it plays a
/// game. One of the agent's own that finds no seat is dialled again.
const MAX_DIALLED: usize = 64;

/// The control door, open for one connection of the guest: the first one on which somebody speaks. A frozen tenant can have
/// asked for others, and cannot speak on them.
#[derive(Debug)]
pub(crate) struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// That connection; later ones find nobody.
    pub(crate) async fn accept(&mut self) -> io::Result<Stream> {
        let mut dialled = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if dialled.len() < MAX_DIALLED => {
                    dialled.push(spoken(accepted?.0));
                }
                Some(spoken) = dialled.next() => if let Some(stream) = spoken {
                    std::fs::remove_file(&self.path)?;
                    return Ok(Box::new(stream));
                }
            }
        }
    }
}

/// A connection on which something has come; `None` if that is its end.
async fn spoken(stream: UnixStream) -> Option<UnixStream> {
    loop {
        stream.readable().await.ok()?;
        let peeked = stream.try_io(Interest::READABLE, || {
            let (bytes, _) = rustix::net::recv(&stream, &mut [0_u8; 1][..], RecvFlags::PEEK)?;
            Ok(bytes)
        });
        match peeked {
            Ok(1..) => return Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return None,
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Gone already, where it was used.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What is done when a snapshot has cut the guest's streams.
#[derive(Clone, Debug)]
pub(crate) struct Reset {
    door: PathBuf,
    streams: Arc<Streams>,
}

impl Reset {
    /// Ends the streams, for those who still wait for something on them.
    pub(crate) fn cut_streams(&self) {
        self.streams.cut();
    }

    /// Opens the control door. Before the guest goes on, and not before its streams were cut: what the tenant has sent to it
    /// is gone then.
    pub(crate) fn listen(&self) -> Result<Door, Error> {
        let listener = UnixListener::bind(&self.door).map_err(Error::io("listen on", &self.door))?;
        Ok(Door { listener, path: self.door.clone() })
    }
}

#[derive(Debug)]
pub(super) struct VmmVsock {
    socket: PathBuf,
    streams: Arc<Streams>,
}

impl VmmVsock {
    pub(super) async fn dial(&self, port: u32) -> io::Result<Stream> {
        let stream = hybrid::dial(&self.socket, port).await?;
        Ok(Box::new(self.streams.admit(stream)?))
    }
}

/// The open streams, as many as the doors of the shim let in.
#[derive(Debug, Default)]
struct Streams {
    open: Mutex<HashMap<u64, OwnedFd>>,
    last: AtomicU64,
}

impl Streams {
    fn admit(self: &Arc<Self>, stream: UnixStream) -> io::Result<Counted> {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let handle = stream.as_fd().try_clone_to_owned()?;
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(number, handle);
        Ok(Counted { stream, number, of: Arc::clone(self) })
    }

    fn cut(&self) {
        for (_, handle) in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain() {
            // One whose other end is gone is cut already.
            let _ = rustix::net::shutdown(&handle, Shutdown::Both);
        }
    }
}

/// A stream that is cut with the others.
struct Counted {
    stream: UnixStream,
    number: u64,
    of: Arc<Streams>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.of.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_cut_ends_every_open_stream_and_no_later_one() {
        let streams = Arc::new(Streams::default());
        let pair = || {
            let (near, far) = UnixStream::pair().unwrap();
            (streams.admit(near).unwrap(), far)
        };
        let ((mut waiting, _silent), (closed, _other)) = (pair(), pair());
        drop(closed);
        assert_eq!(streams.open.lock().unwrap().len(), 1);
        let reader = tokio::spawn(async move { waiting.read(&mut [0; 1]).await });
        tokio::task::yield_now().await;
        streams.cut();
        assert_eq!(reader.await.unwrap().unwrap(), 0, "its reader is told");
        let (mut later, mut far) = pair();
        far.write_all(b"x").await.unwrap();
        assert_eq!(later.read_u8().await.unwrap(), b'x');
        drop(later);
        assert!(streams.open.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_control_door_is_open_for_one_connection_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut prepared = Prepared::prepare(dir.path()).unwrap();
        let path = dir.path().join("vsock_1024");
        // Of a tenant that is frozen, and of one that is gone.
        let _silent = UnixStream::connect(&path).await.unwrap();
        drop(UnixStream::connect(&path).await.unwrap());
        let mut agent = UnixStream::connect(&path).await.unwrap();
        agent.write_all(b"hello").await.unwrap();
        let mut control = prepared.control().await.unwrap();
        let mut said = [0; 5];
        control.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        assert!(UnixStream::connect(&path).await.is_err() && !path.exists());
        let PreparedKind::VmmVsock(of_vmm) = &prepared.kind else { panic!("another channel") };
        let reset = of_vmm.reset();
        let mut door = reset.listen().unwrap();
        assert!(reset.listen().is_err(), "not two at a time");
        let mut agent = UnixStream::connect(&path).await.unwrap();
        agent.write_all(b"again").await.unwrap();
        door.accept().await.unwrap();
        drop(reset.listen().unwrap());
        assert!(!path.exists(), "one that nobody came to is closed too");
    }
}
