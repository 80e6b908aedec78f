//! QEMU's monitor: a line of JSON for each command, answer and event (QMP, docs/interop/qmp-spec).
//!
//! The VMM is taken for hostile: a guest may have taken it over. Lines are bounded, and events that nobody waits for are
//! dropped as they come, so that neither side grows.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// The longest line that is read. The answers to our commands have some hundred bytes.
const MAX_LINE: usize = 64 << 10;

/// Migration events that nobody has read yet; a load has four.
const MAX_EVENTS: usize = 64;

/// A VMM that does not answer for so long hangs. Commands take milliseconds, also on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// What can go wrong with the monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused.
    #[error("QEMU refused {command}: {message}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        message: String,
    },
    /// QEMU did not answer.
    #[error("QEMU did not answer {command} within {} s", DEADLINE.as_secs())]
    NoAnswer {
        /// The command, or what was waited for.
        command: &'static str,
    },
    /// QEMU said what it must not.
    #[error("QEMU's monitor said {got}, expected {expected}")]
    Protocol {
        /// What was expected.
        expected: &'static str,
        /// What came.
        got: String,
    },
    /// The device state could not be loaded.
    #[error("QEMU could not load the device state: {0}")]
    Load(String),
    /// The connection ended: the VMM has.
    #[error("QEMU's monitor is gone")]
    Ended,
    /// The operating system refused.
    #[error("QEMU's monitor: {0}")]
    Io(#[from] io::Error),
}

/// Who waits for which answer; nothing once the monitor is gone.
type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Value>>>>>;

/// The monitor of one VMM.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: Arc<UnixStream>,
    last_id: AsyncMutex<u64>,
    pending: Pending,
    migration: AsyncMutex<mpsc::Receiver<String>>,
    _reader: AbortOnDropHandle<()>,
}

impl Qmp {
    /// Greets the monitor at the other end of `stream`.
    /// `stalled` is told when the VM stands still because there is no space for what its guest writes.
    pub(super) async fn connect(stream: UnixStream, stalled: watch::Sender<bool>) -> Result<Self, QmpError> {
        let stream = Arc::new(stream);
        let pending = Pending::new(Mutex::new(Some(HashMap::new())));
        let (events, migration) = mpsc::channel(MAX_EVENTS);
        let (greeted, greeting) = oneshot::channel();
        let reader = read(Arc::clone(&stream), Arc::clone(&pending), events, stalled, greeted);
        let reader = AbortOnDropHandle::new(tokio::spawn(reader));
        let qmp = Self {
            stream,
            last_id: AsyncMutex::new(0),
            pending,
            migration: migration.into(),
            _reader: reader,
        };
        timely("the greeting", async { greeting.await.map_err(|_| QmpError::Ended) }).await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Carries out a command.
    pub(super) async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, arguments, None).await
    }

    /// Carries out a command that takes a file descriptor.
    pub(super) async fn execute_with_fd(
        &self,
        command: &'static str,
        arguments: Value,
        fd: impl AsFd,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, Some(fd.as_fd())).await
    }

    /// Waits until an incoming migration has come to its end, a good one.
    pub(super) async fn loaded(&self) -> Result<(), QmpError> {
        let mut migration = self.migration.lock().await;
        let done = async {
            loop {
                match migration.recv().await.ok_or(QmpError::Ended)?.as_str() {
                    "completed" => return Ok(()),
                    status @ ("failed" | "cancelled") => return Err(QmpError::Load(status.to_owned())),
                    _ => {}
                }
            }
        };
        timely("the device state", done).await
    }

    async fn send(
        &self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let exchange = async {
            let answer = {
                // Held over the write: a line is not to be cut by another.
                let mut last_id = self.last_id.lock().await;
                *last_id += 1;
                let (reply, answer) = oneshot::channel();
                match self.pending.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    Some(pending) => pending.insert(*last_id, reply),
                    None => return Err(QmpError::Ended),
                };
                let line = json!({ "execute": command, "arguments": arguments, "id": *last_id });
                self.write(format!("{line}\n").as_bytes(), fd).await?;
                answer
            };
            answer.await.map_err(|_| QmpError::Ended)
        };
        let mut answer = timely(command, exchange).await?;
        if let Some(error) = answer.get("error") {
            let message = error.get("desc").and_then(Value::as_str).unwrap_or("for no reason").to_owned();
            return Err(QmpError::Refused { command, message });
        }
        Ok(answer.get_mut("return").map(Value::take).unwrap_or_default())
    }

    async fn write(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || {
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds: Vec<_> = fd.into_iter().collect();
                if !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                }
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(rustix::net::sendmsg(&*self.stream, &[IoSlice::new(bytes)], &mut control, flags)?)
            });
            let sent = sent.await?;
            // It went with the first byte.
            fd = None;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

async fn timely<T>(
    command: &'static str,
    work: impl Future<Output = Result<T, QmpError>>,
) -> Result<T, QmpError> {
    tokio::time::timeout(DEADLINE, work).await.unwrap_or(Err(QmpError::NoAnswer { command }))
}

/// Gives answers to whoever waits for them, until the VMM is gone or says what it must not.
async fn read(
    stream: Arc<UnixStream>,
    pending: Pending,
    migration: mpsc::Sender<String>,
    stalled: watch::Sender<bool>,
    greeted: oneshot::Sender<()>,
) {
    let mut greeted = Some(greeted);
    let mut lines = Lines { stream, buffer: Vec::new() };
    let reason = loop {
        let message = match lines.next().await {
            Ok(Some(line)) => match serde_json::from_slice::<Value>(&line) {
                Ok(message) => message,
                Err(error) => break error.to_string(),
            },
            Ok(None) => break "it was closed".to_owned(),
            Err(error) => break error.to_string(),
        };
        if message.get("QMP").is_some() {
            if let Some(greeted) = greeted.take() {
                let _ = greeted.send(());
            }
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            let mut waiting = pending.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(reply) = waiting.as_mut().and_then(|waiting| waiting.remove(&id)) {
                let _ = reply.send(message);
            }
        } else if message.get("event").and_then(Value::as_str) == Some("MIGRATION")
            && let Some(status) = message.pointer("/data/status").and_then(Value::as_str)
        {
            // Without a reader the queue is full at some time: then nobody waits for it.
            let _ = migration.try_send(status.to_owned());
        } else if message.get("event").and_then(Value::as_str) == Some("BLOCK_IO_ERROR")
            && message.pointer("/data/action").and_then(Value::as_str) == Some("stop")
        {
            // QEMU stops a VM for want of space, and reports every other error to its guest (`werror=enospc`).
            stalled.send_replace(true);
        }
    };
    tracing::debug!(reason, "the monitor ended");
    pending.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// Lines of a bounded length. Its writer is another owner of the socket.
struct Lines {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(searched + at + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            searched = self.buffer.len();
            if searched > MAX_LINE {
                let reason = format!("a line of more than {MAX_LINE} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            self.stream.readable().await?;
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

    /// A monitor that answers each command with the next of `answers`.
    async fn monitor(answers: &'static [&'static str]) -> Result<Qmp, QmpError> {
        let (near, far) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let (read, mut write) = far.into_split();
            let mut lines = BufReader::new(read).lines();
            write.write_all(b"{\"QMP\":{}}\n").await.unwrap();
            for answer in ["{\"return\":{},\"id\":ID}"].iter().chain(answers) {
                let Some(line) = lines.next_line().await.unwrap() else { return };
                let id = serde_json::from_str::<Value>(&line).unwrap()["id"].to_string();
                write.write_all(format!("{}\n", answer.replace("ID", &id)).as_bytes()).await.unwrap();
            }
        });
        Qmp::connect(near, watch::Sender::new(false)).await
    }

    #[tokio::test]
    async fn a_vm_that_stands_still_for_want_of_space_is_told() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let stalled = watch::Sender::new(false);
        let mut told = stalled.subscribe();
        let connecting = tokio::spawn(Qmp::connect(near, stalled));
        let event =
            |action| format!("{{\"event\":\"BLOCK_IO_ERROR\",\"data\":{{\"action\":\"{action}\"}}}}\n");
        far.write_all(event("report").as_bytes()).await.unwrap();
        far.write_all(b"{\"QMP\":{}}\n").await.unwrap();
        let mut line = String::new();
        BufReader::new(&mut far).read_line(&mut line).await.unwrap();
        assert!(line.contains("qmp_capabilities") && !*told.borrow(), "{line}");
        far.write_all(event("stop").as_bytes()).await.unwrap();
        assert!(*told.wait_for(|stalled| *stalled).await.unwrap());
        connecting.abort();
    }

    #[tokio::test]
    async fn answers_find_their_commands_among_events() {
        let qmp = monitor(&[
            "{\"event\":\"STOP\"}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"active\"}}\n{\"return\":{\"a\":1},\"id\":ID}",
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"},\"id\":ID}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"failed\"}}",
        ])
        .await
        .unwrap();
        assert_eq!(qmp.execute("stop", json!({})).await.unwrap(), json!({"a": 1}));
        let error = qmp.execute("cont", json!({})).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused cont: no");
        assert!(matches!(qmp.loaded().await, Err(QmpError::Load(status)) if status == "failed"));
        assert!(matches!(qmp.execute("cont", json!({})).await, Err(QmpError::Ended)));
    }

    #[tokio::test]
    async fn a_monitor_that_floods_is_given_up() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let flood = tokio::spawn(async move {
            while far.write_all(&[b' '; 4096]).await.is_ok() {}
            let mut rest = Vec::new();
            let _ = far.read_to_end(&mut rest).await;
        });
        assert!(matches!(Qmp::connect(near, watch::Sender::new(false)).await, Err(QmpError::Ended)));
        flood.await.unwrap();
    }
}
