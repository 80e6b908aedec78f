//! A machine that QEMU runs, told by its monitor what to do.

use std::fs::File;
use std::io::Read;

use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::qmp::{Qmp, QmpError};
use crate::Error;
use crate::snapshot::MAX_STATE;

/// A VM of QEMU.
#[derive(Debug)]
pub(super) struct Machine {
    monitor: Monitor,
    ram: File,
    restored: bool,
    /// What it is to load.
    state: Option<File>,
}

/// The way to a VMM's monitor.
#[derive(Debug)]
enum Monitor {
    /// It has not greeted yet, or nobody has looked.
    Greeting(JoinHandle<Result<Qmp, QmpError>>),
    Ready(Qmp),
    Gone,
}

impl Machine {
    pub(super) fn new(
        monitor: UnixStream,
        ram: File,
        state: Option<File>,
        stalled: watch::Sender<bool>,
    ) -> Self {
        let monitor = Monitor::Greeting(tokio::spawn(Qmp::connect(monitor, stalled)));
        Self { monitor, ram, restored: state.is_some(), state }
    }

    async fn monitor(&mut self) -> Result<&Qmp, Error> {
        if let Monitor::Greeting(greeting) = &mut self.monitor {
            let greeted = greeting.await.map_err(|_| QmpError::Ended)?;
            // What failed once is not tried again: the connection is spent.
            self.monitor = Monitor::Gone;
            self.monitor = Monitor::Ready(greeted?);
        }
        match &self.monitor {
            Monitor::Ready(qmp) => Ok(qmp),
            Monitor::Greeting(_) | Monitor::Gone => Err(QmpError::Ended.into()),
        }
    }

    /// The file behind its RAM, and whether what it writes stays its own.
    pub(super) fn ram(&self) -> (&File, bool) {
        (&self.ram, self.restored)
    }

    pub(super) async fn made(&mut self) -> Result<(), Error> {
        self.monitor().await.map(drop)
    }

    pub(super) async fn load(&mut self) -> Result<(), Error> {
        let Some(state) = self.state.take() else { return Ok(()) };
        let qmp = self.monitor().await?;
        let on = |name: &str| json!({ "capability": name, "state": true });
        let both = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        qmp.execute("migrate-set-capabilities", both).await?;
        qmp.execute_with_fd("getfd", json!({ "fdname": "state" }), &state).await?;
        qmp.execute("migrate-incoming", json!({ "uri": "fd:state" })).await?;
        qmp.loaded().await?;
        Ok(())
    }

    pub(super) async fn pause(&mut self) -> Result<(), Error> {
        self.monitor().await?.execute("stop", json!({})).await?;
        Ok(())
    }

    pub(super) async fn resume(&mut self) -> Result<(), Error> {
        self.monitor().await?.execute("cont", json!({})).await?;
        Ok(())
    }

    pub(super) async fn save_devices(&mut self) -> Result<Vec<u8>, Error> {
        const SET: u32 = 1;
        const NAME: &str = "the state of the devices (memfd_create)";
        let memory = rustix::fs::memfd_create("device-state", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = File::from(memory.map_err(|error| Error::io("make", NAME)(error.into()))?);
        // QEMU takes only a descriptor of the mode in which it would open the file.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
        let out = File::options().write(true).open(&path).map_err(Error::io("open", path))?;
        let qmp = self.monitor().await?;
        qmp.execute_with_fd("add-fd", json!({ "fdset-id": SET }), out).await?;
        let file = json!({ "filename": format!("/dev/fdset/{SET}"), "live": true });
        // `live`: the disks stay this VM's, which may go on.
        let saved = qmp.execute("xen-save-devices-state", file).await;
        qmp.execute("remove-fd", json!({ "fdset-id": SET })).await?;
        saved?;
        let mut state = Vec::new();
        (&memory).take(MAX_STATE + 1).read_to_end(&mut state).map_err(Error::io("read", NAME))?;
        if state.is_empty() || state.len() as u64 > MAX_STATE {
            let got = format!("a device state of {} bytes or more", state.len());
            return Err(QmpError::Protocol { expected: "one of 1 byte to 64 MiB", got }.into());
        }
        Ok(state)
    }

    pub(super) async fn resize_scratch(&mut self, bytes: u64) -> Result<(), Error> {
        let size = json!({ "node-name": "scratch", "size": bytes });
        self.monitor().await?.execute("block_resize", size).await?;
        Ok(())
    }
}
