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
//! Stages are built side by side (graph.rs), each step from the cache where its key is known (cache.rs); builds are remembered
//! for `explain` (history.rs). Sessions of the store keep `prune` and builds apart.
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
mod digests;
mod durable;
mod error;
mod exchange;
mod explain;
mod fsck;
mod graph;
mod history;
mod interrupt;
mod layers;
mod outputs;
mod overlay;
pub mod plan;
mod prune;
mod registry;
mod rewrite;
mod rooted;
mod run;
mod sources;
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
pub use console::{Console, ProgressMode};
pub use container::{Outcome, run_container};
pub use error::Error;
pub use explain::{BuildOf, ExplainedStep, Explanation, Reason, explain};
pub use fsck::{Finding, FindingKind, FsckReport, fsck};
pub use history::StepOutcome;
pub use interrupt::{EXIT_INTERRUPTED, Interrupt};
pub use outputs::{BuildOutput, TemplateOutput, WrittenOutput};
pub use overlay::isolate_mounts;
pub use prune::{PruneOptions, PruneReport, Pruned, PrunedKind, prune};
pub use registry::CONNECT_TIMEOUT;
pub use transfer::{ListedImage, images, load, save};
