//! Pushing to registries that are good, forgetful, or elsewhere.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oci::Store;

use super::server::{Registry, Server};
use super::{World, bulky, console, image, index, named, pull, quick, registries, registries_with};
use crate::registry::CredentialFiles;

const LAYER: usize = 5 << 20;

#[test]
fn an_image_goes_as_it_is_and_its_blobs_go_once() {
    let world = World::new();
    let (top, images) = index(&world.ours);
    let server = Server::of(&world.theirs, &[]);
    let registries = registries(quick());
    let name = named(&server, "team/app:1");
    let report = registries.push(&world.ours, &top, &name, &console()).unwrap();
    assert_eq!(
        (report.digest, report.sent, report.existed),
        (top.digest().clone(), 3, 0),
        "two configs, one layer"
    );
    let again = registries.push(&world.ours, &top, &name, &console()).unwrap();
    assert_eq!((again.sent, again.existed, again.bytes), (0, 3, 0));
    for blob in images.iter().chain([&top]) {
        assert!(world.theirs.has_blob(blob));
    }
    // Back again, into an empty store, with the digest that it had.
    let other = World::new();
    let (pulled, _) = registries.pull(&other.ours, &name, &super::Platforms::All, &console()).unwrap();
    assert_eq!(pulled.digest(), top.digest());

    let wrong = named(&server, &format!("x@{}", images[0].digest()));
    let error = registries.push(&world.ours, &top, &wrong, &console()).unwrap_err().to_string();
    assert!(error.contains("push it to a tag"), "{error}");
    std::fs::remove_file(world.ours.blob_path(images[0].digest()).unwrap()).unwrap();
    let error = registries.push(&world.ours, &top, &name, &console()).unwrap_err().to_string();
    assert!(error.contains("--platform all"), "{error}");
}

#[test]
fn an_upload_that_broke_off_goes_on_where_it_ended() {
    for remembers in [true, false] {
        let world = World::new();
        let (top, layer) = bulky(&world.ours, LAYER);
        let registry = Registry::new(&world.theirs, &[]);
        let parts = AtomicUsize::new(0);
        let server = Server::answering(move |asked, reply| {
            if asked.method == "PATCH" && parts.fetch_add(1, Ordering::SeqCst) == 0 {
                let mut half = vec![0; LAYER / 2];
                reply.body.read_exact(&mut half)?;
                registry.keep(&asked.path, &half);
                // The connection ends with the body unread.
                return Ok(());
            }
            if asked.method == "GET" && !remembers {
                return reply.status("404 Not Found", &[], b"");
            }
            registry.answer(asked, reply)
        });
        let report = registries(quick()).push(&world.ours, &top, &named(&server, "x:1"), &console()).unwrap();
        assert_eq!(report.sent, 2);
        assert!(world.theirs.has_blob(&layer));
        assert_eq!(server.count("PATCH"), 2);
        assert_eq!(server.count("POST"), if remembers { 2 } else { 3 }, "{:?}", server.asked());
    }
}

#[test]
fn blobs_of_another_repository_are_mounted() {
    let world = World::new();
    let (top, layer) = image(&world.ours, "amd64");
    for refuses in [false, true] {
        let registry = Registry::new(&world.theirs, &[]);
        let server = Server::answering(move |asked, reply| match asked.query.contains("mount=") {
            true if !refuses => {
                assert!(asked.query.contains("from=base%2Fos"), "{}", asked.query);
                reply.status("201 Created", &[("Location", "/v2/")], b"")
            }
            _ => registry.answer(asked, reply),
        });
        world.ours.tag(&named(&server, "base/os:1").canonical(), &top).unwrap();
        let report =
            registries(quick()).push(&world.ours, &top, &named(&server, "app:1"), &console()).unwrap();
        match refuses {
            false => assert_eq!((report.mounted, report.sent), (2, 0)),
            true => assert_eq!((report.mounted, report.sent), (0, 2)),
        }
        assert_eq!(world.theirs.has_blob(&layer), refuses);
    }
}

#[test]
fn an_upload_elsewhere_goes_without_the_password() {
    let world = World::new();
    let (top, layer) = bulky(&world.ours, LAYER);
    let told = Arc::new(Mutex::new(Vec::new()));
    let storage_store = Store::open_or_create(&world.dir.path().join("storage")).unwrap();
    let (heard, registry) = (told.clone(), Registry::new(&storage_store, &[]));
    let storage = Server::answering(move |asked, reply| {
        heard.lock().unwrap().push(asked.header("authorization").map(str::to_owned));
        if asked.method == "POST" {
            reply.status("404 Not Found", &[], b"")
        } else {
            registry.answer(asked, reply)
        }
    });
    let elsewhere = storage.host().to_owned();
    let server = Server::with_quirk(&world.theirs, &[], move |asked, reply| {
        if asked.header("authorization").is_none() {
            return reply.status("401 Unauthorized", &[("WWW-Authenticate", "Basic")], b"").map(|()| true);
        }
        if asked.method != "POST" {
            return Ok(false);
        }
        reply
            .status("202 Accepted", &[("Location", &format!("http://{elsewhere}/up?x=1"))], b"")
            .map(|()| true)
    });
    let file = world.dir.path().join("config.json");
    CredentialFiles::find(Some(&file)).store(server.host(), "me", "secret").unwrap();
    let registries = registries_with("", &file, super::Limits { attempts: 1, ..quick() });
    // The storage does not know the upload: it is enough that it was asked, and how.
    registries.push(&world.ours, &top, &named(&server, "x:1"), &console()).unwrap_err();
    let told = told.lock().unwrap();
    assert!(!told.is_empty() && told.iter().all(Option::is_none), "{told:?}");
    assert!(!world.theirs.has_blob(&layer));
}

#[test]
fn a_registry_that_takes_nothing_is_left() {
    let world = World::new();
    let (top, _) = bulky(&world.ours, LAYER * 4);
    let registry = Registry::new(&world.theirs, &[]);
    let server = Server::answering(move |asked, reply| {
        if asked.method == "PATCH" {
            // Until the client goes away: its data stays in the buffers of the kernel.
            return reply.stream.set_read_timeout(None).and_then(|()| loop_until_gone(reply.stream));
        }
        registry.answer(asked, reply)
    });
    let limits = super::Limits { window: Duration::from_millis(300), attempts: 1, ..quick() };
    let error = registries(limits).push(&world.ours, &top, &named(&server, "x:1"), &console()).unwrap_err();
    assert!(error.to_string().contains("no answer within 0.3 s"), "{error}");
}

/// Waits for the end of the connection without reading from it.
fn loop_until_gone(stream: &std::net::TcpStream) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    poll(&mut [PollFd::new(stream, PollFlags::RDHUP)], None)?;
    Ok(())
}

#[test]
fn a_registry_that_keeps_another_manifest_is_found_out() {
    let world = World::new();
    let (top, _) = image(&world.ours, "amd64");
    let lie = oci::Hasher::digest_of(b"other").to_string();
    let server = Server::with_quirk(&world.theirs, &[], move |asked, reply| {
        if asked.method != "PUT" || !asked.path.contains("/manifests/") {
            return Ok(false);
        }
        reply.take_body();
        reply.status("201 Created", &[("Docker-Content-Digest", &lie)], b"").map(|()| true)
    });
    let error = registries(quick()).push(&world.ours, &top, &named(&server, "x:1"), &console()).unwrap_err();
    assert!(error.to_string().contains("the registry keeps"), "{error}");
    let denied = Server::with_quirk(&world.theirs, &[], |asked, reply| {
        if asked.method != "POST" {
            return Ok(false);
        }
        reply
            .status("403 Forbidden", &[], b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"read only\"}]}")
            .map(|()| true)
    });
    let (other, _) = bulky(&world.ours, 1000);
    let error =
        registries(quick()).push(&world.ours, &other, &named(&denied, "x:1"), &console()).unwrap_err();
    assert!(error.to_string().contains("DENIED read only"), "{error}");
    assert!(pull(&world, &registries(quick()), &named(&denied, "x:1")).is_err());
}
