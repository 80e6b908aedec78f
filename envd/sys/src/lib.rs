//! The only crate with unsafe code: system calls, and an instruction, that no safe wrapper offers.
//!
//! Everything else that the agent asks of the kernel goes through `rustix` and `nix`.

mod bpf;
mod cycles;
mod entropy;
mod ext4;
mod fork;
mod heap;
mod interface;
mod netlink;
mod readiness;
mod seccomp;
mod signal;
mod signals;
mod spawn;
mod tap;

pub use bpf::{Device, DeviceKind, DeviceRules};
pub use cycles::cycle_counter;
pub use entropy::{MAX_SEED, seed_random};
pub use ext4::grow_ext4;
pub use fork::{Forked, fork};
pub use heap::trim_heap;
pub use interface::bring_up;
pub use netlink::explain_netlink_errors;
pub use readiness::watch_readiness;
pub use seccomp::SeccompFilter;
pub use signal::send_real_time_signal;
pub use signals::{SignalNumber, signal_group, signal_process};
pub use spawn::{Credentials, Failure, Rlimit, Spawn, Spawned, Stage};
pub use tap::open_tap;

/// The highest signal number on Linux (`_NSIG`).
const LAST_SIGNAL: libc::c_int = 64;
