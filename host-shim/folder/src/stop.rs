//! `POST /stop` of `api.sock`.

use serde::{Deserialize, Serialize};

/// The body; an empty one asks for nothing special. Unknown fields are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRequest {
    /// Milliseconds that the sandbox's processes get between SIGTERM and SIGKILL; 0 ends the machine at once, and what
    /// the guest has not written is lost with its disk. The shim's own choice (10 s) when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u32>,
}

impl StopRequest {
    /// Its end at once.
    pub const AT_ONCE: Self = Self { grace_ms: Some(0) };

    /// Reads a body; the error is a sentence for the caller.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        // By way of a map: serde would also read a struct from a list.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(body).map_err(invalid)?;
        serde_json::from_value(object.into()).map_err(invalid)
    }
}

fn invalid(error: serde_json::Error) -> String {
    format!("expected nothing, or a JSON object with the number grace_ms (0 to {}): {error}", u32::MAX)
}
