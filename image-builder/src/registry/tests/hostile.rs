//! Registries that lie, stall, break off and lead astray.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use oci::{Hasher, MediaType};
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue, LOCATION};

use super::super::authority::Authority;
use super::super::configuration::{Endpoint, Transport};
use super::super::limits::MAX_MANIFEST;
use super::super::session::{Http, Session};
use super::server::{Asked, Reply, Server};
use super::{World, bulky, console, image, named, pull, quick, registries};

const LAYER: usize = 3 << 20;

/// The error of a pull of an image with a layer of [`LAYER`] bytes from a registry that answers for the layer with `quirk`.
fn layer_error(
    limits: super::Limits,
    quirk: impl Fn(&Asked, &mut Reply<'_>, &[u8]) -> std::io::Result<()> + Send + Sync + 'static,
) -> String {
    let world = World::new();
    let server = layer_server(&world, quirk);
    let error = pull(&world, &registries(limits), &named(&server, "x:v1")).unwrap_err().to_string();
    world.assert_clean();
    assert!(error.contains(server.host()), "{error}");
    error
}

fn layer_server(
    world: &World,
    quirk: impl Fn(&Asked, &mut Reply<'_>, &[u8]) -> std::io::Result<()> + Send + Sync + 'static,
) -> Server {
    let (top, layer) = bulky(&world.theirs, LAYER);
    let bytes = std::fs::read(world.theirs.blob_path(layer.digest()).unwrap()).unwrap();
    let path = format!("/v2/x/blobs/{}", layer.digest());
    Server::with_quirk(&world.theirs, &[("v1", &top)], move |asked, reply| {
        if asked.path != path {
            return Ok(false);
        }
        quirk(asked, reply, &bytes).map(|()| true)
    })
}

#[test]
fn other_bytes_are_not_kept() {
    let error = layer_error(quick(), |_, reply, bytes| {
        let mut bytes = bytes.to_vec();
        bytes[12345] ^= 1;
        reply.status("200 OK", &[], &bytes)
    });
    assert!(error.contains("with the digest sha256:"), "{error}");
}

#[test]
fn a_body_ends_where_it_should() {
    let endless = layer_error(quick(), |_, reply, bytes| {
        reply.head("200 OK", &[])?;
        loop {
            reply.stream.write_all(bytes)?;
        }
    });
    assert!(endless.contains("the registry sends more"), "{endless}");
    let longer = layer_error(quick(), |_, reply, bytes| reply.status("200 OK", &[], &[bytes, b"x"].concat()));
    assert!(
        longer.contains(&format!("{LAYER} bytes expected, the registry sends {}", LAYER + 1)),
        "{longer}"
    );
    let shorter = layer_error(quick(), |asked, reply, bytes| match asked.first() {
        // Nothing more comes, however often it is asked for.
        Some(first) => {
            reply.status("206 Partial Content", &[("Content-Range", &format!("bytes {first}-"))], b"")
        }
        None => reply.status("200 OK", &[], &bytes[..LAYER - 10]),
    });
    assert!(shorter.contains(&format!("ended after {} of {LAYER} bytes", LAYER - 10)), "{shorter}");
}

#[test]
fn a_slow_drip_is_cut_off() {
    let limits = super::Limits { window: Duration::from_millis(300), attempts: 2, ..quick() };
    let error = layer_error(limits, |_, reply, bytes| {
        reply.head("200 OK", &[("Content-Length", &LAYER.to_string())])?;
        for byte in bytes.chunks(1) {
            reply.stream.write_all(byte)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    });
    assert!(error.contains("less than 32768 bytes in 0.3 s"), "{error}");
    let limits = super::Limits { answer: Duration::from_millis(300), attempts: 2, ..quick() };
    let silent = layer_error(limits, |_, reply, _| {
        // Until the client goes away.
        let _ = reply.stream.read(&mut [0]);
        Ok(())
    });
    assert!(silent.contains("no answer within 0.3 s"), "{silent}");
}

#[test]
fn what_broke_off_goes_on_where_it_ended() {
    let half = LAYER / 2 + 77;
    for ranges in [true, false] {
        let world = World::new();
        let tries = AtomicUsize::new(0);
        let server = layer_server(&world, move |asked, reply, bytes| {
            let first = asked.first().filter(|_| ranges);
            let rest = &bytes[first.unwrap_or(0)..];
            let mut headers = vec![("Content-Length", rest.len().to_string())];
            if let Some(first) = first {
                headers.push(("Content-Range", format!("bytes {first}-{}/{LAYER}", LAYER - 1)));
            }
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            reply.head(if first.is_some() { "206 Partial Content" } else { "200 OK" }, &headers)?;
            match tries.fetch_add(1, Ordering::SeqCst) {
                0 => reply.stream.write_all(&rest[..half]),
                _ => reply.stream.write_all(rest),
            }
        });
        pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap();
        assert_eq!(server.count(&format!("bytes={half}-")), 1, "{:?}", server.asked());
    }
    let other = layer_error(quick(), move |asked, reply, bytes| match asked.first() {
        None => {
            reply.head("200 OK", &[("Content-Length", &LAYER.to_string())])?;
            reply.stream.write_all(&bytes[..half])
        }
        Some(first) => {
            let range = format!("bytes {}-{}/{LAYER}", first - 1, LAYER - 1);
            reply.status("206 Partial Content", &[("Content-Range", &range)], &bytes[first - 1..])
        }
    });
    assert!(other.contains("and on, the answer is of"), "{other}");
}

#[test]
fn a_connection_that_breaks_again_and_again_ends_the_attempts() {
    let world = World::new();
    let server = layer_server(&world, |asked, reply, bytes| {
        let first = asked.first().unwrap_or(0);
        let range = format!("bytes {first}-{}/{LAYER}", LAYER - 1);
        let status = if first > 0 { "206 Partial Content" } else { "200 OK" };
        reply.head(status, &[("Content-Length", &(LAYER - first).to_string()), ("Content-Range", &range)])?;
        reply.stream.write_all(&bytes[first..first + 1])
    });
    let error = pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap_err().to_string();
    assert!(error.contains("it broke off"), "{error}");
    assert_eq!(server.count("/blobs/").saturating_sub(1), 5, "{:?}", server.asked());
    world.assert_clean();
}

#[test]
fn redirects_lead_to_http_alone_and_not_in_circles() {
    for (location, reason) in [
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://example.com/x", "neither http nor https"),
        ("data:,x", "neither http nor https"),
        ("http://user:pw@example.com/", "holds a password"),
        ("http://[", "no address"),
        ("/v2/x/blobs/loop", "more than 5 redirects"),
        ("", "more than 5 redirects"),
    ] {
        let error = match location.starts_with('/') {
            true => {
                let world = World::new();
                let server = Server::answering(|asked, reply| {
                    reply.status("307 Temporary Redirect", &[("Location", &asked.path)], b"")
                });
                pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap_err().to_string()
            }
            false => layer_error(quick(), |_, reply, _| {
                reply.status("307 Temporary Redirect", &[("Location", location)], b"")
            }),
        };
        assert!(error.contains(reason), "{location}: {error}");
    }
    let http = Http::new(quick()).unwrap();
    let console = console();
    let led = |transport, from: &str, to: &'static str| {
        let endpoint = Endpoint { host: "r.example".into(), repository: "x".into(), transport };
        let session = Session::new(&http, &console, &endpoint, Authority::new(None, Vec::new())).unwrap();
        let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static(to))]);
        session
            .led_to("blob", &Url::parse(from).unwrap(), &headers)
            .map(|url| url.to_string())
            .map_err(|error| format!("{error:?}"))
    };
    let error = led(Transport::Https, "https://r.example/a", "http://r.example/b").unwrap_err();
    assert!(error.contains("from https to http"), "{error}");
    assert_eq!(led(Transport::Https, "https://r.example/a/", "b").unwrap(), "https://r.example/a/b");
    assert!(led(Transport::Https, "https://r.example/a", "https://cdn.example/b").is_ok());
    assert!(led(Transport::Http, "http://r.example/a", "http://cdn.example/b").is_ok());
}

/// Answers for the manifest `v1`, whatever else there is.
fn manifest_error(
    answer: impl Fn(&Asked, &mut Reply<'_>) -> std::io::Result<()> + Send + Sync + 'static,
) -> (String, usize) {
    let world = World::new();
    let server = Server::answering(answer);
    let error = pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap_err().to_string();
    world.assert_clean();
    (error, server.asked().len())
}

#[test]
fn huge_manifests_are_refused_before_they_are_read() {
    let (announced, _) = manifest_error(|_, reply| {
        reply.head("200 OK", &[("Content-Length", &(MAX_MANIFEST + 1).to_string())])
    });
    assert!(announced.contains("at most 4194304 expected"), "{announced}");
    let (endless, _) = manifest_error(|_, reply| {
        reply.head("200 OK", &[])?;
        loop {
            reply.stream.write_all(&[b' '; 65536])?;
        }
    });
    assert!(endless.contains("more than 4194304 bytes"), "{endless}");
}

#[test]
fn manifests_are_what_was_asked_for() {
    let world = World::new();
    let (top, _) = image(&world.theirs, "amd64");
    let other = Server::answering(|_, reply| reply.status("200 OK", &[], b"{\"schemaVersion\":2}"));
    let error = pull(&world, &registries(quick()), &named(&other, &format!("x@{}", top.digest())))
        .unwrap_err()
        .to_string();
    assert!(error.contains("sends one with the digest"), "{error}");
    let promised = Hasher::digest_of(b"other").to_string();
    let (error, _) = manifest_error(move |_, reply| {
        reply.status("200 OK", &[("Docker-Content-Digest", &promised)], b"{\"schemaVersion\":2}")
    });
    assert!(error.contains("the registry says"), "{error}");
    world.assert_clean();
}

#[test]
fn json_that_is_none_or_too_deep_is_refused() {
    for body in [
        "".to_owned(),
        "[]".to_owned(),
        "{\"mediaType\":1}".to_owned(),
        "\u{feff}{}".to_owned(),
        format!("{{\"manifests\":{}{}}}", "[".repeat(1 << 20), "]".repeat(1 << 20)),
        format!("{{\"manifests\":{}}}", "{\"a\":".repeat(1 << 19)),
    ] {
        let start: String = body.chars().take(30).collect();
        let (error, asked) = manifest_error(move |_, reply| reply.status("200 OK", &[], body.as_bytes()));
        assert!(error.contains("corrupt") || error.contains("expected"), "{start}: {error}");
        assert!(error.len() < 1000 && asked == 1, "{start}: {error}");
    }
}

#[test]
fn an_index_that_names_itself_or_another_leads_nowhere() {
    // No text has its own digest in it, so the registry has to lie about one of them.
    let named_digest = Hasher::digest_of(b"myself");
    for media_type in [MediaType::ImageManifest, MediaType::ImageIndex] {
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": MediaType::ImageIndex, "manifests": [{
            "mediaType": media_type, "digest": named_digest, "size": 300,
            "platform": {"os": "linux", "architecture": oci::host_platform().architecture()},
        }]});
        let (error, asked) =
            manifest_error(move |_, reply| reply.status("200 OK", &[], index.to_string().as_bytes()));
        match media_type {
            MediaType::ImageIndex => assert!(error.contains("not found") && asked == 1, "{error}"),
            _ => assert!(error.contains("sends one with the digest") && asked == 2, "{error}"),
        }
    }
}

#[test]
fn a_manifest_cannot_ask_for_more_than_a_disk_has() {
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MediaType::ImageManifest,
        "config": {"mediaType": MediaType::ImageConfig, "digest": Hasher::digest_of(b"c"), "size": u64::MAX / 2},
        "layers": []});
    let (error, asked) =
        manifest_error(move |_, reply| reply.status("200 OK", &[], manifest.to_string().as_bytes()));
    assert!(error.contains("are fetched") && asked == 1, "{error}");
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": MediaType::ImageManifest,
        "config": {"mediaType": MediaType::ImageConfig, "digest": format!("sha512:{}", "a".repeat(128)), "size": 3},
        "layers": []});
    let (error, asked) =
        manifest_error(move |_, reply| reply.status("200 OK", &[], manifest.to_string().as_bytes()));
    assert!(error.contains("only sha256") && asked == 1, "{error}");
}

#[test]
fn a_limit_is_waited_for_as_long_as_is_bearable() {
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let tries = AtomicUsize::new(0);
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |_, reply| {
        if tries.fetch_add(1, Ordering::SeqCst) >= 2 {
            return Ok(false);
        }
        reply.status("429 Too Many Requests", &[("Retry-After", "1")], b"").map(|()| true)
    });
    let begun = Instant::now();
    pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(2), "it waits as long as the registry says");

    let (bounded, asked) = manifest_error(|_, reply| {
        reply.status(
            "429 Too Many Requests",
            &[("Retry-After", "86400")],
            b"{\"errors\":[{\"code\":\"TOOMANYREQUESTS\"}]}",
        )
    });
    assert_eq!(asked, 1, "nobody waits for a day");
    for words in ["TOOMANYREQUESTS", "86400 s", "image-builder login", "mirror"] {
        assert!(bounded.contains(words), "{words}: {bounded}");
    }
    let (given_up, asked) =
        manifest_error(|_, reply| reply.status("429 Too Many Requests", &[], b"slow down"));
    assert_eq!(asked, 5);
    assert!(given_up.contains("slow down") && given_up.contains("Try again later"), "{given_up}");
}

#[test]
fn a_registry_that_is_down_for_a_moment_is_asked_again() {
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let tries = AtomicUsize::new(0);
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |_, reply| {
        Ok(match tries.fetch_add(1, Ordering::SeqCst) {
            0 => reply.status("503 Service Unavailable", &[], b"").map(|()| true)?,
            // Nothing at all: the connection ends.
            1 => true,
            _ => false,
        })
    });
    pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap();
    let (error, asked) = manifest_error(|_, reply| reply.status("502 Bad Gateway", &[], b"<html>x</html>"));
    assert!(error.contains("502 Bad Gateway") && !error.contains("html"), "{error}");
    assert_eq!(asked, 5);
}
