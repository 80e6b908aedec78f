//! Processes of the sandbox: their output, their input, their ends.
//!
//! ```text
//! pipe ──► pump ──► OutputLog (bounded) ──► reader of Start
//!                                      └──► reader of each Connect
//! ```
//!
//! The log stands between the process and its readers. A reader that keeps up loses nothing; one that stalls holds the
//! process back only for a bounded time and is then cut off, without touching the other readers.

mod log;
mod service;
mod table;

pub use log::{End, Item, OutputLog, Reader, Stream};
pub use service::ProcessService;
pub use table::{Process, ProcessTable, Selector};
