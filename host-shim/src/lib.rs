//! One process that owns one sandbox: it boots a VM from a template, talks to the agent inside, and leaves nothing
//! behind when either of them ends.
//!
//! ```text
//! spec.json ─► SandboxSpec ─► CheckedSpec ─► VmSpec ─► vmm::Vmm (qemu, firecracker)
//!                   │                          │           │ vmm::process: dies with the shim
//!                   ▼               channel::Prepared      ▼
//!  snapshot::SnapshotFolder ── fits? ──────────┴──► control door ─► agent::Agent   Hello, Configure or Resume, Thaw, ...
//!       ▲                                           streams ──────► sandbox_folder::client (run, vsock.sock)
//!       └── sandbox::take: pause, snapshot, fork, template warm
//! DIR ── dir::SandboxDir ── lock, state.json, api.sock, vsock.sock, console.log, vmm.log, shim.log
//!            └─ reaper: sweeps after a SIGKILL
//! ```
//!
//! A sandbox is booted, or restored from a snapshot that fits: as a clone of a template or of another sandbox, or as the
//! same sandbox that was paused. Either ends well with the agent's word that it is somebody's, or in one error: the
//! agent's own report, the end of the VMM with the kernel's last words, or the deadline. Every byte of the guest is
//! taken for hostile.

pub mod agent;
pub mod api;
mod cache;
pub mod channel;
pub mod dir;
pub mod doctor;
mod error;
pub mod log;
pub mod network;
pub mod notify;
pub mod reaper;
pub mod run;
pub mod sandbox;
pub mod scratch;
pub mod snapshot;
pub mod spec;
pub mod startup;
#[cfg(test)]
mod test_template;
pub mod timings;
pub mod tools;
pub mod vmm;
pub mod vsock_server;
pub mod warm;

pub use error::Error;
