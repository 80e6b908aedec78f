//! Who we are to a registry: nobody, a name and a password, or a token of the service that the registry trusts.

use std::sync::{Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::challenge::{Challenge, challenge};
use super::configuration::is_loopback;
use super::credentials::Credential;
use super::failure::Failure;
use super::limits::MAX_TOKEN_ANSWER;
use super::payload::Payload;
use super::session::{Http, Request};
use super::text::printable;

/// What we call ourselves to token services that ask.
const CLIENT_ID: &str = "tiffin-image-builder";

/// The authority of one session. Tokens are fetched when the registry asks for one, and again when it takes the last no more.
pub(super) struct Authority {
    credential: Option<Credential>,
    /// As `repository:library/debian:pull`.
    scopes: Vec<String>,
    header: Mutex<Option<(u64, HeaderValue)>>,
    // One fetch at a time: the other transfers wait for its token.
    fetching: tokio::sync::Mutex<()>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl Authority {
    pub(super) fn new(credential: Option<Credential>, scopes: Vec<String>) -> Self {
        Self { credential, scopes, header: Mutex::default(), fetching: tokio::sync::Mutex::default() }
    }

    /// What goes with requests, once a registry has asked for it, and which generation of it that is.
    pub(super) fn header(&self) -> Option<(u64, HeaderValue)> {
        self.lock().clone()
    }

    /// Answers the challenge in `headers`, which came to a request with the header of generation `used`. Says whether
    /// there is anything new to try.
    pub(super) async fn answer(
        &self,
        http: &Http,
        host: &str,
        plain: bool,
        headers: &HeaderMap,
        used: Option<u64>,
    ) -> Result<bool, Failure> {
        let _one = self.fetching.lock().await;
        let current = self.header().map(|(generation, _)| generation);
        if current != used {
            return Ok(true);
        }
        let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let text = match challenge(texts) {
            None => return Ok(false),
            Some(Challenge::Basic) => match &self.credential {
                // The same name and password will not do another time.
                Some(Credential::Password { username, password }) if used.is_none() => {
                    basic(username, password)
                }
                _ => return Ok(false),
            },
            Some(Challenge::Bearer { realm, service, scope }) => {
                let realm = self.realm(host, plain, &realm)?;
                format!("Bearer {}", self.token(http, host, realm, service, scope).await?)
            }
        };
        let header = HeaderValue::from_str(&text).map(|mut header| {
            header.set_sensitive(true);
            header
        });
        let header = header
            .map_err(|_| Failure::Final("the token or the password cannot stand in a header".to_owned()))?;
        *self.lock() = Some((current.map_or(0, |generation| generation + 1), header));
        Ok(true)
    }

    /// The address of the token service. It gets the password, so it has TLS, unless the registry itself has none.
    fn realm(&self, host: &str, plain: bool, realm: &str) -> Result<Url, Failure> {
        let refused = |reason: &str| {
            Failure::Final(format!(
                "the registry names {:?} as its token service, {reason}",
                printable(realm)
            ))
        };
        let url = Url::parse(realm).map_err(|_| refused("which is no address"))?;
        match url.scheme() {
            "https" => {}
            "http" if plain => {
                // A registry on this machine may have its service here too; nobody else sees a password.
                let here = url.host_str().is_some_and(is_loopback) || url.host_str() == Some(host_of(host));
                if self.credential.is_some() && !here {
                    return Err(refused("which would get the password without TLS"));
                }
            }
            "http" => return Err(refused("without TLS, which it has itself")),
            _ => return Err(refused("which is neither http nor https")),
        }
        Ok(url)
    }

    async fn token(
        &self,
        http: &Http,
        host: &str,
        mut url: Url,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String, Failure> {
        let scopes = match self.scopes.is_empty() {
            true => scope.into_iter().collect(),
            false => self.scopes.clone(),
        };
        let what = format!("token service {}", url.host_str().unwrap_or_default());
        let mut authorization = None;
        let request = match &self.credential {
            Some(Credential::IdentityToken(token)) => {
                let scope = scopes.join(" ");
                let fields = [
                    ("grant_type", "refresh_token"),
                    ("client_id", CLIENT_ID),
                    ("service", service.as_deref().unwrap_or_default()),
                    ("scope", &scope),
                    ("refresh_token", token),
                ];
                let encode = |text| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
                let form: Vec<_> =
                    fields.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
                Request::new(Method::POST, url, what)
                    .with(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .carrying(Payload::from(form.join("&").into_bytes()))
            }
            credential => {
                {
                    let mut query = url.query_pairs_mut();
                    query.extend_pairs(service.iter().map(|service| ("service", service)));
                    query.extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
                    if let Some(Credential::Password { username, .. }) = credential {
                        query.append_pair("account", username);
                    }
                }
                if let Some(Credential::Password { username, password }) = credential {
                    authorization = Some(basic(username, password));
                }
                Request::get(url, what)
            }
        };
        let mut request = request.with(ACCEPT, "application/json");
        if let Some(authorization) = authorization {
            request = request.with(AUTHORIZATION, &authorization);
        }
        // No redirects: nobody but the named service sees the password.
        let response = http.once(&request, &request.url, None, false).await?;
        if response.status() != StatusCode::OK {
            return Err(http.refusal(&request.what, host, response).await);
        }
        let body = http.body(&request.what, response, MAX_TOKEN_ANSWER).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|error| {
            Failure::Final(format!("{}: its answer holds no token: {error}", request.what))
        })?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        token.ok_or_else(|| Failure::Final(format!("{}: its answer holds no token", request.what)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, HeaderValue)>> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host without its port.
fn host_of(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))
}
