//! Registries that want to know who asks.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::server::{Registry, Server};
use super::{World, image, named, pull, quick, registries, registries_with};
use crate::registry::{CredentialFiles, Registries};

/// What a world's owner is known by at `host`.
fn logged_in(world: &World, host: &str) -> Registries {
    let file: PathBuf = world.dir.path().join("auth/config.json");
    CredentialFiles::find(Some(&file)).store(host, "me", "secret").unwrap();
    registries_with("", &file, quick())
}

fn basic() -> String {
    format!("Basic {}", STANDARD.encode("me:secret"))
}

#[test]
fn a_name_and_a_password_are_said_when_they_are_asked_for() {
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], |asked, reply| {
        if asked.header("authorization") == Some(&basic()) {
            return Ok(false);
        }
        reply.status("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=\"x\"")], b"").map(|()| true)
    });
    let name = named(&server, "x:v1");
    pull(&world, &logged_in(&world, server.host()), &name).unwrap();
    assert_eq!(server.asked()[0], server.asked()[1], "the first request is without the password");
    let stranger = pull(&world, &registries(quick()), &name).unwrap_err().to_string();
    assert!(stranger.contains(&format!("image-builder login {}", server.host())), "{stranger}");

    let registries = registries(quick());
    registries.check_login(server.host(), "me", "secret", &super::console()).unwrap();
    let error =
        registries.check_login(server.host(), "me", "other", &super::console()).unwrap_err().to_string();
    assert!(error.contains("does not take") && !error.contains("other"), "{error}");
}

/// A token service and a registry that takes each of its tokens for some requests only.
#[test]
fn a_token_is_fetched_and_fetched_again_when_it_has_expired() {
    const USES: usize = 2;
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let tokens = Arc::new(AtomicUsize::new(0));
    let issued = tokens.clone();
    let service = Server::answering(move |asked, reply| {
        assert_eq!(asked.header("authorization"), Some(basic().as_str()));
        assert!(asked.query.contains("service=reg%26x"), "{}", asked.query);
        assert!(asked.query.contains("scope=repository%3Asome%2Fx%3Apull"), "{}", asked.query);
        let token = issued.fetch_add(1, Ordering::SeqCst) + 1;
        reply.status("200 OK", &[], format!("{{\"token\":\"t{token}\",\"expires_in\":1}}").as_bytes())
    });
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"reg&x\"", service.host());
    let (latest, used) = (tokens.clone(), Mutex::new((0, 0)));
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |asked, reply| {
        let token = asked
            .header("authorization")
            .and_then(|text| text.strip_prefix("Bearer t")?.parse::<usize>().ok());
        let mut used = used.lock().unwrap();
        if let Some(token) = token.filter(|token| *token == latest.load(Ordering::SeqCst)) {
            let uses = if used.0 == token { used.1 + 1 } else { 1 };
            *used = (token, uses);
            if uses <= USES {
                return Ok(false);
            }
        }
        reply.status("401 Unauthorized", &[("WWW-Authenticate", &challenge)], b"").map(|()| true)
    });
    let registries = logged_in(&world, server.host());
    pull(&world, &registries, &named(&server, "some/x:v1")).unwrap();
    assert_eq!(tokens.load(Ordering::SeqCst), 2, "three requests, and two for each token");
}

#[test]
fn a_refresh_token_is_changed_for_a_token() {
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let service = Server::answering(|asked, reply| {
        let body = String::from_utf8(reply.take_body()).unwrap();
        assert_eq!((asked.method.as_str(), asked.header("authorization")), ("POST", None));
        assert!(
            body.contains("grant_type=refresh%5Ftoken") && body.contains("refresh_token=r%26t"),
            "{body}"
        );
        reply.status("200 OK", &[], b"{\"access_token\":\"granted\"}")
    });
    let challenge = format!("Bearer realm=\"http://{}/token\"", service.host());
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |asked, reply| {
        if asked.header("authorization") == Some("Bearer granted") {
            return Ok(false);
        }
        reply.status("401 Unauthorized", &[("WWW-Authenticate", &challenge)], b"").map(|()| true)
    });
    let file = world.dir.path().join("config.json");
    let auths = serde_json::json!({"auths": {server.host(): {"identitytoken": "r&t"}}});
    std::fs::write(&file, auths.to_string()).unwrap();
    pull(&world, &registries_with("", &file, quick()), &named(&server, "x:v1")).unwrap();
}

/// A registry that is never content is left after the second time.
#[test]
fn unauthorized_is_no_loop() {
    let world = World::new();
    let service = Server::answering(|_, reply| reply.status("200 OK", &[], b"{\"token\":\"t\"}"));
    let realm = service.host().to_owned();
    for (challenge, most) in [
        (format!("Bearer realm=\"http://{realm}/token\""), 3),
        ("Basic realm=\"x\"".to_owned(), 2),
        ("Digest realm=\"x\"".to_owned(), 1),
        (String::new(), 1),
    ] {
        let told = challenge.clone();
        let server = Server::answering(move |_, reply| {
            reply.status("401 Unauthorized", &[("WWW-Authenticate", &told)], b"")
        });
        let registries = logged_in(&world, server.host());
        let error = pull(&world, &registries, &named(&server, "x:v1")).unwrap_err().to_string();
        assert!(error.contains("401"), "{challenge}: {error}");
        assert_eq!(server.asked().len(), most, "{challenge}: {:?}", server.asked());
    }
    world.assert_clean();
}

#[test]
fn a_token_service_is_not_asked_anywhere() {
    let world = World::new();
    for (realm, reason) in [
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://example.com/", "neither http nor https"),
        ("gopher://127.0.0.1:70/", "neither http nor https"),
        ("not an address", "no address"),
        ("http://192.0.2.1/token", "would get the password without TLS"),
    ] {
        let challenge = format!("Bearer realm=\"{realm}\"");
        let server = Server::answering(move |_, reply| {
            reply.status("401 Unauthorized", &[("WWW-Authenticate", &challenge)], b"")
        });
        let registries = logged_in(&world, server.host());
        let error = pull(&world, &registries, &named(&server, "x:v1")).unwrap_err().to_string();
        assert!(error.contains(reason), "{realm}: {error}");
    }
    for (answer, reason) in [
        ("{}".to_owned(), "holds no token"),
        ("{\"token\":\"\"}".to_owned(), "holds no token"),
        ("{\"token\":\"a\\nb\"}".to_owned(), "cannot stand in a header"),
        ("[".repeat(100_000), "holds no token"),
        (" ".repeat(2 << 20), "at most"),
    ] {
        let service = Server::answering(move |_, reply| reply.status("200 OK", &[], answer.as_bytes()));
        let challenge = format!("Bearer realm=\"http://{}/token\"", service.host());
        let server = Server::answering(move |_, reply| {
            reply.status("401 Unauthorized", &[("WWW-Authenticate", &challenge)], b"")
        });
        let error = pull(&world, &registries(quick()), &named(&server, "x:v1")).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    world.assert_clean();
}

#[test]
fn where_a_redirect_leads_nobody_is_told_the_password() {
    let world = World::new();
    let (top, _) = image(&world.theirs, &oci::host_platform().architecture().to_string());
    let told = Arc::new(Mutex::new(Vec::new()));
    let (heard, registry) = (told.clone(), Registry::new(&world.theirs, &[]));
    let storage = Server::answering(move |asked, reply| {
        heard.lock().unwrap().push(asked.header("authorization").map(str::to_owned));
        registry.answer(asked, reply)
    });
    let elsewhere = storage.host().to_owned();
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |asked, reply| {
        let status = match asked.header("authorization") {
            None => {
                return reply
                    .status("401 Unauthorized", &[("WWW-Authenticate", "Basic")], b"")
                    .map(|()| true);
            }
            Some(_) if asked.path.contains("/blobs/") => "307 Temporary Redirect",
            Some(_) => return Ok(false),
        };
        let location = format!("http://{elsewhere}{}?signed=1", asked.path);
        reply.status(status, &[("Location", &location)], b"").map(|()| true)
    });
    pull(&world, &logged_in(&world, server.host()), &named(&server, "x:v1")).unwrap();
    let told = told.lock().unwrap();
    assert!(!told.is_empty() && told.iter().all(Option::is_none), "{told:?}");
}
