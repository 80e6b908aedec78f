//! The newest bytes of a process's output, with the streams that they came from.
//!
//! ```text
//! bytes   o o o o o o e e e o o o      offsets count every byte since the process's start,
//! runs    └── out ──┘ └err┘ └out┘      so a client can count for itself
//!         ▲ start                ▲ end
//! ```

use std::collections::VecDeque;

use bytes::Bytes;

use super::log::Stream;

/// What a run counts for beside its bytes.
pub(super) const RUN_SIZE: usize = size_of::<Run>();

/// The first allocation: a command that prints a line takes no more.
const FIRST_ALLOCATION: usize = 256;

/// Bytes of one stream, up to an offset.
#[derive(Clone, Copy, Debug)]
struct Run {
    end: u64,
    stream: Stream,
}

/// A queue of bytes that is cut at its front and grows at its end.
#[derive(Debug, Default)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
    runs: VecDeque<Run>,
    start: u64,
}

impl Ring {
    /// The offset of the oldest byte.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// The offset of the next byte.
    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// What it counts for.
    pub(super) fn size(&self) -> usize {
        self.bytes.len() + self.runs.len() * RUN_SIZE
    }

    /// How many bytes of a stream fit when it may count for `limit`.
    pub(super) fn room(&self, stream: Stream, limit: usize) -> usize {
        let run = if self.runs.back().is_some_and(|run| run.stream == stream) { 0 } else { RUN_SIZE };
        limit.saturating_sub(self.size() + run)
    }

    /// Adds bytes at the end. Allocates at most as much again as it holds, and at most `limit`.
    pub(super) fn append(&mut self, stream: Stream, bytes: &[u8], limit: usize) {
        if bytes.is_empty() {
            return;
        }
        let length = self.bytes.len() + bytes.len();
        if length > self.bytes.capacity() {
            let wanted = (self.bytes.capacity() * 2).max(FIRST_ALLOCATION).min(limit).max(length);
            self.bytes.reserve_exact(wanted - self.bytes.len());
        }
        self.bytes.extend(bytes);
        let end = self.end();
        match self.runs.back_mut() {
            Some(run) if run.stream == stream => run.end = end,
            _ => self.runs.push_back(Run { end, stream }),
        }
    }

    /// Forgets the oldest bytes, none from `floor` on, until `bytes` of a stream fit or nothing more may go.
    pub(super) fn make_room(&mut self, stream: Stream, bytes: usize, limit: usize, floor: u64) {
        while self.start < floor.min(self.end()) {
            let missing = bytes.saturating_sub(self.room(stream, limit));
            if missing == 0 {
                return;
            }
            let first = self.runs.front().map_or(0, |run| run.end - self.start);
            let most = first.min(floor - self.start);
            self.evict(self.start + most.min(missing as u64));
        }
    }

    /// Forgets the bytes before an offset.
    fn evict(&mut self, until: u64) {
        let count = (until - self.start) as usize;
        self.bytes.drain(..count);
        self.start = until;
        while self.runs.front().is_some_and(|run| run.end <= until) {
            self.runs.pop_front();
        }
    }

    /// Gives memory back: keeps what counts for `limit`, and forgets nothing from `floor` on.
    pub(super) fn shrink(&mut self, limit: usize, floor: u64) {
        while self.size() > limit && self.start < floor.min(self.end()) {
            let excess = (self.size() - limit) as u64;
            let first = self.runs.front().map_or(0, |run| run.end - self.start);
            self.evict(self.start + excess.min(first).min(floor - self.start));
        }
        self.bytes.shrink_to_fit();
        self.runs.shrink_to_fit();
    }

    /// At most `most` bytes from an offset on, of one stream; `None` at the end. The offset must not be before the start.
    pub(super) fn read(&self, offset: u64, most: impl FnOnce(Stream) -> usize) -> Option<(Stream, Bytes)> {
        let run = self.runs.get(self.runs.partition_point(|run| run.end <= offset))?;
        let begin = (offset - self.start) as usize;
        let count = usize::try_from(run.end - offset).unwrap_or(usize::MAX).min(most(run.stream));
        let (front, back) = self.bytes.as_slices();
        let part = |slice: &[u8], at: usize, length: usize| {
            let at = at.min(slice.len());
            (at, slice.len().min(at + length))
        };
        let (from, to) = part(front, begin, count);
        let first = &front[from..to];
        let rest = count - first.len();
        if rest == 0 {
            return Some((run.stream, Bytes::copy_from_slice(first)));
        }
        let (from, to) = part(back, begin.saturating_sub(front.len()), rest);
        let mut bytes = Vec::with_capacity(count);
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(&back[from..to]);
        Some((run.stream, bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> impl Strategy<Value = Stream> {
        prop_oneof![Just(Stream::Stdout), Just(Stream::Stderr)]
    }

    proptest! {
        /// Against a plain list of all bytes: whatever is kept is what was written, and the bound holds.
        #[test]
        fn what_is_kept_is_what_was_written(
            writes in prop::collection::vec((stream(), prop::collection::vec(any::<u8>(), 0..60)), 0..80),
            limit in 64usize..400,
            most in 1usize..50,
        ) {
            let mut ring = Ring::default();
            let mut all: Vec<(Stream, u8)> = Vec::new();
            for (stream, bytes) in &writes {
                ring.make_room(*stream, bytes.len(), limit, u64::MAX);
                let count = ring.room(*stream, limit).min(bytes.len());
                ring.append(*stream, &bytes[..count], limit);
                all.extend(bytes[..count].iter().map(|byte| (*stream, *byte)));
                prop_assert!(ring.size() <= limit);
                prop_assert_eq!(ring.end(), all.len() as u64);
            }
            let mut offset = ring.start();
            while let Some((stream, bytes)) = ring.read(offset, |_| most) {
                prop_assert!(!bytes.is_empty() && bytes.len() <= most);
                for byte in bytes {
                    prop_assert_eq!(all[offset as usize], (stream, byte));
                    offset += 1;
                }
            }
            prop_assert_eq!(offset, ring.end());
            ring.shrink(0, offset.saturating_sub(1));
            prop_assert!(ring.end() == offset && ring.start() <= offset.saturating_sub(1));
        }
    }

    #[test]
    fn alternating_streams_cannot_outgrow_the_limit() {
        let mut ring = Ring::default();
        for n in 0..10_000 {
            let stream = if n % 2 == 0 { Stream::Stdout } else { Stream::Stderr };
            ring.make_room(stream, 1, 4096, u64::MAX);
            ring.append(stream, b"x", 4096);
        }
        assert!(ring.size() <= 4096);
        assert!(ring.runs.len() < 256, "{}", ring.runs.len());
    }

    #[test]
    fn a_quiet_ring_allocates_nothing() {
        let ring = Ring::default();
        assert_eq!((ring.bytes.capacity(), ring.runs.capacity()), (0, 0));
    }
}
