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
//! [`guest_image()`] the initramfs that both boot from; [`bake()`] puts the agent into the root file system instead. A layer never touches the host's file system: its paths are keys of
//! an in-memory tree, so there is nothing outside to escape to.

mod apply;
mod bake;
mod build;
mod cpio;
mod empty;
mod error;
mod ext4;
mod folder;
mod format;
mod initramfs;
mod layers;
#[cfg(test)]
mod many_entries;
mod output;
mod spool;
mod tree;

pub use bake::{AgentPath, BakeOptions, bake};
pub use build::{BuildOptions, BuildReport, Progress, build};
pub use cpio::Cpio;
pub use empty::empty;
pub use error::Error;
pub use ext4::{Ext4, GrowReport, Journal, MAX_LABEL, Size, grow};
pub use folder::{Files, Folder, build_folder};
pub use format::{DataSource, Format, NoData, Prepared, Sink, WriteReport, write_tree};
pub use initramfs::{GuestImageReport, guest_image};
pub use tree::{
    Attributes, Content, Directory, FileData, Name, Node, NodeId, Place, ResolveError, Run, Timestamp, Tree,
    Xattr,
};
