//! Registries of every kind, good and bad, in this process.

mod auth;
mod hostile;
mod push;
mod server;

use oci::layer::{Compression, LayerWriter};
use oci::{Descriptor, Hasher, Image, ImageName, MediaType, Store};
use std::path::Path;
use std::time::Duration;

use self::server::Server;
use super::configuration::Configuration;
use super::limits::Limits;
use super::{CredentialFiles, Platforms, Registries};
use crate::config::ImageConfig;
use crate::console::Console;
use crate::error::Error;

/// Attempts come right behind each other; the bounds on time are the usual ones.
fn quick() -> Limits {
    Limits { pause: Duration::from_millis(1), ..Limits::default() }
}

fn registries_with(conf: &str, auth_file: &Path, limits: Limits) -> Registries {
    let configuration = Configuration::parse(Path::new("registries.conf"), conf).unwrap();
    Registries::with(configuration, CredentialFiles::find(Some(auth_file)), limits).unwrap()
}

fn registries(limits: Limits) -> Registries {
    registries_with("", Path::new("/nonexistent/config.json"), limits)
}

fn console() -> Console {
    Console::new(true)
}

/// Two stores: what the registry serves, and ours.
struct World {
    dir: tempfile::TempDir,
    theirs: Store,
    ours: Store,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = |name: &str| Store::open_or_create(&dir.path().join(name)).unwrap();
        let (theirs, ours) = (store("theirs"), store("ours"));
        Self { dir, theirs, ours }
    }

    /// Nothing is left of a transfer that failed but blobs that are what they should be.
    fn assert_clean(&self) {
        assert!(self.ours.list().unwrap().is_empty(), "an image that did not come got a name");
        let incoming = self.ours.path().join(".incoming");
        assert_eq!(std::fs::read_dir(incoming).unwrap().count(), 0, "something half is left");
        for entry in std::fs::read_dir(self.ours.path().join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let digest = Hasher::digest_of(&std::fs::read(&path).unwrap());
            assert!(path.ends_with(digest.digest()), "{} is {digest}", path.display());
        }
    }
}

/// An image of one layer, and the layer.
fn image(store: &Store, architecture: &str) -> (Descriptor, Descriptor) {
    let writer = LayerWriter::new(store, Compression::Gzip).unwrap();
    let layer = writer.finish().unwrap();
    let config =
        ImageConfig::default().to_json("2026-01-01T00:00:00Z", std::slice::from_ref(&layer.diff_id), &[]);
    let mut config: serde_json::Value = serde_json::to_value(config).unwrap();
    config["architecture"] = architecture.into();
    let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": [layer.descriptor],
        "annotations": {"org.example": architecture},
    });
    let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
    (manifest, layer.descriptor)
}

/// An index of two images, one of them for this machine.
fn index(store: &Store) -> (Descriptor, Vec<Descriptor>) {
    let images: Vec<_> = ["amd64", "arm64"]
        .map(|architecture| {
            let (mut manifest, _) = image(store, architecture);
            manifest.set_platform(Some(oci::parse_platform(architecture).unwrap()));
            manifest
        })
        .into();
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": MediaType::ImageIndex, "manifests": images});
    (store.put_blob(MediaType::ImageIndex, index.to_string().as_bytes()).unwrap(), images)
}

/// An image whose layer is `length` bytes that do not repeat, and are no tar: only transfers look at it.
fn bulky(store: &Store, length: usize) -> (Descriptor, Descriptor) {
    let mut bytes: Vec<u8> = Vec::with_capacity(length + 8);
    let mut state = 1u64;
    while bytes.len() < length {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state ^ state >> 31).to_le_bytes());
    }
    bytes.truncate(length);
    let layer = store.put_blob(MediaType::ImageLayer, &bytes[..]).unwrap();
    let config = serde_json::json!({
        "architecture": oci::host_platform().architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
    });
    let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();
    (manifest, layer)
}

fn named(server: &Server, rest: &str) -> ImageName {
    format!("{}/{rest}", server.host()).parse().unwrap()
}

fn pull(world: &World, registries: &Registries, name: &ImageName) -> Result<Descriptor, Error> {
    registries.pull(&world.ours, name, &Platforms::Host, &console()).map(|(descriptor, _)| descriptor)
}

#[test]
fn an_image_comes_for_the_platform_that_is_asked_for() {
    let world = World::new();
    let (top, images) = index(&world.theirs);
    let server = Server::of(&world.theirs, &[("v1", &top)]);
    let registries = registries(quick());
    let name = named(&server, "some/app:v1");
    let pulled = pull(&world, &registries, &name).unwrap();
    assert!(images.iter().any(|image| image.digest() == pulled.digest()));
    std::io::copy(
        &mut Image::open(&world.ours, &pulled).unwrap().layers[0].open().unwrap(),
        &mut std::io::sink(),
    )
    .unwrap();
    for (platform, image) in ["linux/amd64", "linux/arm64/v8"].iter().zip(&images) {
        let one = Platforms::One(oci::parse_platform(platform).unwrap());
        let (one, _) = registries.pull(&world.ours, &name, &one, &console()).unwrap();
        assert_eq!(one.digest(), image.digest());
        let annotations = Image::open(&world.ours, &one).unwrap().manifest.annotations().clone().unwrap();
        assert!(platform.contains(&annotations["org.example"]));
    }
    let missing = Platforms::One(oci::parse_platform("linux/s390x").unwrap());
    let error = registries.pull(&world.ours, &name, &missing, &console()).unwrap_err().to_string();
    assert!(error.contains("linux/s390x") && error.contains("linux/amd64, linux/arm64"), "{error}");
    let (all, report) = registries.pull(&world.ours, &name, &Platforms::All, &console()).unwrap();
    assert_eq!((all.digest(), report.fetched), (top.digest(), 0), "everything had been fetched before");

    let by_digest: ImageName = named(&server, &format!("some/app@{}", images[0].digest()));
    let (one, _) = registries.pull(&world.ours, &by_digest, &Platforms::Host, &console()).unwrap();
    assert_eq!(one.digest(), images[0].digest());
    let arm = Platforms::One(oci::parse_platform("arm64").unwrap());
    let error = registries.pull(&world.ours, &by_digest, &arm, &console()).unwrap_err().to_string();
    assert!(error.contains("which is for linux/amd64 alone"), "{error}");
    let error = pull(&world, &registries, &named(&server, "some/app:v2")).unwrap_err().to_string();
    assert!(error.contains("404"), "{error}");
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let world = World::new();
    // A port that was free a moment ago, on this machine: refused at once.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let name: ImageName = format!("127.0.0.1:{port}/x:1").parse().unwrap();
    let error = pull(&world, &registries(quick()), &name).unwrap_err().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("refused"), "{error}");
    let options = super::RegistryOptions::default();
    let base = crate::base::pull(&world.ours, &name, &Platforms::Host, &options, &console());
    let error = base.map(drop).unwrap_err().to_string();
    assert!(error.contains("the local store") && error.contains("the registry 127.0.0.1"), "{error}");
    world.assert_clean();
}

#[test]
fn a_mirror_that_fails_is_passed_over() {
    let world = World::new();
    let (top, _) = index(&world.theirs);
    let good = Server::of(&world.theirs, &[("v1", &top)]);
    let bad = Server::answering(|_, reply| reply.status("500 Internal Server Error", &[], b"broken"));
    let empty = Server::of(&world.theirs, &[]);
    let conf = |last: &str| {
        let mirror =
            |host: &str| format!("[[registry.mirror]]\nlocation = \"{host}/hub\"\ninsecure = true\n");
        format!(
            "[[registry]]\nlocation = \"registry.invalid\"\n{}{}{}",
            mirror(bad.host()),
            mirror(empty.host()),
            mirror(last)
        )
    };
    let nowhere = Path::new("/nonexistent/config.json");
    let name: ImageName = "registry.invalid/app:v1".parse().unwrap();
    let registries = registries_with(&conf(good.host()), nowhere, quick());
    let (_, report) = registries.pull(&world.ours, &name, &Platforms::Host, &console()).unwrap();
    assert_eq!(report.registry, good.host());
    assert!(
        good.asked().iter().all(|line| !line.contains("/v2/app/")),
        "a mirror's path is in front of the name"
    );

    let all_bad = registries_with(&conf(empty.host()), nowhere, quick());
    let error = pull(&world, &all_bad, &name).unwrap_err().to_string();
    assert!(error.contains(&format!("before, the mirror {}", bad.host())), "{error}");
}

#[test]
fn several_blobs_come_at_once_and_not_too_many() {
    use super::limits::PARALLEL;
    use std::sync::{Arc, Condvar, Mutex};

    let world = World::new();
    let layers: Vec<_> = (0..3 * PARALLEL)
        .map(|index| {
            world.theirs.put_blob(MediaType::ImageLayer, format!("layer {index}").as_bytes()).unwrap()
        })
        .collect();
    let diff_ids: Vec<_> = layers.iter().map(Descriptor::digest).collect();
    let config = serde_json::json!({
        "architecture": oci::host_platform().architecture(), "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = world.theirs.put_blob(MediaType::ImageConfig, config.to_string().as_bytes()).unwrap();
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
    let top = world.theirs.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes()).unwrap();

    // How many requests there are now, and how many there were at most. The first waits for others.
    let state = Arc::new((Mutex::new((0usize, 0usize)), Condvar::new()));
    let shared = state.clone();
    let server = Server::with_quirk(&world.theirs, &[("v1", &top)], move |asked, reply| {
        if !asked.path.contains("/blobs/") {
            return Ok(false);
        }
        let (counts, changed) = &*shared;
        let mut now = counts.lock().unwrap();
        now.0 += 1;
        now.1 = now.1.max(now.0);
        changed.notify_all();
        let enough = |now: &mut (usize, usize)| now.1 < PARALLEL;
        let (mut now, waited) = changed.wait_timeout_while(now, Duration::from_secs(60), enough).unwrap();
        assert!(!waited.timed_out(), "{} at once", now.1);
        // Before the answer: who has it may ask again at once.
        now.0 -= 1;
        drop(now);
        reply.body.read_to_end(&mut Vec::new())?;
        Ok(false)
    });
    let (_, report) =
        registries(quick()).pull(&world.ours, &named(&server, "x:v1"), &Platforms::Host, &console()).unwrap();
    assert_eq!(report.fetched, 3 * PARALLEL + 1);
    assert_eq!(state.0.lock().unwrap().1, PARALLEL);
}
