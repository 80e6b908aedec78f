//! Terminals: a pair in the container's own devpts.

use std::io;
use std::os::fd::OwnedFd;

use envd_proto::process::Pty;
use rustix::fs::{Gid, Mode, OFlags, Uid, fchown, open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::connect::{Code, Error};

/// What a terminal has when the client names no size, as a VT100.
const DEFAULT_COLUMNS: u16 = 80;
const DEFAULT_ROWS: u16 = 24;

/// Both sides of a terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    /// The agent's.
    pub(super) master: OwnedFd,
    /// The process's.
    pub(super) slave: OwnedFd,
}

/// Opens a terminal for a user. Call it on a thread of the sandbox's root: the devpts must be the container's.
pub(super) fn open_pair(size: Winsize, owner: Option<u32>) -> io::Result<Terminal> {
    // Non-blocking, since these names are the tenant's: a FIFO in their place must not hold the thread.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = |path| open(path, flags, Mode::empty());
    let master = match open("/dev/ptmx") {
        Err(rustix::io::Errno::NOENT) => open("/dev/pts/ptmx")?,
        master => master?,
    };
    // Whatever else stands there is no terminal, and refuses this.
    unlockpt(&master)?;
    // The kernel gives the other side itself: its name could be anything by now.
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    tcsetwinsize(&master, size)?;
    if let Some(owner) = owner {
        // The group stays: devpts gives the one of tty.
        fchown(&slave, Some(Uid::from_raw(owner)), None::<Gid>)?;
    }
    Ok(Terminal { master, slave })
}

/// The size that a client asks for; what is absent or zero is the default.
pub(super) fn size(pty: &Pty) -> Result<Winsize, Error> {
    let size = pty.size.unwrap_or_default();
    let number = |name: &str, value: u32, default: u16| match u16::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) => Ok(value),
        Err(_) => Err(Error::new(
            Code::InvalidArgument,
            format!("pty.size.{name} is {value}: at most {} are possible", u16::MAX),
        )),
    };
    Ok(Winsize {
        ws_col: number("cols", size.cols, DEFAULT_COLUMNS)?,
        ws_row: number("rows", size.rows, DEFAULT_ROWS)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::process::pty::Size;

    #[test]
    fn sizes_have_defaults_and_bounds() {
        let parsed = |cols, rows| {
            let size = size(&Pty { size: Some(Size { cols, rows }) }).map_err(|error| error.code());
            size.map(|size| (size.ws_col, size.ws_row))
        };
        assert_eq!(parsed(100, 30), Ok((100, 30)));
        assert_eq!(parsed(0, 0), Ok((80, 24)));
        assert_eq!(parsed(65536, 30), Err(Code::InvalidArgument));
        assert_eq!(size(&Pty { size: None }).unwrap().ws_row, 24);
    }
}
