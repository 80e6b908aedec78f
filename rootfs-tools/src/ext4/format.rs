//! ext4 as one of the formats that a tree is written in.

use super::directory::FanOut;
use super::journal::{self, Journal};
use super::plan::{Capacity, Plan, PlanError};
use super::superblock::MAX_LABEL;
use super::{BLOCK_SIZE, Identity, LOST_FOUND, MAX_BYTES, Superblock, write};
use crate::Error;
use crate::format::{DataSource, Format, Prepared, Sink};
use crate::tree::{Attributes, Content, Node, NodeId, Tree};

/// How large the file system is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Size {
    /// As small as the contents allow.
    #[default]
    Minimal,
    /// As small as the contents and this many bytes of new files allow.
    Free(u64),
    /// This many bytes: a multiple of 4096. It is an error when the contents need more.
    Exact(u64),
}

impl Size {
    /// Checked, as the plan takes it.
    fn capacity(self) -> Result<Capacity, Error> {
        match self {
            Self::Minimal => Ok(Capacity::Free(0)),
            Self::Free(bytes) if bytes <= MAX_BYTES => Ok(Capacity::Free(bytes)),
            Self::Exact(bytes) if bytes <= MAX_BYTES && bytes.is_multiple_of(BLOCK_SIZE as u64) => {
                Ok(Capacity::Size(bytes))
            }
            Self::Free(bytes) | Self::Exact(bytes) => Err(Error::Invalid {
                what: format!("size of {bytes} bytes"),
                reason: format!("expected a multiple of {BLOCK_SIZE} of at most 16 TiB"),
            }),
        }
    }
}

/// An ext4 file system: its size, and what tells it from others.
#[derive(Clone, Debug)]
pub struct Ext4 {
    size: Size,
    identity: Identity,
    label: Vec<u8>,
    journal: Journal,
    fan_out: FanOut,
}

impl Ext4 {
    /// As small as its contents, without a label. UUID and hash seed follow from `seed`: the same seed, tree, data and
    /// options give the same bytes.
    pub fn new(seed: &[u8]) -> Self {
        Self {
            size: Size::Minimal,
            identity: Identity::derive(seed),
            label: Vec::new(),
            journal: Journal::None,
            fan_out: FanOut::FULL,
        }
    }

    /// With the UUID and the hash seed of another file system.
    pub fn identity_of(self, other: &Superblock) -> Self {
        Self { identity: other.identity(), ..self }
    }

    /// With another size.
    pub fn size(self, size: Size) -> Self {
        Self { size, ..self }
    }

    /// With a volume label of at most 16 bytes.
    pub fn label(self, label: &str) -> Result<Self, Error> {
        if label.len() > MAX_LABEL || label.contains('\0') {
            return Err(Error::Invalid {
                what: format!("label {label:?}"),
                reason: format!("it has {} bytes, expected at most {MAX_LABEL} and no NUL", label.len()),
            });
        }
        Ok(Self { label: label.as_bytes().to_vec(), ..self })
    }

    /// With a journal.
    pub fn journal(self, journal: Journal) -> Result<Self, Error> {
        let sizes = u64::from(journal::MIN_BLOCKS)..=u64::from(journal::MAX_BLOCKS);
        if let Journal::Size(bytes) = journal
            && !(bytes.is_multiple_of(BLOCK_SIZE as u64) && sizes.contains(&(bytes / BLOCK_SIZE as u64)))
        {
            return Err(Error::Invalid {
                what: format!("journal of {bytes} bytes"),
                reason: format!("expected a multiple of {BLOCK_SIZE}, 4 MiB to 40000 MiB"),
            });
        }
        Ok(Self { journal, ..self })
    }

    /// With directories whose index is deeper than it must be.
    #[cfg(test)]
    pub(super) fn fan_out(self, fan_out: FanOut) -> Self {
        Self { fan_out, ..self }
    }

    /// The plan of `tree`, to which `lost+found` is added.
    pub(crate) fn plan(&self, tree: &mut Tree) -> Result<Plan, Error> {
        let capacity = self.size.capacity()?;
        add_lost_found(tree);
        let plan = Plan::new(tree, capacity, self.identity, &self.label, self.journal, self.fan_out);
        plan.map_err(|error| match error {
            PlanError::TooLarge { needed, asked } => Error::TooLarge { needed, asked },
            PlanError::Unsupported { node, reason } => {
                Error::Unsupported { path: tree.path_of(node), reason }
            }
        })
    }
}

impl Format for Ext4 {
    fn prepare<'a>(&self, tree: &'a mut Tree) -> Result<Box<dyn Prepared + 'a>, Error> {
        let plan = self.plan(tree)?;
        Ok(Box::new(Planned { plan, tree }))
    }
}

struct Planned<'a> {
    plan: Plan,
    tree: &'a Tree,
}

impl Prepared for Planned<'_> {
    fn length(&self) -> u64 {
        self.plan.length()
    }

    fn entries(&self) -> u64 {
        self.plan.entries()
    }

    fn data(&self) -> u64 {
        self.plan.data_bytes(self.tree)
    }

    fn write(
        &self,
        source: &mut dyn DataSource,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        write(&self.plan, self.tree, source, sink, progress)
    }
}

/// e2fsck wants the directory; a tree that has one keeps its own.
fn add_lost_found(tree: &mut Tree) {
    if tree.child(NodeId::ROOT, LOST_FOUND).is_none() {
        let attributes = Attributes { mode: 0o700, ..Attributes::default() };
        let node = tree.add(Node { attributes, content: Content::Directory(Default::default()) });
        tree.link(NodeId::ROOT, LOST_FOUND, node, 0);
    }
}
