//! Any head of a request: it goes to one valid port of one valid sandbox only when all that it says names that one.
//!
//! Input: one byte for the version, then lines, each with a byte that says what it is: the target, `Host`, the id's header,
//! the port's.
#![no_main]

use http::header::HOST;
use http::request::{Builder, Parts};
use http::{HeaderName, HeaderValue, Request, Version};
use libfuzzer_sys::fuzz_target;
use tiffin_gateway::proxy::route::{Route, SANDBOX_ID, SANDBOX_PORT, Target, route};

/// The configured domain.
const DOMAIN: &str = "boxes.example";

fuzz_target!(|input: &[u8]| {
    let Some(head) = head(input) else { return };
    match route(&head, DOMAIN) {
        Route::Sandbox(target) => {
            check(&head, &target);
            only_one(&head, &target);
        }
        Route::Control => {
            assert!(values(&head, &SANDBOX_ID).is_empty() && values(&head, &SANDBOX_PORT).is_empty());
            // Only the two headers together make it a sandbox's.
            let (id, port) = ((SANDBOX_ID, "abc123"), (SANDBOX_PORT, "3000"));
            let expected = Target { id: "abc123".parse().unwrap(), port: 3000 };
            assert_eq!(route(&with(&head, &[id.clone(), port.clone()]), DOMAIN), Route::Sandbox(expected));
            bad(&with(&head, &[id]));
            bad(&with(&head, &[port]));
        }
        // It goes into the answer and the log.
        Route::Bad(reason) => assert!(!reason.is_empty() && !reason.contains(char::is_control), "{reason:?}"),
    }
});

fn head(input: &[u8]) -> Option<Parts> {
    let (version, lines) = input.split_first()?;
    let version = match version % 3 {
        0 => Version::HTTP_10,
        1 => Version::HTTP_11,
        _ => Version::HTTP_2,
    };
    let mut request = Request::builder().version(version);
    for line in lines.split(|byte| *byte == b'\n') {
        let (kind, value) = line.split_first()?;
        request = match kind {
            b'T' => request.uri(value),
            b'H' => request.header(HOST, value),
            b'I' => request.header(SANDBOX_ID, value),
            b'P' => request.header(SANDBOX_PORT, value),
            _ => return None,
        };
    }
    Some(request.body(()).ok()?.into_parts().0)
}

fn values<'a>(head: &'a Parts, name: &HeaderName) -> Vec<&'a [u8]> {
    head.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect()
}

/// It is valid, and nothing in the head contradicts it.
fn check(head: &Parts, target: &Target) {
    assert!(target.port != 0);
    assert_eq!(target.id.as_str().parse().as_ref(), Ok(&target.id));
    let (id, port) = (target.id.to_string(), target.port.to_string());
    let (ids, ports) = (values(head, &SANDBOX_ID), values(head, &SANDBOX_PORT));
    for (values, named) in [(&ids, &id), (&ports, &port)] {
        assert!(values.is_empty() || *values == [named.as_bytes()], "{values:?} went to {named}");
    }
    let hosts = values(head, &HOST);
    assert!(hosts.len() <= 1, "{hosts:?}");
    let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    if let (Some(authority), [host]) = (authority, &hosts[..]) {
        assert!(authority.eq_ignore_ascii_case(host), "{authority:?} and {host:?}");
    }
    let host = authority.or(hosts.first().copied()).unwrap_or_default().to_ascii_lowercase();
    let name = host.split(|byte| *byte == b':').next().unwrap_or_default();
    let name = name.strip_suffix(b".").unwrap_or(name);
    let is_below = name.ends_with(b".boxes.example") || name.ends_with(b".localhost");
    let label = name.strip_prefix(format!("{port}-{id}").as_bytes()).and_then(|rest| rest.first());
    let is_labelled = is_below && matches!(label, Some(b'.' | b'-'));
    assert!(is_labelled || (!ids.is_empty() && !ports.is_empty()), "{host:?} names {target:?}");
}

/// Written as the SDKs write it, it is the same target; and nothing else can be named beside it.
fn only_one(head: &Parts, target: &Target) {
    let (id, port) = (target.id.to_string(), target.port.to_string());
    let get = |host: &str| Request::get("/").header(HOST, host);
    let expected = Route::Sandbox(target.clone());
    let (by_id, by_port) = ((SANDBOX_ID, id.as_str()), (SANDBOX_PORT, port.as_str()));
    let labelled = parts(get(&format!("{port}-{id}.{DOMAIN}")));
    assert_eq!(route(&labelled, DOMAIN), expected);
    assert_eq!(route(&with(&labelled, &[by_id.clone(), by_port.clone()]), DOMAIN), expected);
    assert_eq!(route(&with(&parts(get("127.0.0.1")), &[by_id, by_port]), DOMAIN), expected);

    let (other_id, other_port) =
        (format!("0{}", &id[..id.len() - 1]), (target.port ^ 0x4000).max(1).to_string());
    for head in [head, &labelled] {
        if other_id != id {
            bad(&with(head, &[(SANDBOX_ID, &other_id)]));
        }
        bad(&with(head, &[(SANDBOX_PORT, &other_port)]));
    }
    bad(&with(&labelled, &[(HOST, "localhost")]));
}

fn bad(head: &Parts) {
    assert!(matches!(route(head, DOMAIN), Route::Bad(_)), "{head:?}");
}

fn parts(request: Builder) -> Parts {
    request.body(()).unwrap().into_parts().0
}

/// The head with more headers.
fn with(head: &Parts, headers: &[(HeaderName, &str)]) -> Parts {
    let mut head = head.clone();
    for (name, value) in headers {
        head.headers.append(name, HeaderValue::from_str(value).unwrap());
    }
    head
}
