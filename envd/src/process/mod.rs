//! Processes of the sandbox: their output, their input, their ends.
//!
//! ```text
//!                       ┌─ table: pid, tag ─┐
//! pipes or a terminal ──► carry ──► OutputLog (ring, bounded) ──► reader of Start
//! SendInput, StreamInput ──► Input                           └──► reader of each Connect
//! ```
//!
//! The log stands between the process and its readers, and keeps the newest output also when everybody has it: a client
//! that comes back names the byte from which it goes on. How long a process waits for readers is its policy; a reader that
//! is overtaken is told what it missed, and no reader holds up another.

mod budget;
mod carry;
mod cgroup;
mod environment;
mod events;
mod input;
mod log;
mod options;
mod out_of_memory;
#[allow(clippy::module_inception, reason = "one process, among what all processes need")]
mod process;
mod ring;
mod service;
mod table;
mod terminal;
mod tree;

pub use log::{AttachError, Attached, End, Item, OutputLog, Policy, Reader, Stream};
pub use out_of_memory::watch as watch_out_of_memory;
pub use process::Process;
pub use service::ProcessService;
pub use table::{ProcessTable, Selector};
