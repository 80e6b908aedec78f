//! The order in which growing writes, and what it costs to be cut off.
//!
//! ```text
//! 1  what nothing refers to yet: new groups, descriptors behind those in use    cut off: the old file system, clean
//!    ── sync ──
//! 2  a mark in the superblock: "has errors"                                      cut off: the old one, to be checked
//!    ── sync ──
//!    last group's bitmap, descriptors, resize inode                              cut off: e2fsck -p or -y repairs it
//!    ── sync ──
//!    the superblock, clean                                                       cut off: the new file system, clean
//!    ── sync ──
//! 3  copies of the superblock and the descriptors in old groups                  as above; e2fsck brings them up to date
//! ```
//!
//! Neither files nor directories are touched in any step, so nothing of the contents is ever at stake. Without a second step
//! (the last group was whole, and the resize inode stays as it is) the superblock alone makes the change, without the mark.
//! With the mark, as resize2fs sets it, no program takes the half that is there for a whole: the kernel warns when it is
//! mounted, e2fsck checks it without being forced, and growing again is refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::BLOCK_SIZE;
use super::superblock::PRIMARY_OFFSET;

/// `s_state`, and its bit for "has errors".
const STATE: usize = 0x3a;
const STATE_ERRORS: u8 = 0x2;

/// Blocks with their places.
pub(super) type Blocks = Vec<(u64, Vec<u8>)>;

/// All that growing writes.
#[derive(Default)]
pub(super) struct Writes {
    /// What nothing refers to before the superblock does.
    pub(super) new: Blocks,
    /// What belongs to the file system as it is.
    pub(super) changed: Blocks,
    /// Copies in groups that were there before.
    pub(super) copies: Blocks,
    /// The first superblock as it is, and as it will be.
    pub(super) before: Vec<u8>,
    pub(super) after: Vec<u8>,
}

/// One thing that is done to the file.
pub(super) enum Step {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// Everything so far reaches the disk before anything that follows.
    Sync,
}

impl Writes {
    /// In their order; the superblock is sealed by `seal`.
    pub(super) fn steps(self, seal: impl Fn(&mut [u8])) -> Vec<Step> {
        let mut steps = runs(self.new);
        steps.push(Step::Sync);
        if !self.changed.is_empty() {
            let mut marked = self.before;
            marked[STATE] |= STATE_ERRORS;
            seal(&mut marked);
            steps.extend([Step::Write(PRIMARY_OFFSET as u64, marked), Step::Sync]);
            steps.extend(runs(self.changed));
            steps.push(Step::Sync);
        }
        steps.extend([Step::Write(PRIMARY_OFFSET as u64, self.after), Step::Sync]);
        steps.extend(runs(self.copies));
        steps.push(Step::Sync);
        steps
    }
}

/// Neighbours joined: as few writes as there can be.
fn runs(mut blocks: Blocks) -> Vec<Step> {
    blocks.sort_by_key(|(place, _)| *place);
    let mut runs: Blocks = Vec::new();
    for (place, bytes) in blocks {
        match runs.last_mut() {
            Some((start, run)) if *start + (run.len() / BLOCK_SIZE) as u64 == place => run.extend(bytes),
            _ => runs.push((place, bytes)),
        }
    }
    runs.into_iter().map(|(place, bytes)| Step::Write(place * BLOCK_SIZE as u64, bytes)).collect()
}

/// Does them.
pub(super) fn apply(file: &File, steps: &[Step]) -> io::Result<()> {
    steps.iter().try_for_each(|step| match step {
        Step::Write(offset, bytes) => file.write_all_at(bytes, *offset),
        Step::Sync => file.sync_all(),
    })
}
