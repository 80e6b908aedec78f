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
mod empty;
mod error;
mod ext4;
mod initramfs;
mod layers;
mod output;
mod tree;

pub use bake::{AgentPath, BakeOptions, bake};
pub use build::{BuildOptions, BuildReport, Progress, Size, build};
pub use empty::{MAX_LABEL, empty};
pub use error::Error;
pub use initramfs::{
    GuestImageCompression, GuestImageReport, ZstdLevel, guest_image, guest_image_compressed,
};
