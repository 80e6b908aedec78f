//! The only crate with unsafe code: system calls that no safe wrapper offers.
//!
//! Everything else that the agent asks of the kernel goes through `rustix` and `nix`.

mod entropy;
mod interface;
mod netlink;
mod spawn;

pub use entropy::{MAX_SEED, seed_random};
pub use interface::bring_up;
pub use netlink::explain_netlink_errors;
pub use spawn::{Credentials, Failure, Spawn, Spawned, Stage};
