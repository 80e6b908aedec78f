//! A reader that takes its time with a guest that does not: what is read costs this host CPU time that no guest pays for.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Bytes that are read in each [`WINDOW`]. An agent says some hundred bytes in a second, and an answer at most
/// `MAX_CONTROL_MESSAGE`; to read so many takes some tens of milliseconds.
const MAX_IN_WINDOW: usize = 4 << 20;

const WINDOW: Duration = Duration::from_secs(1);

/// Reads no more than a guest may say.
#[derive(Debug)]
pub(super) struct Paced<R> {
    inner: R,
    read: usize,
    /// The end of the window, once one has begun.
    end: Option<Pin<Box<Sleep>>>,
}

impl<R> Paced<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, read: 0, end: None }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Paced<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(end) = &mut this.end
            && (end.deadline() <= Instant::now() || this.read >= MAX_IN_WINDOW)
        {
            ready!(end.as_mut().poll(cx));
            (this.end, this.read) = (None, 0);
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
        this.read += buffer.filled().len() - before;
        if this.end.is_none() {
            this.end = Some(Box::pin(tokio::time::sleep(WINDOW)));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_read_at_the_pace_of_its_reader() {
        let mut paced = Paced::new(tokio::io::repeat(7));
        let begun = Instant::now();
        let mut buffer = vec![0; MAX_IN_WINDOW];
        paced.read_exact(&mut buffer).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
        for second in 1..4 {
            paced.read_exact(&mut buffer).await.unwrap();
            assert_eq!(begun.elapsed().as_secs(), second);
        }
        // Who is silent has it all again.
        tokio::time::sleep(10 * WINDOW).await;
        paced.read_exact(&mut buffer).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 13);
    }
}
