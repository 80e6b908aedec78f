//! The E2B-compatible front of one machine: the published SDKs run against it unmodified.
//!
//! ```text
//!                     one port (HTTP/1.1, HTTP/2, WebSocket); every request is routed and authorised by itself
//!                        │
//!        ┌───────────────┼─────────────────────────┐
//!   control API     sandbox's ports            legacy JSON-RPC
//!   control::       proxy::  by headers or     legacy::  `49982-<id>`
//!        │          by host label              │
//!        │               └──────────┬──────────┘
//!        ▼                          ▼
//!   fleet::Fleet ──────────► Sandbox ── vsock.sock ── the agent
//!        │  starts host-shim processes, finds them again, ends them
//!        ▼
//!   store::Store   SQLite: teams, hashed keys, sandboxes, templates and builds
//!
//!   builds::Builds   starts image-builder processes: from a client's steps to a template
//! ```
//!
//! [`tunnel`] is a WebSocket of the control API that carries many streams to one sandbox's ports.
//!
//! The gateway owns no VMM code: a sandbox is a `host-shim` process and its folder, and outlives the gateway.

pub mod base;
pub mod builds;
pub mod config;
pub mod control;
mod error;
pub mod fleet;
pub mod host;
pub mod identity;
pub mod legacy;
pub mod metrics;
pub mod operator;
pub mod proxy;
pub mod rate;
pub mod server;
pub mod store;
pub mod tls;
pub mod tunnel;

use std::sync::Arc;

pub use error::ApiError;

use builds::Builds;
use config::Config;
use fleet::Fleet;
use metrics::Metrics;
use store::Store;

/// Everything that a request may need.
#[derive(Debug)]
pub struct Gateway {
    /// What the operator said.
    pub config: Config,
    /// What is kept.
    pub store: Store,
    /// The sandboxes of this machine.
    pub fleet: Arc<Fleet>,
    /// The builds of templates.
    pub builds: Builds,
    /// What is counted.
    pub metrics: Metrics,
}
