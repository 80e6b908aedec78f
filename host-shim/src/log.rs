//! `shim.log`: JSON lines, bounded.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use tracing_subscriber::EnvFilter;

use crate::Error;

/// What one shim logs at most. Events follow what clients and the guest do, who must not fill the disk with them.
const MAX_LOG: usize = 4 << 20;

/// The log of the shims before on the same folder that a new shim goes on in; a longer one becomes `NAME.1`, in whose place
/// the one before goes. Who restarts or resumes a sandbox for ever does not fill the disk either.
const MAX_BEFORE: u64 = 1 << 20;

/// Environment variable with the log's filter, as `host_shim=debug`.
pub const LOG_ENV: &str = "TIFFIN_LOG";

/// Sends this process's events to the file `path`. The first call of a process counts.
pub fn init(path: &Path) -> Result<(), Error> {
    if fs::metadata(path).is_ok_and(|log| log.len() > MAX_BEFORE) {
        let mut before = path.as_os_str().to_owned();
        before.push(".1");
        fs::rename(path, before).map_err(Error::io("rename", path))?;
    }
    let file = File::options().create(true).append(true).open(path).map_err(Error::io("open", path))?;
    let bounded = std::sync::Mutex::new(Bounded { out: file, left: MAX_LOG });
    let filter = EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call is a second sandbox of a test's process: its events are in the first one's log.
    let _ = tracing_subscriber::fmt().json().with_env_filter(filter).with_writer(bounded).try_init();
    Ok(())
}

/// A writer that drops what is beyond its limit.
struct Bounded<W> {
    out: W,
    left: usize,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() <= self.left {
            self.left -= bytes.len();
            self.out.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_limit_is_dropped() {
        let mut log = Bounded { out: Vec::new(), left: 5 };
        for line in ["abc\n", "def\n", "\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(log.out, b"abc\n\n");
    }

    #[test]
    fn the_logs_of_many_shims_on_a_folder_stay_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shim.log");
        let length = |name: &str| fs::metadata(dir.path().join(name)).unwrap().len();
        fs::write(&path, [b'x'; 100]).unwrap();
        init(&path).unwrap();
        assert_eq!(length("shim.log"), 100, "it goes on in a short one");
        for before in [1, 2] {
            fs::write(&path, vec![b'x'; MAX_LOG + before]).unwrap();
            init(&path).unwrap();
            assert_eq!((length("shim.log"), length("shim.log.1")), (0, (MAX_LOG + before) as u64));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
