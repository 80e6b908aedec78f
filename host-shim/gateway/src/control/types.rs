//! What the control API's bodies hold. Names and optional fields are those of the published clients' models.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{CLIENT_ID, ENVD_VERSION};
use crate::ApiError;
use crate::store::{OnTimeout, SandboxRecord, Stage};

/// A refusal.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub(super) struct ErrorBody {
    /// The status again.
    code: u16,
    /// What, where, expected and got, what to do.
    message: String,
    /// A name for programs, where one is defined.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    error_code: Option<String>,
}

impl ErrorBody {
    /// A refusal as a part of an answer.
    pub(super) fn of(error: &ApiError) -> Self {
        Self {
            code: error.status.as_u16(),
            message: error.message.clone(),
            error_code: error.error_code.map(str::to_owned),
        }
    }
}

/// What a create asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewSandbox {
    /// A template's id or alias, also as `namespace/alias` or `alias:tag`.
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    /// Seconds until it is ended or paused: 300 by default, 15 on the older route.
    pub(super) timeout: Option<u64>,
    /// The client's own notes.
    pub(super) metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process.
    pub(super) env_vars: Option<BTreeMap<String, String>>,
    /// Whether calls of the agent need a token. Only the older route reads it; the newer one always gives a token.
    pub(super) secure: Option<bool>,
    /// Accepted whatever it is: sandboxes have no network of their own yet, and say so as `allowInternetAccess: false`.
    #[serde(rename = "allow_internet_access")]
    #[expect(dead_code, reason = "its type is checked, and its place is in the document")]
    pub(super) allow_internet_access: Option<bool>,
    /// Who may reach it, and whom it may reach.
    pub(super) network: Option<NewNetwork>,
    /// Pause it at its end, instead of ending it.
    pub(super) auto_pause: Option<bool>,
    /// Keep its memory when it is paused; `false` is refused.
    pub(super) auto_pause_memory: Option<bool>,
    /// Resume it when a request comes for it while it is paused.
    pub(super) auto_resume: Option<AutoResume>,
    /// MCP servers: not served yet, refused.
    #[schema(value_type = Option<Object>)]
    pub(super) mcp: Option<Value>,
    /// Workload identity: not served yet, refused.
    #[schema(value_type = Option<Object>)]
    pub(super) iam: Option<Value>,
    /// Volumes: not served yet, refused.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) volume_mounts: Option<Value>,
}

/// Network of a new sandbox. Everything but `allowPublicTraffic` is refused: not served yet.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewNetwork {
    /// Whether requests to its ports need no token; true by default.
    pub(super) allow_public_traffic: Option<bool>,
    /// Whom it may reach.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) allow_out: Option<Value>,
    /// Whom it may not reach.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) deny_out: Option<Value>,
    /// The Host that its ports see.
    #[schema(value_type = Option<String>)]
    pub(super) mask_request_host: Option<Value>,
    /// A proxy for what it sends.
    #[schema(value_type = Option<Object>)]
    pub(super) egress_proxy: Option<Value>,
    /// Rules for what it sends.
    #[schema(value_type = Option<Object>)]
    pub(super) rules: Option<Value>,
    /// Its name servers.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) dns_servers: Option<Value>,
    /// Ports that speak TLS themselves.
    #[schema(value_type = Option<Vec<Object>>)]
    pub(super) https_ports: Option<Value>,
}

/// Resuming of a new sandbox.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct AutoResume {
    /// Whether it is resumed when it is asked for.
    pub(super) enabled: Option<bool>,
}

/// What a connect asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct ConnectSandbox {
    /// Seconds from now to its end, if that is later than its end now; 300 by default.
    pub(super) timeout: Option<u64>,
    /// Whether a paused sandbox comes back with its memory; `false` is refused.
    pub(super) memory: Option<bool>,
}

/// What a resume of older clients asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ResumeSandbox {
    /// Seconds from now to its end; 15 by default.
    pub(super) timeout: Option<u64>,
    /// Whether it is paused at its end; as before where nothing is said.
    pub(super) auto_pause: Option<bool>,
    /// Whether it comes back with its memory; `false` is refused.
    pub(super) memory: Option<bool>,
}

/// What a pause asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct PauseSandbox {
    /// Whether its memory is kept; `false` is refused.
    pub(super) memory: Option<bool>,
    /// Accepted whatever it is: a sandbox whose agent does not answer is never paused.
    #[expect(dead_code, reason = "its type is checked, and its place is in the document")]
    pub(super) require_healthy_guest: Option<bool>,
}

/// What a snapshot asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct NewSnapshot {
    /// A name for it, `NAME` or `NAME:TAG`; another snapshot of the team that has it loses it.
    pub(super) name: Option<String>,
    /// Whether memory is in it; `false` is refused.
    pub(super) memory: Option<bool>,
}

/// What a fork asks for.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct ForkSandbox {
    /// Seconds until the forks are ended or paused; 15 by default.
    pub(super) timeout: Option<u64>,
    /// How many, 1 to 100; 1 by default.
    pub(super) count: Option<u32>,
}

/// A new end of a sandbox.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewTimeout {
    /// Seconds from now to its end; earlier than before is fine.
    pub(super) timeout: u64,
}

/// A sign that a sandbox is still wanted.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct Refresh {
    /// Seconds from now to its end, if that is later than its end now; at least 15.
    pub(super) duration: Option<u64>,
}

/// A sandbox as its maker gets it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Sandbox)]
pub(super) struct CreatedSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// Always the same.
    #[serde(rename = "clientID")]
    client_id: &'static str,
    /// The version of E2B's envd whose features it has.
    envd_version: &'static str,
    /// What the client called the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    alias: Option<String>,
    /// What every call of the agent must carry as X-Access-Token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    envd_access_token: Option<String>,
    /// What requests to its ports must carry as e2b-traffic-access-token; null where they are public.
    traffic_access_token: Option<String>,
    /// The domain of its host names, `<port>-<sandboxID>.<domain>`.
    domain: Option<String>,
}

impl CreatedSandbox {
    pub(super) fn of(record: SandboxRecord, domain: &str) -> Self {
        Self {
            template_id: record.template,
            sandbox_id: record.id.to_string(),
            client_id: CLIENT_ID,
            envd_version: ENVD_VERSION,
            alias: record.alias,
            envd_access_token: record.access_token,
            traffic_access_token: record.traffic_token,
            domain: Some(domain.to_owned()),
        }
    }
}

/// Whether a sandbox runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum SandboxState {
    Running,
    Paused,
}

impl SandboxState {
    /// What clients are told. One that is being resumed is there for them: a request waits for it.
    pub(super) fn of(stage: Stage) -> Self {
        match stage {
            Stage::Pausing | Stage::Paused => Self::Paused,
            Stage::Starting | Stage::Running | Stage::Resuming | Stage::Ending => Self::Running,
        }
    }
}

/// A sandbox in a list.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListedSandbox {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    /// Always the same.
    #[serde(rename = "clientID")]
    client_id: &'static str,
    /// When it was started.
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    /// When it is ended or paused; since when it is paused.
    #[schema(value_type = String, format = DateTime)]
    end_at: Timestamp,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    state: SandboxState,
    /// The version of E2B's envd whose features it has.
    envd_version: &'static str,
    /// What the client called the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    alias: Option<String>,
    metadata: BTreeMap<String, String>,
    /// Not served yet: empty.
    #[schema(value_type = Vec<Object>)]
    volume_mounts: [Value; 0],
}

impl From<SandboxRecord> for ListedSandbox {
    fn from(record: SandboxRecord) -> Self {
        Self {
            template_id: record.template,
            sandbox_id: record.id.to_string(),
            client_id: CLIENT_ID,
            started_at: to_millisecond(record.started_at),
            end_at: to_millisecond(record.end_at),
            cpu_count: record.cpus,
            memory_mb: record.memory_mib,
            disk_size_mb: record.disk_mib,
            state: SandboxState::of(record.stage),
            envd_version: ENVD_VERSION,
            alias: record.alias,
            metadata: record.metadata,
            volume_mounts: [],
        }
    }
}

/// A sandbox with all that its team may know.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxDetail {
    #[serde(flatten)]
    listed: ListedSandbox,
    /// What every call of the agent must carry as X-Access-Token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    envd_access_token: Option<String>,
    /// The domain of its host names, `<port>-<sandboxID>.<domain>`.
    domain: Option<String>,
    /// Sandboxes have no network of their own yet.
    allow_internet_access: Option<bool>,
    network: SandboxNetwork,
    lifecycle: SandboxLifecycle,
}

/// Who may reach a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct SandboxNetwork {
    /// Whether requests to its ports need no token.
    allow_public_traffic: bool,
}

/// What happens to a sandbox at its end.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct SandboxLifecycle {
    /// Whether a request resumes it.
    auto_resume: bool,
    #[schema(value_type = String)]
    on_timeout: OnTimeout,
}

impl SandboxDetail {
    pub(super) fn of(record: SandboxRecord, domain: &str) -> Self {
        Self {
            envd_access_token: record.access_token.clone(),
            domain: Some(domain.to_owned()),
            allow_internet_access: Some(false),
            network: SandboxNetwork { allow_public_traffic: record.traffic_token.is_none() },
            lifecycle: SandboxLifecycle {
                auto_resume: record.life.auto_resume,
                on_timeout: record.life.on_timeout,
            },
            listed: record.into(),
        }
    }
}

/// Clients' clocks are no finer, and what they send back must be what they got.
pub(super) fn to_millisecond(time: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time)
}
