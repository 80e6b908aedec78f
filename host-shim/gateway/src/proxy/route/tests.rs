use super::*;
use http::Request;
use proptest::prelude::*;

const DOMAIN: &str = "boxes.example";

fn route_of(host: &str, headers: &[(&str, &str)]) -> Route {
    let mut request = Request::get("/").header("host", host);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    route(&request.body(()).unwrap().into_parts().0, DOMAIN)
}

fn to(id: &str, port: u16) -> Route {
    Route::Sandbox(Target { id: id.parse().unwrap(), port })
}

#[test]
fn labels_name_a_port_of_a_sandbox() {
    for host in [
        "3000-abc123.boxes.example",
        "3000-abc123-6532622b.boxes.example",
        "3000-ABC123.Boxes.EXAMPLE",
        "3000-abc123.boxes.example.",
        "3000-abc123.boxes.example:8443",
        "3000-abc123.boxes.example.:443",
        "3000-abc123.boxes.example:",
        "3000-abc123.eu.boxes.example",
        "3000-abc123.localhost:3000",
    ] {
        assert_eq!(route_of(host, &[]), to("abc123", 3000), "{host}");
    }
    assert_eq!(route_of("65535-abcd.boxes.example", &[]), to("abcd", 65535));
    assert_eq!(route_of("1-0000.boxes.example", &[]), to("0000", 1));
}

#[test]
fn headers_name_a_port_of_a_sandbox_behind_every_other_host() {
    let headers = [("e2b-sandbox-id", "abc123"), ("E2b-Sandbox-Port", "49983")];
    for host in [
        "localhost",
        "localhost:3000",
        "LOCALHOST.",
        "127.0.0.1:3000",
        "[::1]",
        "[::1]:3000",
        "sandbox.boxes.example",
        "sandbox.e2b.app",
        "gateway:3000",
        "boxes.example",
        "",
    ] {
        assert_eq!(route_of(host, &headers), to("abc123", 49983), "{host}");
        assert_eq!(route_of(host, &[]), Route::Control, "{host}");
    }
    // Agreeing is allowed, with either or both.
    let host = "49983-abc123.boxes.example";
    assert_eq!(route_of(host, &headers), to("abc123", 49983));
    assert_eq!(route_of(host, &headers[..1]), to("abc123", 49983));
    assert_eq!(route_of(host, &headers[1..]), to("abc123", 49983));
}

#[test]
fn other_hosts_are_the_control_api() {
    for host in [
        "api.boxes.example",
        "boxes.example",
        "a-b.boxes.example",
        "x3000-abc123.boxes.example",
        "3000.boxes.example",
        "-abc123.boxes.example",
        // Not below our domain, whatever its label says.
        "3000-abc123.evil.example",
        "3000-abc123.notboxes.example",
        "3000-abc123.boxes.example.evil",
        "3000-abc123",
        "127.0.0.1",
        "[::ffff:127.0.0.1]:80",
    ] {
        assert_eq!(route_of(host, &[]), Route::Control, "{host}");
    }
}

#[test]
fn tricks_are_refused() {
    for host in [
        "0-abc123.boxes.example",
        "65536-abc123.boxes.example",
        "080-abc123.boxes.example",
        "99999999999999999999-abc123.boxes.example",
        "3000-abc.boxes.example",
        "3000-.boxes.example",
        "3000--abc123.boxes.example",
        "3000-abc123-.boxes.example",
        "3000-abc123-x-y.boxes.example",
        "3000-abc_123.boxes.example",
        "user@localhost",
        "local host",
        "localhost/..",
        "localhost:0",
        "localhost:65536",
        "localhost:+80",
        "localhost:80:80",
        "::1",
        "[::1",
        "[::1]x",
        "[localhost]",
        "3000-abc123.boxes.example,localhost",
    ] {
        assert!(matches!(route_of(host, &[]), Route::Bad(_)), "{host}: {:?}", route_of(host, &[]));
    }
    let (id, port) = (("e2b-sandbox-id", "abc123"), ("e2b-sandbox-port", "3000"));
    for headers in [
        &[id][..],
        &[port],
        &[id, id, port],
        &[id, port, port],
        &[id, ("e2b-sandbox-port", "0")],
        &[id, ("e2b-sandbox-port", "65536")],
        &[id, ("e2b-sandbox-port", "+80")],
        &[id, ("e2b-sandbox-port", "-1")],
        &[id, ("e2b-sandbox-port", "80 ")],
        &[id, ("e2b-sandbox-port", "")],
        &[id, ("e2b-sandbox-port", "80,81")],
        &[port, ("e2b-sandbox-id", "")],
        &[port, ("e2b-sandbox-id", "../abc123")],
        &[port, ("e2b-sandbox-id", "ABC123")],
        &[port, ("e2b-sandbox-id", "abc123,def456")],
        &[port, ("e2b-sandbox-id", "abc123\u{e9}")],
    ] {
        assert!(matches!(route_of("localhost", headers), Route::Bad(_)), "{headers:?}");
    }
    for headers in [[("e2b-sandbox-id", "other1"), port], [id, ("e2b-sandbox-port", "3001")]] {
        let refused = route_of("3000-abc123.boxes.example", &headers);
        assert!(matches!(refused, Route::Bad(_)), "{headers:?}");
    }
}

#[test]
fn a_request_names_one_host() {
    let head = |request: http::request::Builder| request.body(()).unwrap().into_parts().0;
    let bad = |request| assert!(matches!(route(&head(request), DOMAIN), Route::Bad(_)));
    bad(Request::get("/"));
    bad(Request::get("/").header("host", "localhost").header("host", "localhost"));
    bad(Request::get("http://3000-abc123.boxes.example/").header("host", "3000-def456.boxes.example"));
    let absolute =
        Request::get("http://3000-abc123.boxes.example/").header("host", "3000-abc123.boxes.example");
    assert_eq!(route(&head(absolute), DOMAIN), to("abc123", 3000));
    let second = Request::get("http://3000-abc123.boxes.example/").version(Version::HTTP_2);
    assert_eq!(route(&head(second), DOMAIN), to("abc123", 3000));
    let ancient = Request::get("/").version(Version::HTTP_10);
    assert_eq!(route(&head(ancient), DOMAIN), Route::Control);
}

/// Text like what is meant, and like what is not.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9]{4,20}", "[a-zA-Z0-9.:@\\[\\]-]{0,30}", "[1-9][0-9]{0,5}", "[ -~]{0,12}"]
}

proptest! {
    #[test]
    fn what_is_written_is_what_is_routed(
        id in "[a-z0-9]{4,40}",
        port in 1_u16..,
        client in proptest::option::of("[a-z0-9]{1,8}"),
        upper in any::<bool>(),
        dot in any::<bool>(),
        with_headers in any::<bool>(),
    ) {
        let client = client.map(|client| format!("-{client}")).unwrap_or_default();
        let mut host = format!("{port}-{id}{client}.{DOMAIN}");
        if upper {
            host.make_ascii_uppercase();
        }
        if dot {
            host.push('.');
        }
        let text = port.to_string();
        let headers = [("e2b-sandbox-id", id.as_str()), ("e2b-sandbox-port", text.as_str())];
        let headers = if with_headers { &headers[..] } else { &[] };
        prop_assert_eq!(route_of(&host, headers), to(&id, port));
    }

    #[test]
    fn nothing_is_routed_that_only_one_of_them_names(
        label in piece(),
        domain in prop_oneof![Just(DOMAIN.to_owned()), Just("localhost".to_owned()), piece()],
        id in proptest::option::of(piece()),
        port in proptest::option::of(piece()),
    ) {
        let host = format!("{label}.{domain}");
        let mut request = Request::get("/").header("host", &host);
        if let Some(id) = &id {
            request = request.header("e2b-sandbox-id", id);
        }
        if let Some(port) = &port {
            request = request.header("e2b-sandbox-port", port);
        }
        if let Route::Sandbox(target) = route(&request.body(()).unwrap().into_parts().0, DOMAIN) {
            let by_label = host.to_ascii_lowercase().starts_with(&format!("{}-{}", target.port, target.id));
            let by_headers = id.is_some() && port.is_some();
            prop_assert!(by_label || by_headers);
            prop_assert!(id.is_none_or(|id| id == target.id.as_str()));
            prop_assert!(port.is_none_or(|port| port == target.port.to_string()));
        }
    }
}
