//! Pulling from a registry (OCI distribution-spec 1.1) through oci-client.

use std::io::{self, Read};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use oci::{Descriptor, Hasher, Image, ImageName, MediaType, Store};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use tokio::runtime::Runtime;

use crate::console::{Console, Counted};
use crate::error::{Error, at};

/// A registry that does not take a connection within this time is not there. Ten seconds are several retransmissions.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A transfer that stands still for so long is dead.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest answer to the question for a manifest, name resolution and authentication included.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Registries take manifests of up to 4 MiB.
const MAX_MANIFEST: usize = 4 << 20;

const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Fetches the image for this machine's platform, without credentials, and gives it its name in the store.
pub(crate) fn pull(store: &Store, name: &ImageName, console: &Console) -> Result<Descriptor, Error> {
    let host = name.registry().to_owned();
    let failed = |reason: String| Error::Registry { registry: host.clone(), reason };
    // Another part of the process may have chosen already; any provider will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(at(std::path::Path::new("async runtime")))?;
    // As Docker has it, a registry on this machine may be without TLS.
    let plain = is_loopback(&host).then(|| host.clone()).into_iter().collect();
    let client = Client::new(ClientConfig {
        protocol: ClientProtocol::HttpsExcept(plain),
        use_monolithic_push: true,
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        user_agent: concat!("tiffin-image-builder/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    });
    let (registry, repository) = (name.registry().to_owned(), name.repository().to_owned());
    let at_digest =
        |digest: &str| Reference::with_digest(registry.clone(), repository.clone(), digest.to_owned());
    let wanted = match (name.digest(), name.tag()) {
        (Some(digest), _) => at_digest(digest.as_ref()),
        (None, tag) => {
            Reference::with_tag(registry.clone(), repository.clone(), tag.unwrap_or("latest").to_owned())
        }
    };
    console.line(&format!("pulling {} from {host}", name.canonical()));
    let fetch = |reference: &Reference| -> Result<Descriptor, Error> {
        let request = client.pull_manifest_raw(reference, &RegistryAuth::Anonymous, &ACCEPTED);
        let answer = runtime.block_on(async { tokio::time::timeout(MANIFEST_TIMEOUT, request).await });
        let (bytes, _) = match answer {
            Ok(answer) => answer.map_err(|error| failed(describe(&error)))?,
            Err(_) => return Err(failed(format!("no answer within {} s", MANIFEST_TIMEOUT.as_secs()))),
        };
        if bytes.len() > MAX_MANIFEST {
            return Err(failed(format!(
                "a manifest of {} bytes, at most {MAX_MANIFEST} expected",
                bytes.len()
            )));
        }
        let digest = Hasher::digest_of(&bytes);
        if let Some(expected) = reference.digest().filter(|expected| *expected != digest.as_ref()) {
            return Err(failed(format!("manifest {expected} has the digest {digest}")));
        }
        let media_type = media_type(&bytes).map_err(&failed)?;
        Ok(store.put_blob(media_type, &bytes[..])?)
    };
    let top = fetch(&wanted)?;
    let manifest = match oci::select_manifest(store, &top)? {
        selected if selected.digest() == top.digest() => top,
        selected => fetch(&at_digest(selected.digest().as_ref()))?,
    };
    for blob in oci::blobs_of(store, &manifest)? {
        if store.has_blob(&blob) {
            continue;
        }
        let label = format!("fetching {:.19} ({} KiB)", blob.digest().as_ref(), blob.size() / 1024);
        let work = console.work(&label, Some(blob.size()));
        let source = OciDescriptor {
            media_type: blob.media_type().to_string(),
            digest: blob.digest().to_string(),
            size: i64::try_from(blob.size()).unwrap_or(i64::MAX),
            ..OciDescriptor::default()
        };
        let stream = runtime
            .block_on(client.pull_blob_stream(&wanted, &source))
            .map_err(|error| failed(format!("blob {}: {}", blob.digest(), describe(&error))))?;
        let reader = StreamReader {
            runtime: &runtime,
            stream: stream.stream.map(|chunk| chunk.map(|bytes| bytes.to_vec())).boxed(),
            chunk: Vec::new(),
            taken: 0,
        };
        store.put_verified(&blob, Counted { inner: reader, work: &work }).map_err(|error| match error {
            oci::Error::Io { source, .. } => failed(format!("blob {}: {source}", blob.digest())),
            other => other.into(),
        })?;
    }
    let image = Image::open(store, &manifest)?;
    store.tag(&name.canonical(), &image.descriptor)?;
    Ok(image.descriptor)
}

/// An async stream of chunks as something to read.
struct StreamReader<'a> {
    runtime: &'a Runtime,
    stream: BoxStream<'a, io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    taken: usize,
}

impl Read for StreamReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.chunk.len() {
            match self.runtime.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(chunk) => (self.chunk, self.taken) = (chunk?, 0),
            }
        }
        let rest = &self.chunk[self.taken..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

/// A manifest names its own type; old OCI ones do not, but an index has `manifests`.
fn media_type(bytes: &[u8]) -> Result<MediaType, String> {
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| format!("the manifest is no JSON: {error}"))?;
    Ok(match value["mediaType"].as_str() {
        Some(name) => MediaType::from(name),
        None if value["manifests"].is_array() => MediaType::ImageIndex,
        None => MediaType::ImageManifest,
    })
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The error with its causes: reqwest's own text says only that a request failed.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ImageConfig;
    use oci::layer::{Compression, LayerWriter};
    use std::io::{BufRead, BufReader, Write};

    #[test]
    fn only_this_machine_may_be_without_tls() {
        for (host, loopback) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:5000", true),
            ("docker.io", false),
            ("localhost.example.com", false),
            ("10.0.0.1:5000", false),
        ] {
            assert_eq!(is_loopback(host), loopback, "{host}");
        }
    }

    #[test]
    fn a_registry_that_is_not_there_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path()).unwrap();
        // A port that was free a moment ago, on this machine: refused at once.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let name: ImageName = format!("127.0.0.1:{port}/x:1").parse().unwrap();
        let error = crate::base::pull(&store, &name, &Console::new(true)).unwrap_err().to_string();
        assert!(error.contains("the local store"), "{error}");
        assert!(error.contains(&format!("the registry 127.0.0.1:{port}")), "{error}");
        assert!(error.contains("refused"), "{error}");
    }

    /// A registry without authentication, that serves what is in a store.
    fn serve(store: Store, tag: &'static str, top: Descriptor) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let mut request =
                    BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
                let line = request.next().unwrap_or_default();
                while request.next().is_some_and(|header| !header.is_empty()) {}
                let path = line.split(' ').nth(1).unwrap_or_default();
                let (kind, reference) = path.rsplit_once('/').unwrap_or_default();
                let digest = match reference == tag {
                    true => top.digest().clone(),
                    false => reference.parse().unwrap_or_else(|_| Hasher::digest_of(b"none")),
                };
                let body = std::fs::read(store.blob_path(&digest).unwrap()).ok().filter(|_| path != "/v2/");
                let (status, body) = match body {
                    Some(body) => ("200 OK", body),
                    None if path == "/v2/" => ("200 OK", b"{}".to_vec()),
                    None => ("404 Not Found", b"{\"errors\":[]}".to_vec()),
                };
                let kind = match kind.ends_with("/manifests") {
                    true => media_type(&body).map(|kind| kind.to_string()).unwrap_or_default(),
                    false => "application/octet-stream".to_owned(),
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(&body));
            }
        });
        host
    }

    /// An image of one layer behind an index, as registries have them.
    fn image(store: &Store) -> (Descriptor, Descriptor) {
        let writer = LayerWriter::new(store, Compression::Gzip).unwrap();
        let layer = writer.finish().unwrap();
        let descriptor = layer.descriptor.clone();
        let config =
            ImageConfig::default().to_json("2026-01-01T00:00:00Z", std::slice::from_ref(&layer.diff_id), &[]);
        let layer = oci::Layer::new(store, layer.descriptor, layer.diff_id).unwrap();
        let manifest = crate::builder::write_image(store, &[layer], &config).unwrap();
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageIndex, "manifests": [manifest],
        });
        let index = store.put_blob(MediaType::ImageIndex, index.to_string().as_bytes()).unwrap();
        (index, descriptor)
    }

    #[test]
    fn an_image_is_pulled_and_gets_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = Store::open_or_create(&dir.path().join("theirs")).unwrap();
        let ours = Store::open_or_create(&dir.path().join("ours")).unwrap();
        let (index, _) = image(&theirs);
        let host = serve(theirs, "v1", index.clone());
        let name: ImageName = format!("{host}/some/app:v1").parse().unwrap();
        let pulled = pull(&ours, &name, &Console::new(true)).unwrap();
        assert_eq!(ours.resolve(&name.canonical()).unwrap().unwrap().digest(), pulled.digest());
        let image = Image::open(&ours, &pulled).unwrap();
        io::copy(&mut image.layers[0].open().unwrap(), &mut io::sink()).unwrap();

        let by_digest: ImageName = format!("{host}/some/app@{}", index.digest()).parse().unwrap();
        assert_eq!(pull(&ours, &by_digest, &Console::new(true)).unwrap().digest(), pulled.digest());
        let missing: ImageName = format!("{host}/some/app:v2").parse().unwrap();
        let error = pull(&ours, &missing, &Console::new(true)).unwrap_err();
        assert!(matches!(error, Error::Registry { .. }), "{error}");
    }

    #[test]
    fn a_registry_that_lies_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = Store::open_or_create(&dir.path().join("theirs")).unwrap();
        let ours = Store::open_or_create(&dir.path().join("ours")).unwrap();
        let (index, layer) = image(&theirs);
        let path = theirs.blob_path(layer.digest()).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[12] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let host = serve(theirs, "v1", index);
        let name: ImageName = format!("{host}/some/app:v1").parse().unwrap();
        let error = pull(&ours, &name, &Console::new(true)).unwrap_err().to_string();
        assert!(error.contains(layer.digest().as_ref()), "{error}");
        assert!(ours.list().unwrap().is_empty(), "a damaged image gets no name");
        assert!(!ours.has_blob(&layer));
    }
}
