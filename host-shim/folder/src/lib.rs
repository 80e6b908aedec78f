//! The sandbox folder: everything that whoever owns a sandbox and the process that runs it agree on.
//!
//! ```text
//! DIR/
//!   spec.json    in: [`spec::SandboxSpec`]
//!   state.json   out: [`State`], replaced atomically
//!   api.sock     HTTP/1.1 and JSON: the owner's calls ([`calls`], [`stop::StopRequest`], [`api::ApiClient`])
//!   snapshot/    out: what a paused sandbox was, whole or absent
//!   vsock.sock   hybrid vsock: `CONNECT <port>`, then a door of the agent ([`client::SandboxClient`])
//! ```
//!
//! `host-shim` serves the folder; its own command line, the gateway and any orchestrator are clients of it. A crate of its
//! own, so that a client links no VMM driver.

pub mod api;
pub mod calls;
pub mod client;
mod id;
pub mod network;
pub mod spec;
mod state;
pub mod stop;

pub use id::{InvalidId, SandboxId};
pub use state::{End, Event, InvalidTransition, Lifecycle, Phase, STATE_VERSION, Start, State};

/// What the caller asks for.
pub const SPEC: &str = "spec.json";
/// Where the sandbox is in its life.
pub const STATE: &str = "state.json";
/// The snapshot of a paused sandbox.
pub const SNAPSHOT: &str = "snapshot";
/// The socket of the owner's calls.
pub const API_SOCKET: &str = "api.sock";
/// The socket of the agent's doors.
pub const VSOCK_SOCKET: &str = "vsock.sock";
