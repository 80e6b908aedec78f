//! Bounds on everything that the other side can grow.

/// The largest encoded control message. A Configure carries an environment, which Linux itself bounds near this size.
pub const MAX_CONTROL_MESSAGE: usize = 256 << 10;

/// The longest line of JSON that carries a control message, its end included. JSON takes up to six bytes for one, base64 and
/// quotes take less than two: four times the message is room for every one that is not made of control characters.
pub const MAX_CONTROL_LINE: usize = 4 * MAX_CONTROL_MESSAGE;

/// The largest message inside a Connect envelope or a unary body; file contents go over /files, not through messages.
pub const MAX_CONNECT_MESSAGE: usize = 4 << 20;

/// The largest chunk of a process's stdout or stderr in one event (what E2B's agent sends).
pub const MAX_OUTPUT_CHUNK: usize = 32 << 10;

/// Streams that one side keeps open in a mux session; each is a connection of some client.
pub const MAX_MUX_STREAMS: usize = 512;

/// What a mux session may buffer for all its streams together. yamux wants at least 256 KiB for each stream.
pub const MAX_MUX_BUFFER: usize = MAX_MUX_STREAMS * (256 << 10);

/// The longest line of the agent's log, as text; one record then carries it.
pub const MAX_LOG_LINE: usize = 768;
