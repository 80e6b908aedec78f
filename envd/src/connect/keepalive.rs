//! How often a quiet stream shows that it is alive.

use std::time::Duration;

use http::HeaderMap;

use super::{Code, Error};

/// Without a wish of the client, as often as E2B's agent.
const DEFAULT: Duration = Duration::from_secs(90);

/// The client's wish, in `Keepalive-Ping-Interval`: seconds.
pub fn keepalive(headers: &HeaderMap) -> Result<Duration, Error> {
    let Some(value) = headers.get("keepalive-ping-interval") else { return Ok(DEFAULT) };
    let seconds = value.to_str().ok().and_then(|text| text.parse::<u32>().ok());
    let seconds = seconds.filter(|seconds| *seconds > 0).ok_or_else(|| {
        let message = format!("Keepalive-Ping-Interval {value:?}: expected seconds, at least 1");
        Error::new(Code::InvalidArgument, message)
    })?;
    Ok(Duration::from_secs(seconds.into()))
}
