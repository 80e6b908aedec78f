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
pub mod contexts;
mod copy;
mod digests;
mod durable;
mod e2b_steps;
mod e2b_user;
mod error;
mod exchange;
mod explain;
mod fetch;
mod fsck;
mod graph;
mod history;
mod ids;
mod inspect;
mod interrupt;
pub mod isolation;
mod layers;
pub mod limits;
mod loopback;
mod mount_points;
mod mounts;
mod outputs;
mod overlay;
pub mod plan;
mod prune;
mod registry;
mod rewrite;
mod rooted;
mod run;
mod seccomp;
mod secrets;
mod sources;
mod spec;
pub mod template_transfer;
pub mod templates;
mod transfer;
mod tree;
mod unpack;
mod users;
mod vm;
pub mod warm;
mod worker;

pub use base::{PullOptions, PullPolicy};
pub use bootstrap::{BootstrapOptions, BootstrapReport, LABEL as BOOTSTRAP_LABEL, bootstrap};
pub use builder::{BuildOptions, BuildReport, build};
pub use check::{CheckOptions, CheckReport, CheckedWarning, check};
pub use config::{HistoryEntry, ImageConfig};
pub use console::{Console, ProgressMode};
pub use container::{Outcome, run_container};
pub use e2b_steps::StepsOptions;
pub use error::Error;
pub use explain::{BuildOf, ExplainedStep, Explanation, Reason, explain};
pub use fsck::{Finding, FindingKind, FsckReport, fsck};
pub use history::StepOutcome;
pub use inspect::{Inspected, InspectedLayer, inspect, raw_manifest};
pub use interrupt::{EXIT_INTERRUPTED, Interrupt};
pub use isolation::{Chosen, Isolation, enter};
pub use outputs::{BuildOutput, TemplateOutput, WrittenOutput};
pub use prune::{PruneOptions, PruneReport, Pruned, PrunedKind, prune};
pub use registry::{
    CONNECT_TIMEOUT, Credential, CredentialFiles, Platforms, PullReport, PushReport, Registries,
    RegistryOptions,
};
pub use run::{Network, RunOptions};
pub use secrets::{SecretSource, Secrets};
pub use transfer::{ListedImage, Saved, images, load, pull, push, remove, save, tag};
pub use vm::VmOptions;
