//! The channel: what carries streams and control messages between the host shim and the agent.
//!
//! ```text
//!                    vsock (kernel, or a VMM's hybrid)        virtio-serial (no vsock on the host)
//!  client, ports     one vsock connection each                port `mux`: preamble, yamux, stream header
//!  control           the agent dials the host, JSON lines     port `ctl`: records
//! ```
//!
//! Control messages have two framings. [`mod@line`] is JSON for streams that lose nothing, simple enough to write by hand.
//! [`record`] is for a serial port, which can lose its host in the middle of a message: records are of one size,
//! checksummed, and found again after garbage. [`preamble`] marks where a mux
//! session begins, since after a restore a serial port delivers what the snapshot's source had half sent. [`mux`]
//! turns one byte stream into many. [`envelope`] is the framing inside the client door's streams (Connect protocol),
//! and [`name`] how file names of any bytes look in its messages.
//!
//! The framings are sans-IO; [`control`] and [`mux`] are thin shells over any tokio stream. Every byte that arrives is
//! taken for hostile: what can be sent in one message, and how many streams there can be, is bounded.

pub mod control;
pub mod envelope;
pub mod line;
pub mod mux;
pub mod name;
pub mod preamble;
pub mod record;
