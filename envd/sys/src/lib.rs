//! The only crate with unsafe code: system calls that no safe wrapper offers.
//!
//! Everything else that the agent asks of the kernel goes through `rustix` and `nix`.

mod interface;
mod readiness;
mod signals;
mod spawn;

pub use interface::bring_up;
pub use readiness::watch_readiness;
pub use signals::{SignalNumber, signal_group, signal_process};
pub use spawn::{Credentials, Failure, Rlimit, Spawn, Spawned, Stage};

/// The highest signal number on Linux (`_NSIG`).
const LAST_SIGNAL: libc::c_int = 64;
