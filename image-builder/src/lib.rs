//! Dockerfiles to OCI images, and images to templates.
//!
//! ```text
//! Dockerfile --dockerfile--> stages of typed instructions
//!     |                            | plan: variables, needed stages     (pure)
//!     | base: local store, layout, | steps
//!     v archive, registry          v
//!   image in the store --layers--> overlay of unpacked layers --run, copy--> upper directory
//!                                                                  | oci::layer
//!                                                                  v
//!                                  store <--write_image-- config + layers, each by its cache key
//! ```
//!
//! A step runs with the authority of whoever starts the build, in a container that separates it from the host by
//! accident, not by malice: build only Dockerfiles that you would run.

mod base;
mod bootstrap;
mod builder;
mod cache;
mod check;
mod clock;
mod config;
mod console;
mod container;
mod context;
mod copy;
mod error;
mod interrupt;
mod layers;
mod overlay;
pub mod plan;
mod registry;
mod rooted;
mod run;
mod secrets;
mod sources;
pub mod templates;
mod transfer;
mod tree;
mod unpack;
mod users;
mod vm;
pub mod warm;
mod worker;

pub use bootstrap::{BootstrapOptions, BootstrapReport, LABEL as BOOTSTRAP_LABEL, bootstrap};
pub use builder::{BuildOptions, BuildReport, build};
pub use check::{CheckOptions, CheckReport, CheckedWarning, check};
pub use config::{HistoryEntry, ImageConfig};
pub use console::Console;
pub use container::{Outcome, run_container};
pub use error::Error;
pub use interrupt::{EXIT_INTERRUPTED, Interrupt};
pub use overlay::isolate_mounts;
pub use registry::CONNECT_TIMEOUT;
pub use secrets::{SecretFrom, SecretSource};
pub use transfer::{ListedImage, images, load, save};
pub use vm::VmOptions;
