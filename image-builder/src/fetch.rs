//! `ADD` of URLs: fetched once a build, bounded in size and time, remembered by what the server says of their age.
//!
//! ```text
//! --checksum    key: the checksum. Fetched only when the step runs, and must have it.
//! without       a record of the last time? ask with its ETag or date --304--> key: the digest of then; fetched if the step runs
//!                                                                    --200--> fetched; key: its digest and time
//! ```
//!
//! Certificates are this machine's (`SSL_CERT_FILE`, else the distribution's bundle), proxies those of the environment.

use std::collections::HashMap;
use std::fs::{self, File};
use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use oci::layer::Timestamp;
use oci::{Digest, Hasher};
use reqwest::header::{self, HeaderMap};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{StatusCode, Url};
use serde::{Deserialize, Serialize};

use crate::error::{Error, at};
use crate::interrupt::Interrupt;
use crate::registry::CONNECT_TIMEOUT;

/// The name of a file whose URL has none, as BuildKit's.
const UNNAMED: &str = "__unnamed__";
/// The longest record that is read.
const MAX_RECORD: u64 = 64 << 10;
/// The longest value of a header that is kept.
const MAX_HEADER: usize = 4 << 10;
/// The most redirects, as Go's client has it.
const MAX_REDIRECTS: usize = 10;
/// How often the wait for a server looks whether the user wants to stop.
const TICK: Duration = Duration::from_millis(200);

/// What is waited for, and how much is taken.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The largest file: larger than what anybody puts into an image.
    bytes: u64,
    /// From the request to its answer's head, which a slow proxy may take long for.
    answer: Duration,
    /// In each such time..
    window: Duration,
    /// ..so many bytes must come: 1 KiB a second is slower than any line.
    progress: u64,
    /// All of a file.
    total: Duration,
    /// Tries of what may go better the next time.
    tries: u32,
    /// Before the second try; each later one waits twice as long.
    pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 16 << 30,
            answer: Duration::from_secs(120),
            window: Duration::from_secs(60),
            progress: 64 << 10,
            total: Duration::from_secs(2 * 3600),
            tries: 4,
            pause: Duration::from_millis(500),
        }
    }
}

/// Fetches the files of one build.
#[derive(Debug)]
pub(crate) struct Fetcher {
    /// Records of earlier builds, and files without a name while they are used.
    folder: PathBuf,
    interrupt: Interrupt,
    limits: Limits,
    /// What this build has, by URL.
    fetched: Mutex<HashMap<String, Body>>,
}

/// A file that is fetched when it is needed.
#[derive(Debug)]
pub(crate) struct Remote {
    fetcher: Arc<Fetcher>,
    url: Url,
    name: String,
    digest: Digest,
    /// What the server says; not known before it is asked.
    mtime: Option<Timestamp>,
    body: OnceLock<Body>,
}

/// A file that was fetched.
#[derive(Clone, Debug)]
pub(crate) struct Body {
    pub(crate) file: Arc<File>,
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    digest: Digest,
}

/// What the last answer said.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    etag: Option<String>,
    last_modified: Option<String>,
    digest: Digest,
}

enum Answer {
    Unchanged,
    Body(Body, Validators),
}

#[derive(Debug, Default)]
struct Validators {
    etag: Option<String>,
    last_modified: Option<String>,
}

enum Failure {
    /// The next try may go better.
    Passing(String),
    Final(Error),
}

impl Fetcher {
    pub(crate) fn new(folder: &Path, interrupt: &Interrupt) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        Ok(Self {
            folder: folder.to_owned(),
            interrupt: interrupt.clone(),
            limits: Limits::default(),
            fetched: Mutex::default(),
        })
    }

    /// Where files without a name may be.
    pub(crate) fn scratch(&self) -> &Path {
        &self.folder
    }

    /// The file at that URL. Without a checksum the server is asked now.
    pub(crate) fn remote(self: &Arc<Self>, url: &str, checksum: Option<&Digest>) -> Result<Remote, Error> {
        let wrong = |reason: String| Error::Source { what: url.to_owned(), reason };
        let parsed = Url::parse(url).map_err(|error| wrong(format!("it is no URL: {error}")))?;
        let remote = |digest: Digest, mtime: Option<Timestamp>, body: OnceLock<Body>| Remote {
            fetcher: Arc::clone(self),
            name: file_name(&parsed),
            url: parsed.clone(),
            digest,
            mtime,
            body,
        };
        if let Some(checksum) = checksum {
            return Ok(remote(checksum.clone(), None, OnceLock::new()));
        }
        if let Some(body) = self.fetched().get(parsed.as_str()) {
            return Ok(remote(body.digest.clone(), Some(body.mtime), OnceLock::from(body.clone())));
        }
        let record = self.record(&parsed);
        match self.get(&parsed, record.as_ref())? {
            (Answer::Unchanged, Some(record)) => Ok(remote(
                record.digest.clone(),
                Some(time(record.last_modified.as_deref())),
                OnceLock::new(),
            )),
            (Answer::Unchanged, None) => {
                Err(wrong("the server says that it is unchanged, but nobody asked that".to_owned()))
            }
            (Answer::Body(body, _), _) => {
                Ok(remote(body.digest.clone(), Some(body.mtime), OnceLock::from(body)))
            }
        }
    }

    fn fetched(&self) -> MutexGuard<'_, HashMap<String, Body>> {
        self.fetched.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn record_path(&self, url: &Url) -> PathBuf {
        self.folder.join(format!("{}.json", Hasher::digest_of(url.as_str().as_bytes()).digest()))
    }

    /// What the last answer said; a damaged record is none.
    fn record(&self, url: &Url) -> Option<Record> {
        let mut text = Vec::new();
        File::open(self.record_path(url)).ok()?.take(MAX_RECORD).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Not synced: a record that a power cut damages is a file that is fetched again.
    fn remember(&self, url: &Url, record: &Record) -> Result<(), Error> {
        let path = self.record_path(url);
        let text = serde_json::to_vec(record).map_err(|error| at(&path)(std::io::Error::from(error)))?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder).map_err(at(&self.folder))?;
        file.write_all(&text).map_err(at(&path))?;
        file.persist(&path).map_err(|error| at(&path)(error.error))?;
        Ok(())
    }

    /// Asks the server, again where that may help, and remembers what it says.
    fn get<'r>(&self, url: &Url, record: Option<&'r Record>) -> Result<(Answer, Option<&'r Record>), Error> {
        // Another part of the process may have chosen already; any provider will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(at(Path::new("async runtime")))?;
        let mut pause = self.limits.pause;
        let mut tries = 1;
        loop {
            match runtime.block_on(self.ask(url, record)) {
                Ok(Answer::Unchanged) => return Ok((Answer::Unchanged, record)),
                Ok(Answer::Body(body, validators)) => {
                    let Validators { etag, last_modified } = validators;
                    self.remember(url, &Record { etag, last_modified, digest: body.digest.clone() })?;
                    self.fetched().insert(url.as_str().to_owned(), body.clone());
                    return Ok((Answer::Body(body, Validators::default()), None));
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason)) if tries >= self.limits.tries => {
                    return Err(failed(url, format!("{reason} (tried {tries} times)")));
                }
                Err(Failure::Passing(_)) => {
                    runtime.block_on(async {
                        let _ = self.watched(pause, std::future::pending::<()>()).await;
                    });
                    self.interrupt.check()?;
                    tries += 1;
                    pause *= 2;
                }
            }
        }
    }

    async fn ask(&self, url: &Url, record: Option<&Record>) -> Result<Answer, Failure> {
        let fatal = |reason: String| Failure::Final(failed(url, reason));
        let client = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::custom(follow))
            .user_agent(concat!("tiffin-image-builder/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| fatal(describe(&error)))?;
        let mut request = client.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
        if let Some(etag) = record.and_then(|record| record.etag.as_ref()) {
            request = request.header(header::IF_NONE_MATCH, etag);
        } else if let Some(date) = record.and_then(|record| record.last_modified.as_ref()) {
            request = request.header(header::IF_MODIFIED_SINCE, date);
        }
        let answer = self.watched(self.limits.answer, request.send()).await?;
        let Some(answer) = answer else {
            let seconds = self.limits.answer.as_secs();
            return Err(Failure::Passing(format!("no answer within {seconds} s")));
        };
        let mut answer = match answer {
            Ok(answer) => answer,
            // A redirect that is not followed does not become better.
            Err(error) if error.is_redirect() || error.is_builder() => return Err(fatal(describe(&error))),
            Err(error) => return Err(Failure::Passing(describe(&error))),
        };
        match answer.status() {
            StatusCode::NOT_MODIFIED if record.is_some() => return Ok(Answer::Unchanged),
            StatusCode::OK => {}
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Failure::Passing(format!("the server answers {status}")));
            }
            // Other schemes are not even offered to our policy.
            status if status.is_redirection() => {
                let target = text(answer.headers(), header::LOCATION).unwrap_or_default();
                return Err(fatal(format!("it redirects to {target:?}, expected http or https")));
            }
            status => return Err(fatal(format!("the server answers {status}"))),
        }
        let announced = answer.content_length();
        let too_large = || fatal(format!("it has more than {} bytes", self.limits.bytes));
        if announced.is_some_and(|length| length > self.limits.bytes) {
            return Err(too_large());
        }
        let validators = Validators {
            etag: text(answer.headers(), header::ETAG),
            last_modified: text(answer.headers(), header::LAST_MODIFIED),
        };
        let local = |error| Failure::Final(at(&self.folder)(error));
        let mut file = tempfile::tempfile_in(&self.folder).map_err(local)?;
        let mut hasher = Hasher::new();
        let begun = Instant::now();
        let (mut window, mut in_window) = (begun, 0);
        loop {
            let rest = self.limits.window.saturating_sub(window.elapsed());
            let chunk = match self.watched(rest, answer.chunk()).await? {
                Some(Ok(Some(chunk))) => chunk,
                Some(Ok(None)) => break,
                Some(Err(error)) => return Err(Failure::Passing(describe(&error))),
                // Dropping the future of a chunk loses nothing of the body.
                None => Default::default(),
            };
            hasher.update(&chunk);
            in_window += chunk.len() as u64;
            if hasher.length() > self.limits.bytes {
                return Err(too_large());
            }
            file.write_all(&chunk).map_err(local)?;
            if begun.elapsed() > self.limits.total {
                return Err(fatal(format!("it takes longer than {} s", self.limits.total.as_secs())));
            }
            if window.elapsed() >= self.limits.window {
                if in_window < self.limits.progress {
                    let (bytes, time) = (in_window, self.limits.window);
                    return Err(Failure::Passing(format!("only {bytes} bytes came in {} s", time.as_secs())));
                }
                (window, in_window) = (Instant::now(), 0);
            }
        }
        let (digest, size) = hasher.finish();
        let mtime = time(validators.last_modified.as_deref());
        Ok(Answer::Body(Body { file: Arc::new(file), size, mtime, digest }, validators))
    }

    /// Waits at most so long, and ends when the user wants to stop. `None` when the time is over.
    async fn watched<T>(
        &self,
        time: Duration,
        future: impl Future<Output = T>,
    ) -> Result<Option<T>, Failure> {
        let mut future = std::pin::pin!(future);
        let end = Instant::now() + time;
        loop {
            self.interrupt.check().map_err(Failure::Final)?;
            let rest = end.saturating_duration_since(Instant::now());
            if let Ok(done) = tokio::time::timeout(rest.min(TICK), &mut future).await {
                return Ok(Some(done));
            }
            if rest.is_zero() {
                return Ok(None);
            }
        }
    }
}

impl Remote {
    /// The name of the file: the end of the URL's path.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The URL without a password.
    pub(crate) fn url(&self) -> String {
        shown(&self.url)
    }

    /// What the file is, for a key.
    pub(crate) fn identity(&self) -> String {
        format!("{} {:?}", self.digest, self.mtime.map(|time| time.seconds))
    }

    /// The file itself, fetched now if it was not before.
    pub(crate) fn body(&self) -> Result<Body, Error> {
        if let Some(body) = self.body.get() {
            return Ok(body.clone());
        }
        let known = self.fetcher.fetched().get(self.url.as_str()).cloned();
        let body = match known {
            Some(body) => body,
            None => match self.fetcher.get(&self.url, None)?.0 {
                Answer::Body(body, _) => body,
                Answer::Unchanged => return Err(failed(&self.url, "it has no body".to_owned())),
            },
        };
        if body.digest != self.digest {
            return Err(failed(
                &self.url,
                format!("wrong digest: expected {}, got {} ({} bytes)", self.digest, body.digest, body.size),
            ));
        }
        Ok(self.body.get_or_init(|| body).clone())
    }
}

impl Body {
    /// Reads the file from its beginning.
    pub(crate) fn reader(&self) -> impl Read + 'static {
        BodyReader { file: Arc::clone(&self.file), offset: 0 }
    }
}

struct BodyReader {
    file: Arc<File>,
    offset: u64,
}

impl Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let scheme = attempt.url().scheme().to_owned();
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error(format!("more than {MAX_REDIRECTS} redirects"));
    }
    match scheme.as_str() {
        "http" | "https" => attempt.follow(),
        _ => attempt.error(format!("a redirect to {scheme}:, expected http or https")),
    }
}

fn file_name(url: &Url) -> String {
    let path = percent_encoding::percent_decode_str(url.path()).decode_utf8_lossy().into_owned();
    match path.trim_end_matches('/').rsplit('/').next() {
        None | Some("" | "." | "..") => UNNAMED.to_owned(),
        Some(name) => name.to_owned(),
    }
}

fn shown(url: &Url) -> String {
    let mut shown = url.clone();
    if shown.password().is_some() {
        // Only a URL without a host has no place for one.
        let _ = shown.set_password(Some("..."));
    }
    shown.into()
}

fn failed(url: &Url, reason: String) -> Error {
    Error::Source { what: shown(url), reason }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    (value.len() <= MAX_HEADER).then(|| value.to_owned())
}

/// A time of HTTP; 1970 where there is none, as with BuildKit.
fn time(text: Option<&str>) -> Timestamp {
    let parser = jiff::fmt::rfc2822::DateTimeParser::new();
    let parsed = text.and_then(|text| parser.parse_timestamp(text).ok());
    Timestamp { seconds: parsed.map_or(0, |time| time.as_second()).max(0), nanoseconds: 0 }
}

/// The error with its causes: reqwest's own text says only that a request failed.
fn describe(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut source: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    match text.is_empty() {
        true => error.to_string(),
        false => text,
    }
}

#[cfg(test)]
mod tests;
