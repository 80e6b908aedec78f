//! Cleaning up after a shim that was killed with SIGKILL.
//!
//! A small process holds the read end of a pipe whose write end only the shim has. A shim that ends in order says so
//! first; an end of file without that word means that it was killed, and the reaper sweeps its folder. The VMM needs
//! no help: the kernel kills it ([`crate::vmm::process`]).

use std::io::{self, PipeWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::{Error, dir};

/// The name of the hidden subcommand.
pub const REAP: &str = "reap";

/// What a shim says that has cleaned up itself.
const CLEAN: &[u8] = b"clean";

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

    /// Ends the reaper without a sweep: everything was cleaned up.
    pub fn release(mut self) -> Result<(), Error> {
        let end = self.life.write_all(CLEAN).and_then(|()| {
            drop(self.life);
            self.child.wait()
        });
        end.map(drop).map_err(|source| Error::Spawn { program: format!("host-shim {REAP}"), source })
    }
}

/// The reaper's work: waits for the end of `shim`, and sweeps `folder` unless it was told that there is nothing to.
pub fn reap(mut shim: impl Read, folder: &Path) -> Result<(), Error> {
    let mut said = Vec::new();
    // A failed read is as good as an end: the shim cannot be heard any more.
    let _ = shim.read_to_end(&mut said);
    if said == CLEAN {
        return Ok(());
    }
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
