//! OCI images to root file systems, without root, mounts or mkfs.
//!
//! ```text
//! oci::Image ──index──► Tree ──► ext4::Plan ──► ext4::write ──► Output
//!   layers    (pass 1)  names,   inode numbers,  one ascending   sparse file, hashed on
//!     │                 metadata  block places    stream          the way, renamed when whole
//!     └───────────── file data (pass 2), in the layers' own order ──┘
//! ```
//!
//! [`build()`] makes the read-only root file system of a template, [`empty()`] the scratch disk of a sandbox, and
//! [`guest_image()`] the initramfs that both boot from; [`bake()`] puts the agent into the root file system instead;
//! [`mod@chunk`] is what the files travel as. A layer never touches the host's file system: its paths are keys of
//! an in-memory tree, so there is nothing outside to escape to.

mod apply;
mod bake;
mod build;
pub mod chunk;
mod compare;
mod cpio;
mod empty;
mod error;
mod ext4;
mod extract;
mod folder;
mod format;
mod initramfs;
mod insert;
mod inspect;
mod layers;
mod list;
#[cfg(test)]
mod many_entries;
mod output;
mod source;
mod spool;
mod tree;
mod verify;

pub use bake::{AgentPath, BakeOptions, bake};
pub use build::{BuildOptions, BuildReport, Progress, build};
pub use compare::{Change, Difference, diff};
pub use cpio::Cpio;
pub use empty::empty;
pub use error::Error;
pub use ext4::{
    Checksums, Contents, Ext4, FileSystem, Finding, GrowReport, ImageData, Journal, MAX_FINDINGS, MAX_LABEL,
    Size, Superblock, grow,
};
pub use extract::{Extracted, extract, read_file};
pub use folder::{Files, Folder, build_folder};
pub use format::{DataSource, Format, NoData, Prepared, Sink, WriteReport, write_tree};
pub use initramfs::{
    GuestImageCompression, GuestImageReport, ZstdLevel, guest_image, guest_image_compressed,
};
pub use insert::{InsertReport, NewContent, Owner, insert};
pub use inspect::{ImageFacts, LayerFacts, LostFile, SizeOf, Sizes, image_facts, largest};
pub use list::{Listed, Names, list};
pub use source::{Source, tree_of_layers};
pub use tree::{
    Attributes, Content, Directory, FileData, Name, Node, NodeId, Place, ResolveError, Run, Timestamp, Tree,
    Xattr,
};
pub use verify::{VerifyReport, verify};
