//! The only crate with unsafe code: system calls that no safe wrapper offers.
//!
//! Everything else that the agent asks of the kernel goes through `rustix` and `nix`.

mod interface;
mod spawn;

pub use interface::bring_up;
pub use spawn::{Credentials, Failure, Spawn, Spawned, Stage};
