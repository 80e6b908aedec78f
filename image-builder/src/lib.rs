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
//! A step runs in a container that separates it from the host as Docker's does: enough for a Dockerfile with accidents,
//! not for one with malice ([`isolation`]).

mod base;
mod bootstrap;
mod builder;
mod cache;
mod cache_mounts;
mod cgroups;
mod check;
mod clock;
mod config;
mod console;
mod container;
mod context;
mod copy;
mod error;
mod ids;
mod interrupt;
pub mod isolation;
mod layers;
pub mod limits;
mod loopback;
mod mount_points;
mod mounts;
mod overlay;
pub mod plan;
mod registry;
mod rooted;
mod run;
mod seccomp;
mod secrets;
mod sources;
mod spec;
pub mod templates;
mod transfer;
mod tree;
mod unpack;
mod users;
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
pub use isolation::{Chosen, Isolation, enter};
pub use registry::CONNECT_TIMEOUT;
pub use run::{Network, RunOptions};
pub use secrets::{SecretSource, Secrets};
pub use transfer::{ListedImage, images, load, save};
