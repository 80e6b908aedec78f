//! The owner's calls on `api.sock` that change what a sandbox is, and their answers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::SandboxId;
use crate::spec::SandboxSpec;

/// `POST /configure`: makes a parked sandbox somebody's. What is absent stays as in its spec; maps are added to the spec's.
/// Answered with the state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfigureRequest {
    /// Its id from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<SandboxId>,
    /// Host name inside; the id when absent here and in the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Environment of every process.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// User of processes that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Working directory of processes that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// What every client call but /health must carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// The caller's notes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Seconds after which the sandbox is stopped, from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
}

/// `POST /pause`, without a body or with an empty object. Answered when the snapshot is whole; the shim ends after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseRequest {}

/// `POST /snapshot` and `POST /fork`: where the result goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetRequest {
    /// Absolute path of a folder that is not there yet: for a snapshot the template that it becomes, for a fork the snapshot
    /// that the forks are started from, which is the caller's to remove.
    pub path: PathBuf,
}

/// What taking a snapshot did to the sandbox.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Taken {
    /// Milliseconds for which the sandbox stood still; until its end for a pause.
    pub stopped_ms: f64,
    /// Bytes of RAM that were written.
    pub ram_bytes: u64,
    /// Bytes of the disk that were written; none where the file system shares blocks.
    pub disk_bytes: u64,
    /// For a fork: what a sandbox is started with that goes on from it. It has no id, hostname, token and labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<SandboxSpec>,
}
