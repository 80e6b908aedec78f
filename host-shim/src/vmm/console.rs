//! What a guest or a VMM prints: kept in a bounded file and, its end, in memory.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

/// Bytes of a log file before it becomes `NAME.1` and a new one begins: a guest that floods its console fills at most
/// twice this, and its last words are always there.
const MAX_FILE: u64 = 512 << 10;

/// Bytes that are kept in memory for an error message: a kernel's panic with its call trace.
const TAIL: usize = 4 << 10;

/// How long the rest of the output may take to arrive after the writer's death.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// A reader of what somebody prints.
#[derive(Debug)]
pub struct Console {
    tail: Arc<Mutex<VecDeque<u8>>>,
    task: JoinHandle<()>,
}

impl Console {
    /// Reads `source` to its end, into `file` when one is given.
    pub fn spawn(source: impl AsyncRead + Send + Unpin + 'static, file: Option<PathBuf>) -> Self {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let task = tokio::spawn(copy(source, file, Arc::clone(&tail)));
        Self { tail, task }
    }

    /// Waits until everything was read; the writer must be gone.
    pub async fn drained(&mut self) {
        if !self.task.is_finished() {
            // A deadline, since a process that the writer left behind could hold its end open.
            let _ = tokio::time::timeout(DRAIN_DEADLINE, &mut self.task).await;
        }
    }

    /// The end of what was printed, as printable text of whole lines.
    pub fn tail(&self) -> String {
        let bytes: Vec<u8> =
            self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let whole =
            if bytes.len() < TAIL { &text[..] } else { text.split_once('\n').map_or("", |cut| cut.1) };
        // Escape sequences of a hostile guest must not reach the user's terminal.
        let mut out: String = whole.chars().filter(|&c| c == '\n' || c == '\t' || !c.is_control()).collect();
        if !out.is_empty() && !out.ends_with('\n') {
            out.push('\n');
        }
        out
    }
}

async fn copy(
    mut source: impl AsyncRead + Send + Unpin,
    path: Option<PathBuf>,
    tail: Arc<Mutex<VecDeque<u8>>>,
) {
    let mut file = match &path {
        Some(path) => File::create(path).await.ok(),
        None => None,
    };
    let mut written = 0;
    let mut buffer = vec![0; 8 << 10];
    // An end by error is an end: the VMM is gone.
    while let Ok(count @ 1..) = source.read(&mut buffer).await {
        let bytes = &buffer[..count];
        {
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            tail.extend(bytes);
            let excess = tail.len().saturating_sub(TAIL);
            tail.drain(..excess);
        }
        if let (Some(out), Some(path)) = (&mut file, &path) {
            if written + count as u64 > MAX_FILE {
                match rotate(path).await {
                    Ok(fresh) => *out = fresh,
                    Err(error) => {
                        tracing::warn!(%error, path = %path.display(), "cannot start a new log file")
                    }
                }
                written = 0;
            }
            // A full disk must not stop the reading, which would stop the guest.
            if let Err(error) = out.write_all(bytes).await.and(out.flush().await) {
                tracing::warn!(%error, path = %path.display(), "cannot write the log");
            }
            written += count as u64;
        }
    }
}

async fn rotate(path: &Path) -> std::io::Result<File> {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    tokio::fs::rename(path, old).await?;
    File::create(path).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_is_bounded_and_its_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let (mut guest, host) = tokio::io::duplex(1 << 16);
        let mut console = Console::spawn(host, Some(path.clone()));
        let line = [b'x'; 1023].into_iter().chain([b'\n']).collect::<Vec<_>>();
        for _ in 0..3 * MAX_FILE / 1024 {
            guest.write_all(&line).await.unwrap();
        }
        guest.write_all(b"\x1b[31mKernel panic\0").await.unwrap();
        drop(guest);
        console.drained().await;
        let sizes =
            ["console.log", "console.log.1"].map(|name| dir.path().join(name).metadata().unwrap().len());
        assert!(sizes.iter().all(|&size| size <= MAX_FILE), "{sizes:?}");
        assert!(std::fs::read(&path).unwrap().ends_with(b"Kernel panic\0"));
        assert!(console.tail().ends_with("[31mKernel panic\n"), "{:?}", console.tail());
        assert!(console.tail().len() <= TAIL);
    }
}
