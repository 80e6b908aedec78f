//! Where a request goes, told from its own head alone.
//!
//! ```text
//!   Host: 3000-abc123.sandboxes.example          the label says it          ─► port 3000 of abc123
//!   Host: 3000-abc123-6532622b.sandboxes.example   the old SDKs' client id is ignored
//!   Host: 127.0.0.1, localhost, sandbox.<domain>, …
//!     + E2b-Sandbox-Id and E2b-Sandbox-Port      the headers say it         ─► that port of that sandbox
//!     without them                                                          ─► the control API
//! ```
//!
//! SDKs send the headers beside the label, so both may be there; when they name two different things, the request is
//! refused: whatever stands before the gateway may have looked at the other one. Whether there is such a sandbox, and who
//! may reach it, is not asked here.

use http::request::Parts;
use http::{HeaderMap, HeaderName, Version, header};
use sandbox_folder::SandboxId;

/// The header with a sandbox's id.
pub const SANDBOX_ID: HeaderName = HeaderName::from_static("e2b-sandbox-id");

/// The header with a port of it.
pub const SANDBOX_PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");

/// Hosts below this name are always this machine (RFC 6761, 6.3): labels work there whatever the domain is.
const LOCALHOST: &str = "localhost";

/// The longest name that DNS has (RFC 1035, 2.3.4).
const MAX_HOST: usize = 255;

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To the control API.
    Control,
    /// To a port of a sandbox.
    Sandbox(Target),
    /// Nowhere: 400, and why.
    Bad(String),
}

/// A port of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The sandbox.
    pub id: SandboxId,
    /// Its port; not 0.
    pub port: u16,
}

/// Where the request with that head goes; `domain` is the configured one.
pub fn route(head: &Parts, domain: &str) -> Route {
    authority(head)
        .and_then(|authority| find(authority, &head.headers, domain))
        .map_or_else(Route::Bad, |target| target.map_or(Route::Control, Route::Sandbox))
}

/// What the request calls the server: `:authority`, the host of an absolute target, or `Host`.
fn authority(head: &Parts) -> Result<Option<&str>, String> {
    let host = match only(&head.headers, &header::HOST)? {
        // RFC 9112, 3.2: a request of HTTP/1.1 has one.
        None if head.version == Version::HTTP_11 && head.uri.authority().is_none() => {
            return Err("the request has no Host header".into());
        }
        host => host,
    };
    match (head.uri.authority(), host) {
        (Some(target), Some(host)) if !target.as_str().eq_ignore_ascii_case(host) => {
            Err(format!("the request is for {:?} and its Host header says {host:?}", target.as_str()))
        }
        (Some(target), _) => Ok(Some(target.as_str())),
        (None, host) => Ok(host),
    }
}

fn find(authority: Option<&str>, headers: &HeaderMap, domain: &str) -> Result<Option<Target>, String> {
    let host = authority.map(host_of).transpose()?.unwrap_or_default();
    let label = match [domain, LOCALHOST].into_iter().find_map(|domain| below(&host, domain)) {
        Some(label) => parse_label(label)?,
        None => None,
    };
    let id = only(headers, &SANDBOX_ID)?.map(parse_id).transpose()?;
    let port = only(headers, &SANDBOX_PORT)?.map(parse_port).transpose()?;
    match (label, id, port) {
        (Some(label), id, port) => {
            let agrees = id.is_none_or(|id| id == label.id) && port.is_none_or(|port| port == label.port);
            if agrees {
                Ok(Some(label))
            } else {
                Err(format!("the host {host:?} and the headers {SANDBOX_ID} and {SANDBOX_PORT} disagree"))
            }
        }
        (None, Some(id), Some(port)) => Ok(Some(Target { id, port })),
        (None, None, None) => Ok(None),
        (None, Some(_), None) => Err(format!("{SANDBOX_ID} is given without {SANDBOX_PORT}")),
        (None, None, Some(_)) => Err(format!("{SANDBOX_PORT} is given without {SANDBOX_ID}")),
    }
}

/// A header's value, of which there may be one.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, String> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(format!("the header {name} is there more than once"));
    }
    let value = value.to_str().map_err(|_| format!("the header {name} is no plain text"))?;
    Ok(Some(value))
}

/// The host's name in lower case, without a port and the root's dot. Of an IPv6 address the brackets are left.
fn host_of(authority: &str) -> Result<String, String> {
    let invalid = || format!("{authority:?} is no host with an optional port");
    let (host, rest) = if let Some(address) = authority.strip_prefix('[') {
        let (address, rest) = address.split_once(']').ok_or_else(invalid)?;
        address.parse::<std::net::Ipv6Addr>().map_err(|_| invalid())?;
        (&authority[..address.len() + 2], rest)
    } else {
        let (host, rest) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
        let named = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if !host.bytes().all(named) {
            return Err(invalid());
        }
        (host, rest)
    };
    // An empty port is the default one (RFC 3986, 3.2.3).
    let port = rest.strip_prefix(':').unwrap_or(rest);
    let valid = (rest.is_empty() || rest.starts_with(':')) && (port.is_empty() || parse_port(port).is_ok());
    if !valid || host.len() > MAX_HOST {
        return Err(invalid());
    }
    Ok(host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase())
}

/// The left-most label of a host below `domain`.
fn below<'a>(host: &'a str, domain: &str) -> Option<&'a str> {
    let start = host.len().checked_sub(domain.len()).filter(|_| !domain.is_empty())?;
    if !host.is_char_boundary(start) || !host[start..].eq_ignore_ascii_case(domain) {
        return None;
    }
    host[..start].strip_suffix('.')?.split('.').next()
}

/// `<port>-<id>` or `<port>-<id>-<client id>`; `None` for a label that is no sandbox's, like `api`.
fn parse_label(label: &str) -> Result<Option<Target>, String> {
    let Some((port, rest)) = label.split_once('-') else { return Ok(None) };
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let (id, client) = rest.split_once('-').map_or((rest, None), |(id, client)| (id, Some(client)));
    let plain = |client: &str| !client.is_empty() && client.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !client.is_none_or(plain) {
        return Err(format!("the host's label {label:?} is not `<port>-<sandbox id>`"));
    }
    Ok(Some(Target { id: parse_id(id)?, port: parse_port(port)? }))
}

fn parse_id(text: &str) -> Result<SandboxId, String> {
    text.parse().map_err(|error: sandbox_folder::InvalidId| error.to_string())
}

/// Digits alone: `parse` would take `+80` too.
fn parse_port(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    let port = if digits { text.parse().ok() } else { None };
    port.ok_or_else(|| format!("invalid port {text:?}: expected 1 to 65535"))
}

#[cfg(test)]
mod tests;
