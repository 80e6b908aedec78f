//! Cleaning up after a shim that was killed with SIGKILL.
//!
//! A small process holds the read end of a pipe whose write end only the shim has. A shim that ends in order says so
//! first; an end of file without that word means that it was killed, and the reaper sweeps its folder, and the one where
//! the shim was writing a snapshot. The VMM needs no help: the kernel kills it ([`crate::vmm::process`]).
//!
//! ```text
//! shim ── "/where/it/writes\0" ... "clean\0" ──► reaper
//! ```

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, PipeWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Error, dir, snapshot};

/// The name of the hidden subcommand.
pub const REAP: &str = "reap";

/// What a shim says that has cleaned up itself.
const CLEAN: &[u8] = b"clean\0";

/// The longest word that is read: a path of Linux, and its end.
const MAX_WORD: u64 = 4096 + 1;

/// How often, and at which interval, the reaper tries to take the folder. The kernel closes a dying process's files
/// one by one, so the pipe can end before the lock is free; a folder that stays locked has another shim by now.
const ATTEMPTS: u32 = 200;
const INTERVAL: Duration = Duration::from_millis(5);

/// The reaper of this shim. Dropped without [`Reaper::release`], it sweeps.
#[derive(Debug)]
pub struct Reaper {
    child: Child,
    life: PipeWriter,
}

impl Reaper {
    /// Starts the reaper of `folder`.
    pub fn start(folder: &Path) -> Result<Self, Error> {
        let make = || {
            // Both ends are close-on-exec: no other child holds the write end.
            let (death, life) = io::pipe()?;
            let child = Command::new("/proc/self/exe")
                .arg(REAP)
                .arg(folder)
                .stdin(death)
                // Whoever reads the shim's output until its end must not wait for the reaper too.
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                // The terminal's Ctrl-C is not for it.
                .process_group(0)
                .current_dir("/")
                .spawn()?;
            Ok(Self { child, life })
        };
        make().map_err(|source| Error::Spawn { program: format!("host-shim {REAP}"), source })
    }

    /// Tells where a snapshot is being written from now on, beside the folder. Only the last place counts.
    pub fn sweeps(&mut self, folder: &Path) {
        let mut word = folder.as_os_str().as_bytes().to_owned();
        word.push(0);
        if let Err(error) = self.life.write_all(&word) {
            tracing::warn!(%error, "the reaper is gone: what a killed shim leaves is swept by the next one");
        }
    }

    /// Ends the reaper without a sweep: everything was cleaned up. One that was killed is not missed.
    pub fn release(mut self) {
        let told = self.life.write_all(CLEAN);
        drop(self.life);
        if let Err(error) = told.and_then(|()| self.child.wait().map(drop)) {
            tracing::warn!(%error, "the reaper ended before its shim");
            // Of a killed child nothing is left but its status.
            let _ = self.child.wait();
        }
    }
}

/// The reaper's work: waits for the end of `shim`, and sweeps `folder` unless it was told that there is nothing to.
pub fn reap(shim: impl Read, folder: &Path) -> Result<(), Error> {
    let mut shim = BufReader::new(shim);
    let mut writes = None;
    loop {
        let mut word = Vec::new();
        // A failed read is as good as an end: the shim cannot be heard any more.
        let read = (&mut shim).take(MAX_WORD).read_until(0, &mut word);
        if word == CLEAN {
            return Ok(());
        }
        match word.strip_suffix(b"\0") {
            Some(path) if read.is_ok() => writes = Some(PathBuf::from(OsStr::from_bytes(path))),
            _ => break,
        }
    }
    // Its own folder first, whatever can be said of the other.
    let swept = sweep(folder);
    if let Some(writes) = writes {
        // Two shims can write there: only what nobody holds is removed.
        for _ in 0..ATTEMPTS {
            if !snapshot::sweep(&writes)?.is_empty() || !template::sweep(&writes)?.is_empty() {
                break;
            }
            std::thread::sleep(INTERVAL);
        }
    }
    swept
}

fn sweep(folder: &Path) -> Result<(), Error> {
    for _ in 0..ATTEMPTS {
        if !folder.exists() || dir::sweep_one(folder)? != dir::Swept::Untouched {
            return Ok(());
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dir::SandboxDir;

    #[test]
    fn a_reaper_that_was_killed_is_not_missed() {
        let (death, life) = io::pipe().unwrap();
        let child = Command::new("true").stdin(death).spawn().unwrap();
        let pid = child.id();
        let mut reaper = Reaper { child, life };
        reaper.child.wait().unwrap();
        reaper.release();
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it is no zombie");
    }

    #[test]
    fn only_a_shim_that_did_not_clean_up_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let id = "abc1".parse().unwrap();
        let path = SandboxDir::create(root.path(), &id).unwrap().path().to_owned();
        reap(CLEAN, &path).unwrap();
        assert!(path.exists());
        reap(io::empty(), &path).unwrap();
        assert!(!path.exists());
        reap(io::empty(), &path).unwrap();
    }
}
