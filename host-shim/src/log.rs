//! `shim.log`: JSON lines, bounded.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tracing_subscriber::EnvFilter;

use crate::Error;

/// The log's size at most. Events follow what clients and the guest do, who must not fill the disk with them.
const MAX_LOG: usize = 4 << 20;

/// Environment variable with the log's filter, as `host_shim=debug`.
pub const LOG_ENV: &str = "TIFFIN_LOG";

/// Sends this process's events to the file `path`. The first call of a process counts.
pub fn init(path: &Path) -> Result<(), Error> {
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
}
