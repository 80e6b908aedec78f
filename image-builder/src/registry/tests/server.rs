//! A server of HTTP/1.1 that does what a test says, and a registry on it.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use oci::{Descriptor, Hasher, Store};

/// A request.
pub(super) struct Asked {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) headers: HashMap<String, String>,
}

impl Asked {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The first byte that a `Range` asks for.
    pub(super) fn first(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// Where the answer goes. The connection ends with it.
pub(super) struct Reply<'a> {
    pub(super) stream: &'a mut TcpStream,
    /// The body of the request, unread.
    pub(super) body: &'a mut dyn Read,
}

impl Reply<'_> {
    pub(super) fn status(&mut self, status: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
        let length = body.len().to_string();
        let mut all = vec![("Content-Length", length.as_str())];
        all.extend_from_slice(headers);
        self.head(status, &all)?;
        self.stream.write_all(body)
    }

    pub(super) fn head(&mut self, status: &str, headers: &[(&str, &str)]) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        self.stream.write_all(format!("{head}\r\n").as_bytes())
    }

    pub(super) fn take_body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        let _ = self.body.read_to_end(&mut body);
        body
    }
}

type Answer = dyn Fn(&Asked, &mut Reply<'_>) -> io::Result<()> + Send + Sync;

/// Ends with this value.
pub(super) struct Server {
    host: String,
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub(super) fn answering(
        answer: impl Fn(&Asked, &mut Reply<'_>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, end) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let answer: Arc<Answer> = Arc::new(answer);
        let (log, ended) = (asked.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            for connection in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (answer, log) = (answer.clone(), log.clone());
                // A client that goes away is what some tests are about.
                std::thread::spawn(move || connection.and_then(|stream| serve(stream, &*answer, &log)));
            }
        });
        Self { host: address.to_string(), address, asked, end, thread: Some(thread) }
    }

    /// A registry that serves the store's blobs, and manifests by tag and by digest, under any repository.
    pub(super) fn of(store: &Store, tags: &[(&str, &Descriptor)]) -> Self {
        let registry = Registry::new(store, tags);
        Self::answering(move |asked, reply| registry.answer(asked, reply))
    }

    /// As [`Server::of`], where `quirk` may answer first; it says whether it did.
    pub(super) fn with_quirk(
        store: &Store,
        tags: &[(&str, &Descriptor)],
        quirk: impl Fn(&Asked, &mut Reply<'_>) -> io::Result<bool> + Send + Sync + 'static,
    ) -> Self {
        let registry = Registry::new(store, tags);
        Self::answering(move |asked, reply| match quirk(asked, reply)? {
            true => Ok(()),
            false => registry.answer(asked, reply),
        })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// The requests so far, as `METHOD PATH?QUERY`.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    pub(super) fn count(&self, of: &str) -> usize {
        self.asked().iter().filter(|line| line.contains(of)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, answer: &Answer, log: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut asked =
        Asked { method: method.into(), path: path.into(), query: query.into(), headers: HashMap::new() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        asked.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    if method.is_empty() {
        return Ok(());
    }
    let range = asked.header("range").map(|range| format!(" {range}")).unwrap_or_default();
    log.lock().unwrap().push(format!("{method} {target}{range}"));
    let length = asked.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    answer(&asked, &mut Reply { stream: &mut stream, body: &mut reader.take(length) })
}

/// A registry without authentication.
pub(super) struct Registry {
    store: Store,
    tags: Mutex<BTreeMap<String, String>>,
    uploads: Mutex<HashMap<String, Vec<u8>>>,
}

impl Registry {
    pub(super) fn new(store: &Store, tags: &[(&str, &Descriptor)]) -> Self {
        let tags = tags.iter().map(|(tag, top)| ((*tag).to_owned(), top.digest().to_string())).collect();
        Self { store: store.clone(), tags: Mutex::new(tags), uploads: Mutex::default() }
    }

    fn blob(&self, reference: &str) -> Option<Vec<u8>> {
        std::fs::read(self.store.blob_path(&reference.parse().ok()?).ok()?).ok()
    }

    pub(super) fn answer(&self, asked: &Asked, reply: &mut Reply<'_>) -> io::Result<()> {
        if asked.path == "/v2/" {
            return reply.status("200 OK", &[], b"{}");
        }
        let (kind, reference) = asked.path.rsplit_once('/').unwrap_or_default();
        let head = asked.method == "HEAD";
        match asked.method.as_str() {
            "GET" | "HEAD" if kind.ends_with("/manifests") => {
                let tagged = self.tags.lock().unwrap().get(reference).cloned();
                match self.blob(tagged.as_deref().unwrap_or(reference)) {
                    Some(body) => reply.status("200 OK", &[], &body),
                    None => {
                        reply.status("404 Not Found", &[], b"{\"errors\":[{\"code\":\"MANIFEST_UNKNOWN\"}]}")
                    }
                }
            }
            "GET" | "HEAD" if kind.ends_with("/blobs") => match (self.blob(reference), asked.first()) {
                (Some(body), _) if head => {
                    reply.head("200 OK", &[("Content-Length", &body.len().to_string())])
                }
                (Some(body), Some(first)) if first <= body.len() => {
                    let range = format!("bytes {first}-{}/{}", body.len() - 1, body.len());
                    reply.status("206 Partial Content", &[("Content-Range", &range)], &body[first..])
                }
                (Some(body), _) => reply.status("200 OK", &[], &body),
                (None, _) => reply.status("404 Not Found", &[], b""),
            },
            "POST" => {
                let mut uploads = self.uploads.lock().unwrap();
                let place = format!("{}{}", asked.path, uploads.len());
                uploads.insert(place.clone(), Vec::new());
                reply.status("202 Accepted", &[("Location", &place)], b"")
            }
            "PATCH" => {
                let body = reply.take_body();
                let mut uploads = self.uploads.lock().unwrap();
                let upload = uploads.get_mut(&asked.path).unwrap();
                let first =
                    asked.header("content-range").and_then(|range| range.split('-').next()?.parse().ok());
                assert_eq!(first.unwrap_or(0), upload.len(), "a part that does not fit");
                upload.extend_from_slice(&body);
                let range = format!("0-{}", upload.len().saturating_sub(1));
                reply.status("202 Accepted", &[("Location", &asked.path), ("Range", &range)], b"")
            }
            "GET" => {
                let length = self.uploads.lock().unwrap().get(&asked.path).map(Vec::len);
                match length {
                    Some(length) => {
                        let range = format!("0-{}", length.saturating_sub(1));
                        reply.status("204 No Content", &[("Location", &asked.path), ("Range", &range)], b"")
                    }
                    None => reply.status("404 Not Found", &[], b""),
                }
            }
            "PUT" if kind.ends_with("/manifests") => {
                let body = reply.take_body();
                let digest = Hasher::digest_of(&body).to_string();
                self.store.put_blob("x".into(), &body[..]).unwrap();
                self.tags.lock().unwrap().insert(reference.to_owned(), digest.clone());
                reply.status("201 Created", &[("Docker-Content-Digest", &digest)], b"")
            }
            "PUT" => {
                let rest = reply.take_body();
                let mut upload = self.uploads.lock().unwrap().remove(&asked.path).unwrap();
                upload.extend_from_slice(&rest);
                let digest = Hasher::digest_of(&upload);
                if !asked.query.replace("%3A", ":").contains(digest.as_ref()) {
                    return reply.status(
                        "400 Bad Request",
                        &[],
                        b"{\"errors\":[{\"code\":\"DIGEST_INVALID\"}]}",
                    );
                }
                self.store.put_blob("x".into(), &upload[..]).unwrap();
                reply.status("201 Created", &[], b"")
            }
            _ => reply.status("405 Method Not Allowed", &[], b""),
        }
    }

    /// Keeps the first bytes of an upload, as a registry does whose client goes away.
    pub(super) fn keep(&self, path: &str, bytes: &[u8]) {
        self.uploads.lock().unwrap().get_mut(path).unwrap().extend_from_slice(bytes);
    }
}
