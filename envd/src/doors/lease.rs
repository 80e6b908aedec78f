//! A transport that comes back when its session is over.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// A stream that is lent to a session: whoever drops it gives it back. A serial port is opened once, and outlives its
/// sessions; what is left of one in its buffers, the next one's preamble makes both sides skip.
#[derive(Debug)]
pub(super) struct Lease<T> {
    /// There until the drop.
    lent: Option<T>,
    back: Option<oneshot::Sender<T>>,
}

impl<T> Lease<T> {
    /// Lends `lent`, which the receiver gets back.
    pub(super) fn new(lent: T) -> (Self, oneshot::Receiver<T>) {
        let (back, returned) = oneshot::channel();
        (Self { lent: Some(lent), back: Some(back) }, returned)
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        if let (Some(lent), Some(back)) = (self.lent.take(), self.back.take()) {
            // Nobody wants it back when the agent ends.
            let _ = back.send(lent);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Lease<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.lent {
            Some(lent) => Pin::new(lent).poll_read(cx, buf),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Lease<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.lent {
            Some(lent) => Pin::new(lent).poll_write(cx, buf),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.lent {
            Some(lent) => Pin::new(lent).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    /// A session that ends does not end the transport.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ClientDoor, Doors};
    use super::*;
    use crate::machine::Phase;
    use crate::root::Root;
    use crate::sandbox::Sandbox;
    use crate::spawner::Spawner;
    use envd_channel::mux::Mux;
    use envd_proto::CLIENT_PORT;
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn health(mux: &Mux) -> String {
        let mut stream = mux.open(CLIENT_PORT).await.unwrap();
        let request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Host's transport whose other end is the agent's; the host side survives too, as a chardev's socket would.
    #[tokio::test]
    async fn a_session_of_each_generation_runs_over_one_transport() {
        let (socket, _spawner) = Spawner::socketpair().unwrap();
        let sandbox = Sandbox::new(Root::own(), Spawner::connect(socket).unwrap(), None);
        let (near, far) = tokio::io::duplex(1 << 16);
        let doors = Doors::new(ClientDoor::new(Arc::clone(&sandbox)));
        let serving = tokio::spawn(async move { doors.serve_mux_sessions(far).await });

        let (lease, returned) = Lease::new(near);
        let mux = Mux::connect(lease, 1).await.unwrap();
        assert!(health(&mux).await.starts_with("HTTP/1.1 204"));
        let mut stale = mux.open(CLIENT_PORT).await.unwrap();
        stale.write_all(b"GET /health HTTP/1.1\r\n").await.unwrap();
        sandbox.lifecycle().enter(Phase::Frozen { generation: 1 });
        // A snapshot cuts the host's session; what it had half sent arrives in the restored machine.
        drop(mux);
        let mut near = returned.await.unwrap();
        near.write_all(b"\x00\x01 half a frame of the source").await.unwrap();
        sandbox.lifecycle().enter(Phase::Resumed { generation: 2, clone: true });
        sandbox.lifecycle().wait_channel(2).await;
        let mux = Mux::connect(near, 2).await.unwrap();
        assert!(health(&mux).await.starts_with("HTTP/1.1 204"));
        // While the tenant runs, the end of the session is the end.
        sandbox.lifecycle().enter(Phase::Running { generation: 2 });
        drop(mux);
        assert!(serving.await.unwrap().is_err());
    }
}
