//! The tunnel over a real socket: a script in host-shim's place, servers of the test behind the sandbox's ports, and the
//! crate `yamux` as the client wherever the client behaves.

mod entry;
mod hostile;
mod streams;
mod support;
