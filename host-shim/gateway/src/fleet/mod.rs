//! The sandboxes of this machine: started, found again after a restart, ended.
//!
//! Each is a `host-shim run --spec` process of its own session and its folder below `sandboxes/`; the gateway may die and
//! come back without them noticing. The order of writes makes every moment one that a restart can go on from:
//! a record is kept (`Starting`) before its shim is started, becomes `Running` before the client learns the id, `Ending`
//! before its shim is told to end, and goes after the folder is gone.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use sandbox_folder::client::{SandboxClient, Stream, connect_hybrid};
use sandbox_folder::{SandboxId, VSOCK_SOCKET};
use tokio::sync::watch;

use crate::ApiError;
use crate::store::{SandboxRecord, Team};

/// What a client asks for, checked as far as the request alone allows.
#[derive(Clone, Debug)]
pub struct NewSandbox {
    /// A template's id, alias or name with a tag, as the client wrote it.
    pub template: String,
    /// Time until it is ended.
    pub timeout: Duration,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every process.
    pub env: BTreeMap<String, String>,
    /// Whether envd calls need a token.
    pub secure: bool,
    /// Whether requests to its ports need no token.
    pub public_traffic: bool,
}

/// A sandbox that runs.
#[derive(Debug)]
pub struct Sandbox {
    /// Its folder.
    pub dir: PathBuf,
    record: Mutex<SandboxRecord>,
    gone: watch::Sender<bool>,
}

impl Sandbox {
    /// A sandbox in the folder `dir`.
    pub fn new(dir: PathBuf, record: SandboxRecord) -> Self {
        Self { dir, record: Mutex::new(record), gone: watch::Sender::new(false) }
    }

    /// What is known about it.
    pub fn record(&self) -> SandboxRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens a stream to a door of its agent.
    pub async fn dial(&self, door: u32) -> io::Result<Stream> {
        connect_hybrid(&self.dir.join(VSOCK_SOCKET), door).await
    }

    /// A client of its agent, with its token.
    pub fn client(&self) -> SandboxClient {
        let client = SandboxClient::unix(self.dir.join(VSOCK_SOCKET));
        match &self.record().access_token {
            Some(token) => client.with_token(token),
            None => client,
        }
    }

    /// Returns once it is gone.
    pub async fn gone(&self) {
        // The sender lives as long as `self`.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }
}

/// The sandboxes of this machine.
#[derive(Debug)]
pub struct Fleet {
    sandboxes: Mutex<BTreeMap<SandboxId, Arc<Sandbox>>>,
}

impl Fleet {
    /// A fleet of those sandboxes.
    pub fn holding(sandboxes: Vec<Arc<Sandbox>>) -> Self {
        let by_id = sandboxes.into_iter().map(|sandbox| (sandbox.record().id, sandbox)).collect();
        Self { sandboxes: Mutex::new(by_id) }
    }

    /// Starts a sandbox; returns when it is configured and kept.
    pub async fn create(&self, _team: &Team, _request: NewSandbox) -> Result<Arc<Sandbox>, ApiError> {
        todo!()
    }

    /// The sandbox of that id, whosever it is.
    pub fn get(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Every sandbox, by id.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Moves its end; it is kept when this returns. Whether there was such a sandbox.
    pub async fn set_end(&self, _id: &SandboxId, _end_at: Timestamp) -> Result<bool, ApiError> {
        todo!()
    }

    /// Ends it at once; nothing of it is left when this returns. Whether there was such a sandbox.
    pub async fn kill(&self, _id: &SandboxId) -> Result<bool, ApiError> {
        todo!()
    }
}
