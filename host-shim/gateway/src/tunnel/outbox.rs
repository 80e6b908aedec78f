//! What waits to go to the client: frames without a body at once, data as the client reads it.

use bytes::Bytes;
use tokio::sync::mpsc;

use super::frame::{HEADER_SIZE, Header};

/// Frames without a body that wait: credit, refusals, answers to pings. A client that reads none of them while it causes so
/// many is not one to go on with.
const MAX_WAITING: usize = 4096;

/// Data frames that wait, of [`super::relay::CHUNK`] at most: half a MiB, which all streams share.
const MAX_DATA: usize = 32;

/// Frames that go out in one go.
const BATCH: usize = 16;

/// Where streams put what they have for the client. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Outbox {
    headers: mpsc::Sender<[u8; HEADER_SIZE]>,
    data: mpsc::Sender<Bytes>,
}

/// What is taken out of it.
#[derive(Debug)]
pub(super) struct Queue {
    headers: mpsc::Receiver<[u8; HEADER_SIZE]>,
    data: mpsc::Receiver<Bytes>,
}

/// Both ends.
pub(super) fn outbox() -> (Outbox, Queue) {
    let (headers, waiting_headers) = mpsc::channel(MAX_WAITING);
    let (data, waiting_data) = mpsc::channel(MAX_DATA);
    (Outbox { headers, data }, Queue { headers: waiting_headers, data: waiting_data })
}

impl Outbox {
    /// Sends a frame without a body. False: too many wait.
    pub(super) fn header(&self, header: Header) -> bool {
        self.headers.try_send(header.encode()).is_ok()
    }

    /// Sends a data frame; waits while many do.
    pub(super) async fn data(&self, frame: Bytes) {
        // Closed: the session is over, and with it whoever sends.
        let _ = self.data.send(frame).await;
    }
}

impl Queue {
    /// What goes out next, as messages; empty once nobody can send any more. Cancel safe.
    pub(super) async fn next(&mut self) -> Vec<Bytes> {
        let (mut headers, mut data) = (Vec::new(), Vec::new());
        tokio::select! {
            // A stream's acceptance goes before its data.
            biased;
            _ = self.headers.recv_many(&mut headers, MAX_WAITING) => {}
            _ = self.data.recv_many(&mut data, BATCH) => {}
        }
        if !headers.is_empty() {
            data.push(headers.concat().into());
        }
        data
    }
}
