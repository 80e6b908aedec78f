//! One repository of one registry, and how it is asked: authority, redirects, attempts, bounds.
//!
//! ```text
//! send ── tries again after a pause: 5xx, 429, broken connections
//!  └ attempt ── answers challenges, follows redirects
//!     └ once ── one request, with a bound on the time
//! ```
//!
//! Credentials go to the registry itself and to the token service that it names, never where a redirect leads, and a
//! registry with TLS leads to nothing without.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::authority::Authority;
use super::configuration::{Endpoint, Transport, is_loopback};
use super::failure::{Failure, retry_after};
use super::limits::{CONNECT_ATTEMPTS, CONNECT_TIMEOUT, Limits, MAX_CHALLENGES, MAX_REDIRECTS, MAX_REFUSAL};
use super::payload::Payload;
use super::text::{printable, with_causes};
use crate::console::Console;
use crate::error::Error;

const USER_AGENT: &str = concat!("tiffin-image-builder/", env!("CARGO_PKG_VERSION"));

/// Connections, shared by all registries.
pub(super) struct Http {
    /// Made when they are wanted, by [`Way`].
    clients: [OnceLock<Client>; 4],
    pub(super) limits: Limits,
}

/// How a connection is made.
#[derive(Clone, Copy)]
struct Way {
    /// With anybody, whatever the certificate.
    unchecked: bool,
    /// Past the proxy that the environment names: no proxy reaches this machine's own addresses (Go's programs, and with them
    /// Docker's, do the same).
    direct: bool,
}

/// A request that can be made again.
pub(super) struct Request {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) payload: Payload,
    /// What it is about, as "blob sha256:..".
    pub(super) what: String,
}

/// A repository.
pub(super) struct Session<'a> {
    http: &'a Http,
    console: &'a Console,
    /// The address that everything begins with, without a path.
    base: Url,
    repository: String,
    host: String,
    unchecked: bool,
    authority: Authority,
}

impl Http {
    pub(super) fn new(limits: Limits) -> Result<Self, Error> {
        // Another part of the process may have chosen already; any provider will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Self { clients: Default::default(), limits })
    }

    fn client(&self, way: Way) -> Result<&Client, Error> {
        let slot = &self.clients[usize::from(way.unchecked) + 2 * usize::from(way.direct)];
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let made = client(way)?;
        Ok(slot.get_or_init(|| made))
    }

    /// One request to `url`, and the beginning of the answer.
    pub(super) async fn once(
        &self,
        request: &Request,
        url: &Url,
        authorization: Option<HeaderValue>,
        unchecked: bool,
    ) -> Result<Response, Failure> {
        let direct = url.host_str().is_some_and(is_loopback);
        let client = self.client(Way { unchecked, direct }).map_err(Failure::Local)?;
        let mut builder =
            client.request(request.method.clone(), url.clone()).headers(request.headers.clone());
        if let Some(authorization) = authorization {
            builder = builder.header(AUTHORIZATION, authorization);
        }
        let sent = Arc::new(AtomicU64::new(0));
        builder = request.payload.attach(builder, &sent).map_err(Failure::Local)?;
        let mut answer = Box::pin(builder.send());
        let (total, mut before) = (request.payload.length(), 0);
        // A body that goes on is no stall; when it is all gone, the registry may take its time to move it.
        let mut committing = None;
        loop {
            let window = match committing {
                None if total == 0 => self.limits.answer,
                None => self.limits.window,
                Some(_) => self.limits.commit,
            };
            match tokio::time::timeout(window, &mut answer).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => {
                    let reason = format!("{}: {}", request.what, with_causes(&error));
                    return Err(match error.is_connect() {
                        true => Failure::Unreachable(reason),
                        false => Failure::transient(reason),
                    });
                }
                Err(_) => {}
            }
            let now = sent.load(Ordering::Relaxed);
            let stalled = now < before + self.limits.least;
            match (total, committing) {
                (1.., None) if now >= total => committing = Some(Instant::now()),
                (1.., None) if !stalled => before = now,
                _ => {
                    let waited = window.as_secs_f32();
                    return Err(Failure::transient(format!("{}: no answer within {waited} s", request.what)));
                }
            }
        }
    }

    /// The whole of a small answer.
    pub(super) async fn body(&self, what: &str, response: Response, limit: u64) -> Result<Vec<u8>, Failure> {
        if let Some(length) = response.content_length().filter(|length| *length > limit) {
            return Err(Failure::Final(format!(
                "{what}: the answer has {length} bytes, at most {limit} expected"
            )));
        }
        let read = async {
            let mut response = response;
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|error| {
                Failure::transient(format!("{what}: the answer broke off: {}", with_causes(&error)))
            })? {
                if (body.len() + chunk.len()) as u64 > limit {
                    return Err(Failure::Final(format!("{what}: the answer has more than {limit} bytes")));
                }
                body.extend_from_slice(&chunk);
            }
            Ok(body)
        };
        let whole = tokio::time::timeout(self.limits.answer, read).await;
        let late = format!("{what}: the answer did not end within {} s", self.limits.answer.as_secs_f32());
        whole.unwrap_or_else(|_| Err(Failure::transient(late)))
    }

    /// What an answer says that is not the one that was hoped for.
    pub(super) async fn refusal(&self, what: &str, host: &str, response: Response) -> Failure {
        let status = response.status();
        let after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(retry_after);
        // Its text helps, and no more: what cannot be read of it is left.
        let read = async {
            let (mut response, mut body) = (response, Vec::new());
            while let Ok(Some(chunk)) = response.chunk().await {
                let room = MAX_REFUSAL as usize - body.len();
                body.extend_from_slice(&chunk[..chunk.len().min(room)]);
                if body.len() as u64 == MAX_REFUSAL {
                    break;
                }
            }
            body
        };
        let body = tokio::time::timeout(self.limits.answer, read).await.unwrap_or_default();
        Failure::refused(what, host, status, after, &body)
    }
}

fn client(way: Way) -> Result<Client, Error> {
    let builder = Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        // Redirects are followed here, where it is known what may go where.
        .redirect(reqwest::redirect::Policy::none())
        .tls_danger_accept_invalid_certs(way.unchecked);
    let builder = if way.direct { builder.no_proxy() } else { builder };
    builder.build().map_err(|error| Error::Program { program: "TLS".to_owned(), reason: with_causes(&error) })
}

impl<'a> Session<'a> {
    pub(super) fn new(
        http: &'a Http,
        console: &'a Console,
        endpoint: &Endpoint,
        authority: Authority,
    ) -> Result<Self, Error> {
        let scheme = match endpoint.transport {
            Transport::Https | Transport::Insecure => "https",
            Transport::Http => "http",
        };
        let host = endpoint.known_as().to_owned();
        let base = Url::parse(&format!("{scheme}://{}/", endpoint.host)).map_err(|error| Error::Invalid {
            what: format!("registry {host}"),
            reason: format!("it makes no address: {error}"),
        })?;
        let unchecked = endpoint.transport == Transport::Insecure;
        Ok(Self { http, console, base, repository: endpoint.repository.clone(), host, unchecked, authority })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.http.limits
    }

    pub(super) fn http(&self) -> &Http {
        self.http
    }

    /// `/v2/REPOSITORY/REST`.
    pub(super) fn url(&self, rest: &str) -> Result<Url, Failure> {
        let path = format!("/v2/{}/{rest}", self.repository);
        self.base.join(&path).map_err(|error| Failure::Final(format!("{path}: {error}")))
    }

    /// Whether the registry is there, and knows us: `GET /v2/`.
    pub(super) async fn ping(&self) -> Result<(), Failure> {
        let url = self.base.join("/v2/").map_err(|error| Failure::Final(error.to_string()))?;
        let request = Request::get(url, "the registry".to_owned());
        self.send(&request, &[StatusCode::OK]).await.map(drop)
    }

    /// Whether anything answers at all; what it says is not looked at.
    pub(super) async fn answers(&self) -> bool {
        let Ok(url) = self.base.join("/v2/") else { return false };
        let request = Request::get(url, "the registry".to_owned());
        self.http.once(&request, &request.url, None, self.unchecked).await.is_ok()
    }

    /// The answer, if its status is one of `expected`, after as many attempts as it may take.
    pub(super) async fn send(&self, request: &Request, expected: &[StatusCode]) -> Result<Response, Failure> {
        let mut attempt = 1;
        loop {
            let failure = match self.attempt(request, expected).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            self.pause(&failure, attempt).await.ok_or(failure)?;
            attempt += 1;
        }
    }

    /// Waits after the failure of attempt `attempt`, counted from 1; `None` where another is of no use.
    pub(super) async fn pause(&self, failure: &Failure, attempt: u32) -> Option<()> {
        let limits = &self.http.limits;
        let (after, reason, attempts) = match failure {
            Failure::Transient { after, reason, .. } => (*after, reason, limits.attempts),
            Failure::Unreachable(reason) => (None, reason, limits.attempts.min(CONNECT_ATTEMPTS)),
            _ => return None,
        };
        if attempt >= attempts || after.is_some_and(|after| after > limits.longest_pause) {
            return None;
        }
        let pause = after.unwrap_or_default().max(limits.pause_after(attempt));
        if pause >= Duration::from_secs(2) {
            self.console.line(&format!("registry {}: {reason}; again in {} s", self.host, pause.as_secs()));
        }
        tokio::time::sleep(pause).await;
        Some(())
    }

    /// As [`Session::send`], once.
    pub(super) async fn attempt(
        &self,
        request: &Request,
        expected: &[StatusCode],
    ) -> Result<Response, Failure> {
        let mut url = request.url.clone();
        let (mut hops, mut challenges) = (0, 0);
        loop {
            let ours = url.origin() == self.base.origin();
            let known = if ours { self.authority.header() } else { None };
            let generation = known.as_ref().map(|(generation, _)| *generation);
            let unchecked = self.unchecked && ours;
            let response = self.http.once(request, &url, known.map(|(_, header)| header), unchecked).await?;
            let status = response.status();
            if expected.contains(&status) {
                return Ok(response);
            }
            if status == StatusCode::UNAUTHORIZED && ours && challenges < MAX_CHALLENGES {
                challenges += 1;
                let plain = self.base.scheme() == "http";
                if self.authority.answer(self.http, &self.host, plain, response.headers(), generation).await?
                {
                    continue;
                }
            }
            let follows = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
                && (request.method == Method::GET || request.method == Method::HEAD);
            if !follows {
                let failure = self.http.refusal(&request.what, &self.host, response).await;
                return Err(match failure {
                    // What a server with TLS answers to those who come without.
                    Failure::Final(reason) if status == StatusCode::BAD_REQUEST && url.scheme() == "http" => {
                        Failure::Final(format!(
                            "{reason}; it was asked without TLS, as registries on this machine are: if it has TLS, name it in \
                             registries.conf"
                        ))
                    }
                    failure => failure,
                });
            }
            hops += 1;
            if hops > MAX_REDIRECTS {
                return Err(Failure::Final(format!("{}: more than {MAX_REDIRECTS} redirects", request.what)));
            }
            url = self.led_to(&request.what, &url, response.headers())?;
        }
    }

    /// Where `Location` leads from `from`. Only to http and https, and not from TLS to where there is none.
    pub(super) fn led_to(&self, what: &str, from: &Url, headers: &HeaderMap) -> Result<Url, Failure> {
        let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let location =
            location.ok_or_else(|| Failure::Final(format!("{what}: the answer has no Location")))?;
        let refused = |reason: &str| {
            Failure::Final(format!("{what}: the registry leads to {:?}, {reason}", printable(location)))
        };
        let url = from.join(location).map_err(|_| refused("which is no address"))?;
        match (from.scheme(), url.scheme()) {
            (_, "https") | ("http", "http") => {}
            ("https", "http") if self.unchecked => {}
            ("https", "http") => {
                return Err(refused(
                    "from https to http; a proxy in front of the registry may not tell it X-Forwarded-Proto",
                ));
            }
            _ => return Err(refused("which is neither http nor https")),
        }
        match url.username().is_empty() && url.password().is_none() {
            true => Ok(url),
            false => Err(refused("which holds a password")),
        }
    }
}

impl Request {
    pub(super) fn new(method: Method, url: Url, what: String) -> Self {
        Self { method, url, headers: HeaderMap::new(), payload: Payload::Empty, what }
    }

    pub(super) fn get(url: Url, what: String) -> Self {
        Self::new(Method::GET, url, what)
    }

    pub(super) fn with(mut self, name: reqwest::header::HeaderName, value: &str) -> Self {
        // What is set here are media types, ranges and lengths.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    pub(super) fn carrying(mut self, payload: Payload) -> Self {
        self.payload = payload;
        self
    }
}

/// Bytes for a small body.
impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(Bytes::from(bytes))
    }
}
