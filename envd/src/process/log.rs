//! The bounded log of one process's output.

use std::collections::{HashMap, VecDeque};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

/// What a log holds for readers that are behind.
pub(super) const CAPACITY: usize = 1 << 20;

/// How long a full log waits for a reader that takes nothing, before the reader is cut off.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Where a piece of output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signalled(i32),
    /// The spawner died before it told.
    Unknown,
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signalled(signal),
            (None, None) => Self::Unknown,
        }
    }
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A piece of output.
    Data(Stream, Bytes),
    /// The reader stalled for too long and was cut off; nothing follows.
    CutOff,
    /// The process ended; nothing follows.
    End(End),
}

/// The output of one process, kept until its readers have it.
#[derive(Debug)]
pub struct OutputLog {
    capacity: usize,
    stall_limit: Duration,
    state: Mutex<State>,
    /// For readers: there is more, or the end.
    grown: Notify,
    /// For the writer: there is room.
    taken: Notify,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<(Stream, Bytes)>,
    /// Number of the first chunk in `chunks`, counted from the process's start.
    first: u64,
    bytes: usize,
    end: Option<End>,
    /// Number of the next chunk that each reader takes. A reader that is not in it was cut off.
    readers: HashMap<u64, u64>,
    next_reader: u64,
}

impl State {
    fn next_chunk(&self) -> u64 {
        self.first + self.chunks.len() as u64
    }

    /// Forgets what every reader has.
    fn trim(&mut self) {
        let next = self.next_chunk();
        let slowest = self.readers.values().copied().min().unwrap_or(next);
        while self.first < slowest {
            let Some((_, bytes)) = self.chunks.pop_front() else { break };
            self.bytes -= bytes.len();
            self.first += 1;
        }
    }
}

impl OutputLog {
    /// An empty log.
    pub fn new() -> Arc<Self> {
        Self::with_limits(CAPACITY, STALL_LIMIT)
    }

    /// An empty log with limits of its own.
    pub fn with_limits(capacity: usize, stall_limit: Duration) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            stall_limit,
            state: Mutex::default(),
            grown: Notify::new(),
            taken: Notify::new(),
        })
    }

    /// Adds output; waits for room when the log is full of what some reader has not taken.
    pub async fn append(&self, stream: Stream, bytes: Bytes) {
        loop {
            let taken = self.taken.notified();
            let progress = {
                let mut state = self.lock();
                state.trim();
                if state.bytes == 0 || state.bytes + bytes.len() <= self.capacity {
                    if !state.readers.is_empty() {
                        state.bytes += bytes.len();
                        state.chunks.push_back((stream, bytes));
                    }
                    drop(state);
                    self.grown.notify_waiters();
                    return;
                }
                state.first
            };
            if tokio::time::timeout(self.stall_limit, taken).await.is_err() {
                self.cut_off_stalled(progress);
            }
        }
    }

    /// Ends the log; what is in it can still be read.
    pub fn finish(&self, end: End) {
        self.lock().end = Some(end);
        self.grown.notify_waiters();
    }

    /// How the process ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.lock().end
    }

    /// A reader of everything from now on.
    pub fn attach(self: &Arc<Self>) -> Reader {
        let mut state = self.lock();
        let id = state.next_reader;
        state.next_reader += 1;
        let next = state.next_chunk();
        state.readers.insert(id, next);
        Reader { log: Arc::clone(self), id }
    }

    /// Cuts off the readers that still want the chunk that was the first one a stall limit ago.
    fn cut_off_stalled(&self, first: u64) {
        let mut state = self.lock();
        if state.first == first {
            state.readers.retain(|_, next| *next > first);
            drop(state);
            self.grown.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One reader of a log; dropped, it holds nothing back any more.
#[derive(Debug)]
pub struct Reader {
    log: Arc<OutputLog>,
    id: u64,
}

impl Reader {
    /// The next item. After the end or a cut-off it gives the same again. Cancel safe.
    pub async fn next(&mut self) -> Item {
        loop {
            let grown = self.log.grown.notified();
            {
                let mut state = self.log.lock();
                let Some(&next) = state.readers.get(&self.id) else { return Item::CutOff };
                let index = (next - state.first) as usize;
                if let Some((stream, bytes)) = state.chunks.get(index).cloned() {
                    state.readers.insert(self.id, next + 1);
                    drop(state);
                    self.log.taken.notify_waiters();
                    return Item::Data(stream, bytes);
                }
                if let Some(end) = state.end {
                    return Item::End(end);
                }
            }
            grown.await;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.log.lock();
        state.readers.remove(&self.id);
        state.trim();
        drop(state);
        self.log.taken.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    fn paused() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
    }

    #[tokio::test]
    async fn output_before_the_end_is_read_after_it() {
        let log = OutputLog::new();
        let mut reader = log.attach();
        log.append(Stream::Stdout, chunk("out")).await;
        log.append(Stream::Stderr, chunk("err")).await;
        log.finish(End::Exited(3));
        assert_eq!(reader.next().await, Item::Data(Stream::Stdout, chunk("out")));
        assert_eq!(reader.next().await, Item::Data(Stream::Stderr, chunk("err")));
        assert_eq!(reader.next().await, Item::End(End::Exited(3)));
        assert_eq!(log.attach().next().await, Item::End(End::Exited(3)));
    }

    #[tokio::test]
    async fn without_readers_nothing_is_kept_and_nobody_waits() {
        let log = OutputLog::with_limits(4, STALL_LIMIT);
        for _ in 0..100 {
            log.append(Stream::Stdout, chunk("more than four")).await;
        }
        assert_eq!(log.lock().bytes, 0);
    }

    #[test]
    fn a_stalled_reader_is_cut_off_and_the_others_miss_nothing() {
        paused().block_on(async {
            let log = OutputLog::with_limits(4, Duration::from_secs(5));
            let mut stalled = log.attach();
            let mut quick = log.attach();
            let writer = tokio::spawn({
                let log = Arc::clone(&log);
                async move {
                    for n in 0..10 {
                        log.append(Stream::Stdout, chunk(&format!("{n:03}"))).await;
                    }
                    log.finish(End::Exited(0));
                }
            });
            for n in 0..10 {
                assert_eq!(quick.next().await, Item::Data(Stream::Stdout, chunk(&format!("{n:03}"))));
            }
            assert_eq!(quick.next().await, Item::End(End::Exited(0)));
            assert_eq!(stalled.next().await, Item::CutOff);
            writer.await.unwrap();
        });
    }

    proptest! {
        #[test]
        fn a_slow_reader_holds_the_writer_and_loses_nothing(
            sizes in prop::collection::vec(1usize..40, 1..60),
            pauses in prop::collection::vec(0u64..3, 60),
        ) {
            paused().block_on(async {
                let log = OutputLog::with_limits(64, Duration::from_secs(10));
                let mut reader = log.attach();
                let expected: Vec<Bytes> = sizes.iter().map(|&size| vec![size as u8; size].into()).collect();
                let writer = tokio::spawn({
                    let (log, chunks) = (Arc::clone(&log), expected.clone());
                    async move {
                        for chunk in chunks {
                            log.append(Stream::Stdout, chunk).await;
                            assert!(log.lock().bytes <= 64);
                        }
                        log.finish(End::Exited(0));
                    }
                });
                for (chunk, pause) in expected.into_iter().zip(pauses) {
                    tokio::time::sleep(Duration::from_secs(pause)).await;
                    assert_eq!(reader.next().await, Item::Data(Stream::Stdout, chunk));
                }
                assert_eq!(reader.next().await, Item::End(End::Exited(0)));
                writer.await.unwrap();
            });
        }
    }
}
