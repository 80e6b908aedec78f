//! Headers on their way through: what is for this hop alone goes, and so do secrets that are not the receiver's.
//!
//! ```text
//!                                       to the agent (49983)   to any other port
//!   Connection and what it names,
//!   Keep-Alive, Proxy-*, TE, Upgrade,   go                     go (Upgrade and `TE: trailers` are said anew)
//!   Transfer-Encoding, Expect
//!   X-API-KEY, traffic token, routing   go                     go
//!   X-Access-Token                      stays: it is checked   goes: the tenant's programs have no business with it
//!   Authorization, Cookie               stay                   stay
//!   X-Forwarded-For, -Proto, -Host      go                     the client's address is appended, the rest set if absent
//! ```
//!
//! `Expect: 100-continue` is answered by the gateway itself, once it forwards the body. X-Forwarded-* inform, they prove
//! nothing: a client may send what it likes, and a proxy in front (for TLS) must be able to.

use std::net::IpAddr;

use http::header::{self, Entry, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Uri, Version};

use super::route::{SANDBOX_ID, SANDBOX_PORT};

/// The header with a sandbox's traffic token.
pub(super) const TRAFFIC_TOKEN: HeaderName = HeaderName::from_static("e2b-traffic-access-token");

/// The header with a sandbox's access token.
pub(super) const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// RFC 9110, 7.6.1, beside what Connection names.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Removes what is for one hop alone.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // What frames the message and says where it goes is not the client's to remove.
        .filter(|name| *name != header::CONTENT_LENGTH && *name != header::HOST)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// What the client wants the connection to become, if this is something that may pass.
///
/// `h2c` may not: it would be HTTP requests that nobody routes. A server may ignore an upgrade (RFC 9110, 7.8).
pub(super) fn wanted_upgrade(head: &Parts) -> Option<HeaderValue> {
    let asked = head.version == Version::HTTP_11
        && head.headers.get_all(header::CONNECTION).iter().any(|value| lists(value, "upgrade"));
    let protocol = head.headers.get(header::UPGRADE).filter(|_| asked)?;
    let passes = head.method != Method::CONNECT && !lists(protocol, "h2c") && !lists(protocol, "h2");
    passes.then(|| protocol.clone())
}

fn lists(value: &HeaderValue, token: &str) -> bool {
    value.to_str().is_ok_and(|value| value.split(',').any(|item| item.trim().eq_ignore_ascii_case(token)))
}

/// Makes a client's head one of HTTP/1.1 for the sandbox. `has_body`: whether a body of unknown length follows.
pub(super) fn to_sandbox(head: &mut Parts, port: ToPort, peer: IpAddr, has_body: bool) {
    let trailers = head.headers.get_all(header::TE).iter().any(|value| lists(value, "trailers"));
    let upgrade = match port {
        ToPort::Agent => None,
        ToPort::Tenant => wanted_upgrade(head),
    };
    strip_hop_by_hop(&mut head.headers);
    for name in [header::EXPECT, API_KEY, TRAFFIC_TOKEN, SANDBOX_ID, SANDBOX_PORT] {
        head.headers.remove(name);
    }
    if let Some(authority) = head.uri.authority() {
        // It was checked to be the same, where both are there.
        if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
            head.headers.insert(header::HOST, host);
        }
    }
    join_cookies(&mut head.headers);
    match port {
        ToPort::Agent => {
            for name in [FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST] {
                head.headers.remove(name);
            }
        }
        ToPort::Tenant => {
            head.headers.remove(ACCESS_TOKEN);
            forwarded(&mut head.headers, peer);
        }
    }
    if trailers {
        head.headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, protocol);
    }
    if has_body && !head.headers.contains_key(header::CONTENT_LENGTH) {
        // Said aloud, or hyper takes a GET to have no body.
        head.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    // A part of a valid target is one.
    head.uri = target.parse().unwrap_or_else(|_| Uri::from_static("/"));
    head.version = Version::HTTP_11;
}

/// Who listens: the agent or a program of the tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToPort {
    Agent,
    Tenant,
}

/// HTTP/2 may spread a cookie over several lines, HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let lines: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if lines.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

fn forwarded(headers: &mut HeaderMap, peer: IpAddr) {
    let mut path: Vec<String> = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok().map(str::to_owned))
        .collect();
    path.push(peer.to_canonical().to_string());
    if let Ok(path) = HeaderValue::from_str(&path.join(", ")) {
        headers.insert(FORWARDED_FOR, path);
    }
    if let Entry::Vacant(vacant) = headers.entry(FORWARDED_PROTO) {
        vacant.insert(HeaderValue::from_static("http"));
    }
    if let (Some(host), false) = (headers.get(header::HOST).cloned(), headers.contains_key(FORWARDED_HOST)) {
        headers.insert(FORWARDED_HOST, host);
    }
}

/// What [`to_sandbox`] says of the client's connection, unless the client or a proxy before it has said something else.
pub(super) fn came_over_tls(headers: &mut HeaderMap) {
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("https"));
}

/// Makes a sandbox's head one for the client.
pub(super) fn to_client(status: StatusCode, headers: &mut HeaderMap) {
    let protocol = headers.get(header::UPGRADE).cloned();
    strip_hop_by_hop(headers);
    if status == StatusCode::SWITCHING_PROTOCOLS {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            headers.insert(header::UPGRADE, protocol);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn head(lines: &[(&str, &str)]) -> Parts {
        let mut request = Request::get("/a?b=c").header("host", "3000-abcd.boxes.example");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn left(mut head: Parts, port: ToPort) -> Vec<String> {
        to_sandbox(&mut head, port, "10.0.0.7".parse().unwrap(), false);
        let line =
            |(name, value): (&HeaderName, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap());
        head.headers.iter().map(line).collect()
    }

    const ALL: &[(&str, &str)] = &[
        ("connection", "close, x-mine,"),
        ("connection", "host, content-length"),
        ("x-mine", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-authorization", "Basic x"),
        ("te", "trailers, deflate"),
        ("expect", "100-continue"),
        ("x-api-key", "e2b_0"),
        ("x-access-token", "token"),
        ("e2b-traffic-access-token", "traffic"),
        ("e2b-sandbox-id", "abcd"),
        ("e2b-sandbox-port", "3000"),
        ("authorization", "Basic dXNlcjo="),
        ("cookie", "a=1"),
        ("cookie", "b=2"),
        ("content-length", "5"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-proto", "https"),
    ];

    #[test]
    fn the_agent_gets_its_token_and_no_key() {
        let mut lines = left(head(ALL), ToPort::Agent);
        lines.sort();
        assert_eq!(
            lines,
            [
                "authorization: Basic dXNlcjo=",
                "content-length: 5",
                "cookie: a=1; b=2",
                "host: 3000-abcd.boxes.example",
                "te: trailers",
                "x-access-token: token",
            ]
            .map(str::to_owned)
        );
    }

    #[test]
    fn a_tenants_program_gets_no_token_and_learns_who_calls() {
        let mut lines = left(head(ALL), ToPort::Tenant);
        lines.sort();
        assert_eq!(
            lines,
            [
                "authorization: Basic dXNlcjo=",
                "content-length: 5",
                "cookie: a=1; b=2",
                "host: 3000-abcd.boxes.example",
                "te: trailers",
                "x-forwarded-for: 192.0.2.1, 10.0.0.7",
                "x-forwarded-host: 3000-abcd.boxes.example",
                "x-forwarded-proto: https",
            ]
            .map(str::to_owned)
        );
    }

    #[test]
    fn upgrades_pass_but_not_to_http2_or_to_the_agent() {
        let websocket = || head(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        let lines = left(websocket(), ToPort::Tenant);
        assert!(
            lines.contains(&"connection: upgrade".into()) && lines.contains(&"upgrade: websocket".into())
        );
        assert_eq!(left(websocket(), ToPort::Agent), ["host: 3000-abcd.boxes.example"]);
        let unasked = head(&[("upgrade", "websocket")]);
        let settings = ("http2-settings", "AAMAAABkAAQCAAAAAAIAAAAA");
        let h2c = head(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), settings]);
        for refused in [unasked, h2c] {
            let lines = left(refused, ToPort::Tenant);
            assert!(
                !lines.iter().any(|line| line.contains("upgrade") || line.contains("http2")),
                "{lines:?}"
            );
        }
    }

    #[test]
    fn the_target_is_the_path_and_the_authority_the_host() {
        let request = Request::get("http://Boxes.example:80/x/../y?q").version(Version::HTTP_2).body(());
        let mut head = request.unwrap().into_parts().0;
        to_sandbox(&mut head, ToPort::Tenant, "::ffff:10.0.0.7".parse().unwrap(), true);
        assert_eq!(head.uri, "/x/../y?q");
        assert_eq!(head.headers[header::HOST], "Boxes.example:80");
        assert_eq!(head.headers[header::TRANSFER_ENCODING], "chunked");
        assert_eq!(head.headers[FORWARDED_FOR], "10.0.0.7");
    }
}
