//! Creates: what a client may ask for, and the same sandbox for the same `Idempotency-Key`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tracing::Instrument;

use super::access::Caller;
use super::body::{Raw, shown};
use super::types::{CreatedSandbox, NewSandbox};
use super::{Control, MAX_TIMEOUT};
use crate::ApiError;
use crate::fleet::{self, Sandbox};
use crate::identity::{TeamId, hex};
use crate::metrics::Outcome;
use crate::store::{KeptCreate, LifePolicy, OnTimeout, Team};

/// Seconds that a sandbox has where the client does not say.
const DEFAULT_TIMEOUT: u64 = 300;

/// The same, on the older route: its clients refresh every 5 seconds.
const DEFAULT_TIMEOUT_V1: u64 = 15;

/// Names and values of the metadata together; a list holds those of 100 sandboxes.
const MAX_METADATA: usize = 64 << 10;

/// The longest template name: a name of 128, a namespace and a tag.
const MAX_TEMPLATE: usize = 512;

/// The longest `Idempotency-Key` (the published clients' own limit).
const MAX_IDEMPOTENCY_KEY: usize = 255;

/// How long the same `Idempotency-Key` gives the same sandbox. Clients retry for minutes at most.
const KEEP_CREATES: Duration = Duration::from_secs(24 * 3600);

/// Creates a sandbox, whose agent always needs a token.
#[utoipa::path(post, path = "/v2/sandboxes", tag = "sandboxes", request_body = NewSandbox,
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 of a-z, A-Z, 0-9 and `-`: the same key and body \
        give the same sandbox for a day, while it runs")),
    responses((status = 201, body = CreatedSandbox), (status = "4XX", body = super::types::ErrorBody),
        (status = "5XX", body = super::types::ErrorBody)))]
pub(super) async fn create_v2(
    State(control): State<Arc<Control>>,
    caller: Caller,
    headers: HeaderMap,
    body: Raw,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    create(control, caller, &headers, body, false).await
}

/// Creates a sandbox, for older clients.
#[utoipa::path(post, path = "/sandboxes", tag = "sandboxes", request_body = NewSandbox,
    params(("Idempotency-Key" = Option<String>, Header, description = "as for /v2/sandboxes")),
    responses((status = 201, body = CreatedSandbox), (status = "4XX", body = super::types::ErrorBody),
        (status = "5XX", body = super::types::ErrorBody)))]
pub(super) async fn create_v1(
    State(control): State<Arc<Control>>,
    caller: Caller,
    headers: HeaderMap,
    body: Raw,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    create(control, caller, &headers, body, true).await
}

async fn create(
    control: Arc<Control>,
    caller: Caller,
    headers: &HeaderMap,
    body: Raw,
    v1: bool,
) -> Result<(StatusCode, Json<CreatedSandbox>), ApiError> {
    let began = Instant::now();
    let created = try_create(&control, caller, headers, body, v1).await;
    let outcome = match &created {
        Ok(_) => Outcome::Created,
        Err(error) => match error.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Outcome::Full,
            status if status.is_client_error() => Outcome::Refused,
            _ => Outcome::Failed,
        },
    };
    control.gateway.metrics.create_ended(outcome, began.elapsed());
    let record = created?.record();
    tracing::Span::current().record("sandbox", tracing::field::display(&record.id));
    Ok((StatusCode::CREATED, Json(CreatedSandbox::of(record, &control.gateway.config.domain))))
}

async fn try_create(
    control: &Arc<Control>,
    caller: Caller,
    headers: &HeaderMap,
    body: Raw,
    v1: bool,
) -> Result<Arc<Sandbox>, ApiError> {
    let key = idempotency_key(headers)?;
    let wanted = body.parse::<NewSandbox>()?.checked(v1)?;
    // The two routes differ in their defaults: the same body on the other one is another request.
    let digest = hex(&Sha256::new().chain_update([u8::from(v1)]).chain_update(&body.0).finalize());
    let Some(key) = key else {
        // Dropped, because the client went away, it ends what it has begun.
        return control.gateway.fleet.create(&caller.team, wanted).await;
    };
    // On a task of its own: a client that goes away comes back with its key, and finds the sandbox made.
    let control = Arc::clone(control);
    let work = async move { control.create_once(&caller.team, key, digest, wanted).await };
    tokio::spawn(work.in_current_span()).await.map_err(ApiError::internal)?
}

impl Control {
    /// Creates the sandbox of a key, or gives the one that was created for it.
    async fn create_once(
        &self,
        team: &Team,
        key: String,
        digest: String,
        wanted: fleet::NewSandbox,
    ) -> Result<Arc<Sandbox>, ApiError> {
        let _turn = self.creates.turn(team.id.clone(), key.clone()).await;
        let store = &self.gateway.store;
        if let Some(kept) = store.kept_create(&team.id, &key, KEEP_CREATES).await? {
            if kept.digest != digest {
                let message =
                    format!("the Idempotency-Key {key:?} was used with another body: take a fresh one");
                return Err(ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, message));
            }
            let known = self.gateway.fleet.get(&kept.sandbox);
            if let Some(sandbox) = known.filter(|sandbox| sandbox.record().stage.is_alive()) {
                return Ok(sandbox);
            }
        }
        let sandbox = self.gateway.fleet.create(team, wanted).await?;
        let kept = KeptCreate { digest, sandbox: sandbox.record().id };
        store.keep_create(&team.id, &key, &kept, KEEP_CREATES).await?;
        Ok(sandbox)
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    if (1..=MAX_IDEMPOTENCY_KEY).contains(&key.len()) && key.as_bytes().iter().all(plain) {
        return Ok(Some(String::from_utf8_lossy(key.as_bytes()).into_owned()));
    }
    let message =
        format!("invalid Idempotency-Key: expected 1 to {MAX_IDEMPOTENCY_KEY} of a-z, A-Z, 0-9 and '-'");
    Err(ApiError::bad_request(message))
}

impl NewSandbox {
    /// Refuses what is not served; nothing is left out silently.
    fn checked(self, v1: bool) -> Result<fleet::NewSandbox, ApiError> {
        let network = self.network.unwrap_or_default();
        let asked = [
            ("autoPauseMemory: false", self.auto_pause_memory == Some(false)),
            ("mcp", is_given(self.mcp.as_ref())),
            ("iam", is_given(self.iam.as_ref())),
            ("volumeMounts", is_given(self.volume_mounts.as_ref())),
            ("network.allowOut", is_given(network.allow_out.as_ref())),
            ("network.denyOut", is_given(network.deny_out.as_ref())),
            ("network.maskRequestHost", is_given(network.mask_request_host.as_ref())),
            ("network.egressProxy", is_given(network.egress_proxy.as_ref())),
            ("network.rules", is_given(network.rules.as_ref())),
            ("network.dnsServers", is_given(network.dns_servers.as_ref())),
            ("network.httpsPorts", is_given(network.https_ports.as_ref())),
        ];
        if let Some((option, _)) = asked.iter().find(|(_, asked)| *asked) {
            let message = format!("{option} is not supported by this gateway yet: leave it out");
            return Err(ApiError::bad_request(message));
        }
        let template = self.template_id;
        if template.is_empty() || template.len() > MAX_TEMPLATE || template.contains(char::is_control) {
            let message = format!(
                "invalid templateID {:?}: expected 1 to {MAX_TEMPLATE} characters of a name or id",
                shown(&template)
            );
            return Err(ApiError::bad_request(message));
        }
        let default = if v1 { DEFAULT_TIMEOUT_V1 } else { DEFAULT_TIMEOUT };
        Ok(fleet::NewSandbox {
            template,
            timeout: timeout(self.timeout.unwrap_or(default), 1)?,
            metadata: metadata(self.metadata.unwrap_or_default())?,
            env: self.env_vars.unwrap_or_default(),
            secure: !v1 || self.secure == Some(true),
            public_traffic: network.allow_public_traffic != Some(false),
            life: LifePolicy {
                on_timeout: on_timeout(self.auto_pause == Some(true)),
                auto_resume: self.auto_resume.and_then(|resume| resume.enabled) == Some(true),
                timeout_s: 0,
            },
        })
    }
}

/// What `autoPause` asks for.
pub(super) fn on_timeout(auto_pause: bool) -> OnTimeout {
    if auto_pause { OnTimeout::Pause } else { OnTimeout::Kill }
}

/// Whether an option says anything. What is empty asks for nothing.
fn is_given(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(_) => true,
    }
}

/// A time to a sandbox's end.
pub(super) fn timeout(seconds: u64, least: u64) -> Result<Duration, ApiError> {
    if (least..=MAX_TIMEOUT.as_secs()).contains(&seconds) {
        return Ok(Duration::from_secs(seconds));
    }
    let most = MAX_TIMEOUT.as_secs();
    Err(ApiError::bad_request(format!("invalid timeout {seconds}: expected {least} to {most} seconds")))
}

fn metadata(metadata: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, ApiError> {
    let length: usize = metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if length <= MAX_METADATA {
        return Ok(metadata);
    }
    let message = format!("metadata has {length} bytes of names and values, at most {MAX_METADATA} allowed");
    Err(ApiError::bad_request(message))
}

/// The keys whose creates are being done: of two with the same key, the second waits.
#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Mutex<HashMap<Claim, Arc<tokio::sync::Mutex<()>>>>>);

type Claim = (TeamId, String);

impl InFlight {
    async fn turn(&self, team: TeamId, key: String) -> Turn {
        let claim = (team, key);
        let lock = Arc::clone(self.lock().entry(claim.clone()).or_default());
        Turn { held: Some(lock.lock_owned().await), claim, all: self.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Claim, Arc<tokio::sync::Mutex<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to create for a key; the next one's turn begins when it is dropped.
#[derive(Debug)]
struct Turn {
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
    claim: Claim,
    all: InFlight,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        self.held = None;
        // Whoever waits has a reference of its own; new ones are only made under the lock that is held here.
        if all.get(&self.claim).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            all.remove(&self.claim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_key_is_one_turn_and_leaves_nothing() {
        let all = InFlight::default();
        let first = all.turn(TeamId("a".into()), "k".into()).await;
        let second = tokio::spawn({
            let all = all.clone();
            async move { all.turn(TeamId("a".into()), "k".into()).await }
        });
        let other = all.turn(TeamId("b".into()), "k".into()).await;
        while all.lock().values().map(Arc::strong_count).max() != Some(3) {
            tokio::task::yield_now().await;
        }
        assert!(!second.is_finished());
        drop((first, other));
        drop(second.await.unwrap());
        assert!(all.lock().is_empty());
    }
}
