//! The network of one sandbox: a TAP inside a network namespace of its own, filtered there, with an uplink out of it.
//!
//! ```text
//!  VMM ── TAP ─┤ namespace: tap0 ── nftables ── NAT ── uplink ├── veth + NAT of the host      (root)
//!                             rate ▲        ▲ rate             └── pasta, a user-mode stack     (an ordinary user)
//!                                  └ counters, verdicts by address, resolver
//! ```
//!
//! The same rules hold with either uplink, since they are inside. What is not said otherwise is dropped: the host with all of
//! its addresses, its loopback, other sandboxes, link-local and private ranges ([`policy`]). The addresses inside are always
//! the same ([`addresses`]), so a restored guest's configuration fits wherever it goes on. Its TCP connections do not: the
//! namespace is made afresh, and nobody knows them there.
//!
//! Everything is held by one process, the [`helper`], which is PID 1 of a PID namespace and ends when its owner's socket does.
//! With it end the uplink's process, the namespace with TAP, rules and veth, and the table with the NAT of the host, which
//! belongs to a process (`flags owner`): a SIGKILL of the owner leaves nothing, and no name is made that could be left.

pub mod addresses;
mod error;
pub mod helper;
mod host;
mod network;
pub mod policy;
mod report;
mod requirements;
mod ruleset;
mod verdicts;

pub use error::Error;
pub use network::Network;
pub use policy::{InvalidRules, Rate, Rules, Uplink};
pub use report::{Counter, Report};
pub use requirements::{Missing, check, try_namespaces};
