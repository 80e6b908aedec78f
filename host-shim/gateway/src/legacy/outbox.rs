//! What waits to be sent to one client.
//!
//! Bounded by messages and by bytes: whoever has something to tell waits until the client has taken what came before, down to
//! the process in the sandbox. A client that does not read cannot grow our memory.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Messages that wait.
const MAX_MESSAGES: usize = 64;

/// Bytes that wait. A single longer message waits alone.
const MAX_BYTES: u32 = 4 << 20;

/// The way to one client. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Outbox {
    room: Arc<Semaphore>,
    queue: mpsc::Sender<(String, OwnedSemaphorePermit)>,
}

/// The other end of an [`Outbox`].
#[derive(Debug)]
pub(super) struct Queue {
    room: Arc<Semaphore>,
    queue: mpsc::Receiver<(String, OwnedSemaphorePermit)>,
}

/// A pair.
pub(super) fn outbox() -> (Outbox, Queue) {
    let room = Arc::new(Semaphore::new(MAX_BYTES as usize));
    let (sender, receiver) = mpsc::channel(MAX_MESSAGES);
    (Outbox { room: Arc::clone(&room), queue: sender }, Queue { room, queue: receiver })
}

impl Outbox {
    /// Waits until there is room. A message to a client that is gone is nobody's.
    pub(super) async fn send(&self, message: String) {
        let bytes = u32::try_from(message.len()).unwrap_or(MAX_BYTES).min(MAX_BYTES);
        if let Ok(room) = Arc::clone(&self.room).acquire_many_owned(bytes).await {
            let _ = self.queue.send((message, room)).await;
        }
    }
}

impl Queue {
    /// The next message. Its room is free when what is given with it is dropped.
    pub(super) async fn next(&mut self) -> Option<(String, OwnedSemaphorePermit)> {
        self.queue.recv().await
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.room.close();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_is_waited_for() {
        let (out, mut queue) = outbox();
        let big = "x".repeat(MAX_BYTES as usize + 1);
        out.send(big.clone()).await;
        assert!(out.send("y".into()).now_or_never().is_none(), "there is no room");
        let (first, room) = queue.next().await.unwrap();
        assert!(first == big);
        assert!(out.send("y".into()).now_or_never().is_none(), "it is not on its way yet");
        drop(room);
        for _ in 0..MAX_MESSAGES {
            out.send("y".into()).await;
        }
        assert!(out.send("y".into()).now_or_never().is_none(), "too many");
        let waits = tokio::spawn({
            let out = out.clone();
            async move { out.send("z".into()).await }
        });
        drop(queue);
        waits.await.unwrap();
        out.send(big).await;
    }
}
