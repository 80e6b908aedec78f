//! A machine that Firecracker runs, told by its API what to do.

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::api::{Api, ApiError, CREATE, Call};
use super::{SCRATCH_DRIVE, SNAPSHOT_LINK, load_call, pause_call, resume_call};
use crate::Error;
use crate::snapshot::{FileName, MAX_STATE};

/// How Rust's standard library says ENOSPC.
const NO_SPACE: &str = "(os error 28)";

/// What a snapshot of a machine begins with, before the machine stands still.
#[derive(Debug)]
pub enum Prepare {
    /// The files of the snapshot that it goes on from.
    Base,
    /// Empty files, which the VMM fills.
    Empty,
    /// A copy of this as its RAM, into which the VMM writes what has changed since.
    Copy(File),
}

/// A VM of Firecracker.
///
/// RAM of a booted one is in no file, and a snapshot has all of it. One that was restored counts the pages that it
/// writes: a snapshot of it is what it goes on from, with those pages over it.
#[derive(Debug)]
pub struct Machine {
    api: Api,
    /// Where it runs: paths that it keeps in its snapshots are relative to it.
    folder: PathBuf,
    /// How it comes to life; nothing is left of it afterwards.
    start: Vec<Call>,
    /// The RAM as of when its count of written pages began. Unknown after a failure: the next snapshot has all of it then.
    base: Option<File>,
    /// Whether it counts them.
    counts: bool,
    disconnected: bool,
}

impl Machine {
    pub(super) fn booting(folder: &Path, start: Vec<Call>) -> Self {
        Self::new(folder, start, None, false)
    }

    /// `counting`: what has it count what it writes, so that its snapshots can be written into a copy of `ram`.
    pub(super) fn restored(folder: &Path, ram: File, counting: Option<&str>) -> Self {
        let counts = counting.is_some();
        Self::new(folder, vec![load_call(counting)], Some(ram).filter(|_| counts), counts)
    }

    fn new(folder: &Path, start: Vec<Call>, base: Option<File>, counts: bool) -> Self {
        let api = Api::at(&folder.join(super::API));
        Self { api, folder: folder.to_owned(), start, base, counts, disconnected: false }
    }

    pub(in crate::vmm) async fn made(&mut self) -> Result<(), ApiError> {
        self.api.ready().await
    }

    pub(in crate::vmm) async fn boot(&mut self) -> Result<(), ApiError> {
        self.made().await?;
        for call in std::mem::take(&mut self.start) {
            self.api.call(&call).await?;
        }
        Ok(())
    }

    /// The same words, others in them.
    pub(in crate::vmm) async fn load(&mut self) -> Result<(), ApiError> {
        self.boot().await
    }

    pub(in crate::vmm) async fn pause(&mut self) -> Result<(), ApiError> {
        self.api.call(&pause_call()).await
    }

    pub(in crate::vmm) async fn resume(&mut self) -> Result<(), ApiError> {
        self.api.call(&resume_call()).await
    }

    pub(in crate::vmm) fn prepare_capture(&self) -> Result<Prepare, Error> {
        match &self.base {
            Some(base) => Ok(Prepare::Copy(base.try_clone().map_err(Error::io("share", "the guest's RAM"))?)),
            None => Ok(Prepare::Empty),
        }
    }

    /// Writes `state` and `ram` of `folder`, whose `ram` is what [`Machine::prepare_capture`] said.
    pub(in crate::vmm) async fn capture(&mut self, folder: &Path) -> Result<(), Error> {
        // By a link: a path of any length and of any bytes has no place in JSON.
        let link = self.folder.join(SNAPSHOT_LINK);
        symlink(folder, &link).map_err(Error::io("make the link", &link))?;
        let path = |name: FileName| format!("{SNAPSHOT_LINK}/{name}");
        let kind = if self.base.take().is_some() { "Diff" } else { "Full" };
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": path(FileName::State),
            "mem_file_path": path(FileName::Ram),
        });
        // Also where it fails: the guest is told before anything is written.
        self.disconnected = true;
        let written = self.api.call(&Call::put(CREATE, body)).await;
        std::fs::remove_file(&link).map_err(Error::io("remove", &link))?;
        match written {
            // Its words are all that there is of the system's number.
            Err(ApiError::Refused { fault, .. }) if fault.contains(NO_SPACE) => {
                return Err(Error::io("write", folder)(rustix::io::Errno::NOSPC.into()));
            }
            written => written?,
        }
        let state = folder.join(FileName::State.as_str());
        let bytes = state.metadata().map_err(Error::io("read", &state))?.len();
        if bytes == 0 || bytes > MAX_STATE {
            let got = format!("a state of {bytes} bytes");
            let request = format!("PUT {CREATE}");
            return Err(ApiError::Protocol { request, expected: "one of 1 byte to 64 MiB", got }.into());
        }
        if self.counts {
            let ram = folder.join(FileName::Ram.as_str());
            self.base = Some(File::open(&ram).map_err(Error::io("open", &ram))?);
        }
        Ok(())
    }

    pub(in crate::vmm) fn take_disconnected(&mut self) -> bool {
        std::mem::take(&mut self.disconnected)
    }

    /// Has the guest look at the scratch disk's size again.
    pub(in crate::vmm) async fn resize_scratch(&mut self) -> Result<(), ApiError> {
        let body = json!({ "drive_id": SCRATCH_DRIVE, "path_on_host": SCRATCH_DRIVE });
        self.api.call(&Call::patch(format!("/drives/{SCRATCH_DRIVE}"), body)).await
    }
}
