//! Snapshots on disk: what a stopped VM leaves in files, whole or absent, and shared wherever it can be.
//!
//! ```text
//! FOLDER/
//!   manifest.json   what it is, what it fits, the digest of every file; written last      [`Manifest`]
//!   state           device state of the VMM
//!   ram             BASE   the guest's RAM, raw and sparse, as long as the RAM            [`ram`]
//!   scratch.ext4    BASE   the scratch disk, raw and sparse                               [`disk`]
//!   ram.delta       DELTA  the pages that differ from `ram`                               [`delta`]
//!   scratch.qcow2   DELTA  a qcow2 overlay over `scratch.ext4`
//!   rootfs.ext4     optional, the template's own file (a hard link)
//! ```
//!
//! A delta never lies over a delta: a VM that was restored from base and delta maps the base privately and has the
//! delta's pages written over it, so what it differs in later is again relative to that base.
//!
//! ```text
//!  cold boot ──stop──► base ──restore──► clone ──stop──► base + delta ──restore──► clone ──stop──► base + delta'
//!                        │  (maps ram       │               │  (maps ram, writes      │               │
//!                        │   privately)     │               │   ram.delta over it)    │               │
//!                        └──── one inode: ram, scratch.ext4 ┴─────── hard links ──────┴───────────────┘
//! ```
//!
//! | verb | of a cold-booted sandbox | of a restored one |
//! |---|---|---|
//! | `template create`, `template warm` | base | (always boots) |
//! | `snapshot`, `pause`, `fork` | base | base + delta |
//!
//! The base's files are the same inodes everywhere, so their pages are in the host's memory once and on its disk once.
//! Copied with `cp -a` or to another machine, a folder is complete in itself.
//!
//! Nothing here waits for a guest or a VMM: the caller has stopped the vCPUs. Everything blocks; callers that are async
//! use `spawn_blocking`.

pub mod delta;
pub mod disk;
mod error;
pub mod folder;
pub mod hash;
mod key;
mod manifest;
mod memory;
mod open;
mod parallel;
mod qcow2;
pub mod ram;
mod sparse;
#[cfg(test)]
mod test_vmm;
mod verified;

pub use disk::{Placed, overlay};
pub use error::Error;
pub use folder::{Durability, NewSnapshot, sweep};
pub use key::{Demand, HostKey, Mismatch, cpu_digest};
pub use manifest::{
    AgentVersion, Description, FileEntry, FileName, GuestKey, MANIFEST_FILE, MAX_STATE, Manifest, Origin,
    SCHEMA_VERSION, SnapshotChannel, SnapshotMachine, Verb,
};
pub use memory::{GuestMemory, PAGE_SIZE, PageRange};
pub use oci_spec::image::Digest;
pub use open::SnapshotFolder;
