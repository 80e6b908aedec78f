//! The bounded log of one process's output.
//!
//! ```text
//! writers ──► ring of the newest bytes ──► readers, each at an offset of its own
//!   wait for room as the policy says        one that was overtaken goes on at the oldest byte, and is told
//! ```
//!
//! What readers took is kept too, for those that come later: it goes only when its room is needed.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envd_proto::limits::MAX_OUTPUT_CHUNK;
use tokio::sync::Notify;

use super::budget::{Budget, MIN_SHARE};
use super::ring::Ring;

/// What a log keeps when nobody says otherwise.
pub(super) const DEFAULT_SIZE: usize = 1 << 20;

/// The smallest log that can be asked for.
pub(super) const MIN_SIZE: usize = MIN_SHARE;

/// The largest log that can be asked for.
pub(super) const MAX_SIZE: usize = 64 << 20;

/// How long a process waits for readers of which none takes anything.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(10);

/// Readers of one process at one time.
pub(super) const MAX_READERS: usize = 64;

/// The largest chunk of a terminal's output in one event (what E2B's agent sends).
const MAX_PTY_CHUNK: usize = 16 << 10;

/// What a log may take beyond its size for what is still in the pipes when the process has ended, so that the end need
/// not wait for readers: two pipes of the default size, and what their readers had in hand.
const LAST_WORDS: usize = 4 * (64 << 10);

/// How long a log that got nothing of the pool waits before it asks again.
const DENIED: Duration = Duration::from_secs(1);

/// Where a piece of output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A terminal.
    Pty,
}

impl Stream {
    fn chunk(self) -> usize {
        match self {
            Self::Stdout | Self::Stderr => MAX_OUTPUT_CHUNK,
            Self::Pty => MAX_PTY_CHUNK,
        }
    }
}

/// What happens when a log is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The process waits for the fastest reader, of which another may be half a log behind, but not for readers of which
    /// none takes anything for 10 seconds.
    Paced,
    /// The oldest bytes go.
    Drop,
    /// The process waits until a reader is there and every reader has all.
    Block,
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
    Data {
        /// Where it came from.
        stream: Stream,
        /// The piece.
        bytes: Bytes,
        /// Bytes right before it that were dropped, since this reader was too slow for them.
        dropped: u64,
    },
    /// The process ended; nothing follows.
    End(End),
}

/// Why nobody can read from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Too many readers.
    #[error("the process has {MAX_READERS} readers: no more at a time")]
    TooMany,
    /// The offset lies in the future.
    #[error("offset {offset} is beyond the process's output, of which there are {end} bytes so far")]
    Beyond {
        /// The offset that was asked for.
        offset: u64,
        /// The bytes that there are.
        end: u64,
    },
}

/// The output of one process.
#[derive(Debug)]
pub struct OutputLog {
    id: u64,
    /// What it may count for when the pool has room.
    size: usize,
    policy: Policy,
    stall_limit: Duration,
    budget: Arc<Budget>,
    state: Mutex<State>,
    itself: Weak<OutputLog>,
    /// For readers: there is more, or the end.
    grown: Notify,
    /// For the writer: there may be room.
    taken: Notify,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    /// What the ring may count for now; beyond [`MIN_SHARE`] it comes from the budget.
    limit: usize,
    denied: Option<Instant>,
    readers: Vec<Position>,
    next_reader: u64,
    /// Counts what readers take.
    takes: u64,
    /// No reader took anything for the stall limit: the writer waits no more until one does.
    stalled: bool,
    /// The process has ended, and only what is in its pipes follows.
    closing: bool,
    end: Option<End>,
    /// When it ended, counted over all logs of the budget.
    ended: u64,
}

#[derive(Debug)]
struct Position {
    reader: u64,
    next: u64,
}

impl State {
    /// Up to where bytes may go now without anybody losing what the policy promises.
    ///
    /// Half of what is kept stays behind the reader that counts: what was sent to a client that then goes away is still
    /// here when it comes back, and readers of one speed, all slower than the process, lose nothing to the first of them.
    fn evictable(&self, policy: Policy) -> u64 {
        let positions = || self.readers.iter().map(|reader| reader.next);
        let (start, end) = (self.ring.start(), self.ring.end());
        let behind = |position: u64| position.saturating_sub((end - start) / 2);
        match policy {
            Policy::Drop => end,
            _ if self.stalled => end,
            Policy::Paced => positions().max().map_or(end, behind),
            Policy::Block => positions().min().map_or(start, behind),
        }
    }
}

impl OutputLog {
    /// An empty log of a size, which shares a budget.
    pub(super) fn new(size: usize, policy: Policy, budget: &Arc<Budget>) -> Arc<Self> {
        Self::with_stall_limit(size, policy, budget, STALL_LIMIT)
    }

    fn with_stall_limit(
        size: usize,
        policy: Policy,
        budget: &Arc<Budget>,
        stall_limit: Duration,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let state = State {
            ring: Ring::default(),
            limit: size.min(MIN_SHARE),
            denied: None,
            readers: Vec::new(),
            next_reader: 0,
            takes: 0,
            stalled: false,
            closing: false,
            end: None,
            ended: u64::MAX,
        };
        Arc::new_cyclic(|itself| Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            size,
            policy,
            stall_limit,
            budget: Arc::clone(budget),
            state: Mutex::new(state),
            itself: Weak::clone(itself),
            grown: Notify::new(),
            taken: Notify::new(),
        })
    }

    /// Adds output as far as there is room now; gives how much that is.
    pub(super) fn try_append(&self, stream: Stream, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            let rest = &bytes[written..];
            let mut state = self.lock();
            while state.ring.room(stream, state.limit) < rest.len() && self.may_grow(&state, self.size) {
                drop(state);
                self.grow();
                state = self.lock();
            }
            let (limit, floor) = (state.limit, state.evictable(self.policy));
            state.ring.make_room(stream, rest.len().min(limit), limit, floor);
            let count = state.ring.room(stream, limit).min(rest.len());
            state.ring.append(stream, &rest[..count], limit);
            written += count;
            if count == 0 {
                if !state.closing || !self.may_grow(&state, self.size + LAST_WORDS) {
                    break;
                }
                drop(state);
                self.grow();
            }
        }
        if written > 0 {
            self.grown.notify_waiters();
        }
        written
    }

    /// Adds output; waits for room as the policy says.
    pub(super) async fn append(&self, stream: Stream, mut bytes: &[u8]) {
        loop {
            let taken = self.taken.notified();
            bytes = &bytes[self.try_append(stream, bytes)..];
            if bytes.is_empty() {
                return;
            }
            let (takes, patient) = {
                let state = self.lock();
                (state.takes, self.policy == Policy::Block && !state.closing)
            };
            if patient {
                taken.await;
            } else if tokio::time::timeout(self.stall_limit, taken).await.is_err() {
                let mut state = self.lock();
                state.stalled = state.takes == takes;
            }
        }
    }

    /// The process has ended: what is still in its pipes need not wait for readers.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.taken.notify_waiters();
    }

    /// Ends the log; what is in it can still be read.
    pub(super) fn finish(&self, end: End) {
        let ended = self.budget.next_end();
        let mut state = self.lock();
        state.end = Some(end);
        state.ended = ended;
        drop(state);
        self.grown.notify_waiters();
    }

    /// How the process ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.lock().end
    }

    /// A reader of everything from now on, or from an offset.
    pub fn attach(self: &Arc<Self>, from: Option<u64>) -> Result<Attached, AttachError> {
        let mut state = self.lock();
        if state.readers.len() >= MAX_READERS {
            return Err(AttachError::TooMany);
        }
        let end = state.ring.end();
        let wanted = from.unwrap_or(end);
        if wanted > end {
            return Err(AttachError::Beyond { offset: wanted, end });
        }
        let offset = wanted.max(state.ring.start());
        let id = state.next_reader;
        state.next_reader += 1;
        state.readers.push(Position { reader: id, next: offset });
        drop(state);
        self.taken.notify_waiters();
        let reader = Reader { log: Arc::clone(self), id };
        Ok(Attached { reader, offset, dropped: offset - wanted, end })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Who gives back first: the logs of ended processes in the order of their ends, then the largest.
    pub(super) fn rank(&self) -> (u64, std::cmp::Reverse<usize>) {
        let state = self.lock();
        (state.ended, std::cmp::Reverse(state.limit))
    }

    /// Gives the pool back what nobody waits for.
    pub(super) fn give_back(&self) {
        let mut state = self.lock();
        let newest = state.ring.end().saturating_sub(1);
        let floor = match state.end {
            Some(_) if state.readers.is_empty() => newest,
            _ => state.evictable(self.policy).min(newest),
        };
        let charged = state.limit.saturating_sub(MIN_SHARE);
        state.ring.shrink(MIN_SHARE, floor);
        // All or nothing keeps the pool's book simple; what is still waited for is taken by its readers soon.
        if charged > 0 && state.ring.size() <= MIN_SHARE {
            state.limit = MIN_SHARE;
            self.budget.give(charged, self.id);
        }
    }

    fn may_grow(&self, state: &State, most: usize) -> bool {
        state.limit < most && state.denied.is_none_or(|denied| denied.elapsed() >= DENIED)
    }

    /// Takes as much again from the pool as it has. The lock must not be held.
    fn grow(&self) {
        let (limit, next) = {
            let state = self.lock();
            let most = if state.closing { self.size + LAST_WORDS } else { self.size };
            (state.limit, (state.limit * 2).min(most))
        };
        let taken = self.budget.take(next - limit, self.id, &self.itself);
        let mut state = self.lock();
        if !taken {
            state.denied = Some(Instant::now());
        } else if state.limit == limit {
            state.limit = next;
        } else {
            // The writer of the other stream was here at the same time.
            self.budget.put_back(next - limit);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OutputLog {
    fn drop(&mut self) {
        let charged = self.lock().limit.saturating_sub(MIN_SHARE);
        if charged > 0 {
            self.budget.give(charged, self.id);
        }
    }
}

/// A reader, and where it begins.
#[derive(Debug)]
pub struct Attached {
    /// The reader.
    pub reader: Reader,
    /// The offset of the first byte that it gets.
    pub offset: u64,
    /// Bytes between the offset that was asked for and that one.
    pub dropped: u64,
    /// The offset behind the last byte that was printed so far.
    pub end: u64,
}

/// One reader of a log; dropped, it holds nothing back any more.
#[derive(Debug)]
pub struct Reader {
    log: Arc<OutputLog>,
    id: u64,
}

impl Reader {
    /// The next item. After the end it gives the same again. Cancel safe.
    pub async fn next(&mut self) -> Item {
        loop {
            let grown = self.log.grown.notified();
            if let Some(item) = self.take() {
                return item;
            }
            grown.await;
        }
    }

    fn take(&self) -> Option<Item> {
        let mut guard = self.log.lock();
        let state = &mut *guard;
        let start = state.ring.start();
        let position = state.readers.iter_mut().find(|position| position.reader == self.id)?;
        let offset = position.next.max(start);
        let Some((stream, bytes)) = state.ring.read(offset, Stream::chunk) else {
            return state.end.map(Item::End);
        };
        let dropped = offset - position.next;
        position.next = offset + bytes.len() as u64;
        state.takes += 1;
        state.stalled = false;
        drop(guard);
        self.log.taken.notify_waiters();
        Some(Item::Data { stream, bytes, dropped })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.log.lock().readers.retain(|position| position.reader != self.id);
        self.log.taken.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
