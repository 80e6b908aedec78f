//! Images between the local store and the programs that others have: Debian's registry, skopeo, umoci and containerd.
//!
//! Each server runs on loopback for one test, from a folder of the test's, and ends with it.

mod containerd;
mod host;
mod images;
mod interrupt;
mod login;
mod servers;
mod templates;
mod transport;
