//! Changes in the sandbox's directories.

use envd_proto::filesystem::watch_dir_response::Event;
use envd_proto::filesystem::{FilesystemEvent, WatchDirRequest, WatchDirResponse};

use super::stream::Messages;
use super::{ClientError, SandboxClient};

/// A directory that is watched for as long as this is kept.
pub struct Watch(Messages<WatchDirResponse>);

impl SandboxClient {
    /// Watches a directory; returns once no change is missed any more.
    pub async fn watch_dir(&self, request: WatchDirRequest) -> Result<Watch, ClientError> {
        let mut events = Messages::open(self, "filesystem.Filesystem/WatchDir", &request).await?;
        match events.next().await? {
            Some(WatchDirResponse { event: Some(Event::Start(_)) }) => Ok(Watch(events)),
            other => Err(ClientError::protocol("the start of a watch", format!("{other:?}"))),
        }
    }
}

impl Watch {
    /// The next change; `None` when the agent ended the watch.
    pub async fn next(&mut self) -> Result<Option<FilesystemEvent>, ClientError> {
        loop {
            match self.0.next().await? {
                Some(WatchDirResponse { event: Some(Event::Filesystem(event)) }) => return Ok(Some(event)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }
}
