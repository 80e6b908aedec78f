//! The agent inside a sandbox: PID 1 of the microVM, or an ordinary process.
//!
//! ```text
//!  host ── control door ──► guest ──► sandbox ◄── doors ◄── clients (vsock, serial mux, Unix socket)
//!                            boots      │ root: threads in the container's mount namespace, for files
//!                                       └ spawner: a process in the container, for processes
//! ```
//!
//! [`guest`] boots the machine and makes the container; [`machine`] is what the host does to it afterwards; [`doors`] is who may say what; [`sandbox`] is where processes and
//! paths live and whose it is; [`process`] and [`filesystem`] are the two services; [`connect`] is their protocol.

pub mod agent;
pub mod connect;
pub mod doors;
pub mod events;
pub mod filesystem;
pub mod guest;
pub mod host;
mod hostname;
mod listening;
mod log;
pub mod machine;
mod metrics;
mod network;
mod open_files;
mod pidfd;
pub mod process;
mod replace;
pub mod root;
pub mod sandbox;
mod serial;
pub mod spawner;
pub mod users;
