//! From a pipe or a terminal to the log.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;

use envd_sys::watch_readiness;
use rustix::io::{Errno, ioctl_fionbio, ioctl_fionread};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::log::{OutputLog, Stream};

/// What is read at a time: all that a pipe of the default size holds.
const READ_SIZE: usize = 64 << 10;

/// What a terminal can hold when its process has ended: the kernel's buffers (`TTYB_DEFAULT_MEM_LIMIT`, 64 KiB, and the
/// line discipline's 4 KiB), generously. A grandchild may go on writing to it for ever.
const TERMINAL_REST: u64 = 128 << 10;

thread_local! {
    /// One buffer for each of the agent's threads: a pipe that is quiet holds none.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_SIZE]);
}

/// The agent's end of a pipe or a terminal.
#[derive(Debug)]
pub(super) struct Pipe(AsyncFd<OwnedFd>);

/// What one read gave.
enum Taken {
    /// All of it is in the log.
    All(usize),
    /// There was no room for the rest.
    Rest(usize, Vec<u8>),
    End,
}

impl Pipe {
    /// Takes the agent's end. Must be called within a tokio runtime.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        ioctl_fionbio(&fd, true)?;
        Ok(Self(watch_readiness(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// The descriptor, for what is no reading or writing.
    pub(super) fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Writes all bytes; an error when nobody can read them any more.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|pipe| Ok(rustix::io::write(pipe.get_ref(), bytes)?)) {
                Ok(Ok(written)) => bytes = &bytes[written..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Reads what is there now, at most `most` bytes, into the log.
    fn take(&self, stream: Stream, log: &OutputLog, most: usize) -> Result<Taken, Errno> {
        BUFFER.with_borrow_mut(|buffer| {
            let most = most.min(buffer.len());
            let count = rustix::io::read(self.fd(), &mut buffer[..most])?;
            if count == 0 {
                return Ok(Taken::End);
            }
            let kept = log.try_append(stream, &buffer[..count]);
            Ok(if kept == count {
                Taken::All(count)
            } else {
                Taken::Rest(count, buffer[kept..count].to_vec())
            })
        })
    }
}

/// Carries output to the log: to its end, or after the exit of the process as far as the pipe is filled. A grandchild that
/// keeps the pipe open cannot delay the end of the process for ever.
pub(super) async fn carry(pipe: &Pipe, stream: Stream, log: &OutputLog, exited: &CancellationToken) {
    loop {
        let ready = tokio::select! {
            biased;
            () = exited.cancelled() => break,
            ready = pipe.0.readable() => ready,
        };
        let Ok(mut ready) = ready else { return };
        match ready.try_io(|_| Ok(pipe.take(stream, log, READ_SIZE)?)) {
            Ok(Ok(Taken::All(_))) => {}
            Ok(Ok(Taken::Rest(_, rest))) => {
                drop(ready);
                log.append(stream, &rest).await;
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            // A pipe gives no error; a terminal gives EIO when its last process has closed it.
            Ok(Ok(Taken::End) | Err(_)) => return,
            Err(_would_block) => {}
        }
    }
    // Everything that the process itself wrote is in the pipe by now: as much as is in it now is taken and no more, since a
    // grandchild may go on writing. The kernel is asked, not tokio: its readiness can lag behind the exit, and what was
    // written last would be lost. A terminal tells only a part (FIONREAD knows the line discipline's buffer alone), but its
    // read gives all that was written before, until it would block.
    let mut left = match stream {
        Stream::Pty => TERMINAL_REST,
        Stream::Stdout | Stream::Stderr => ioctl_fionread(pipe.fd()).unwrap_or(0),
    };
    while left > 0 {
        match pipe.take(stream, log, usize::try_from(left).unwrap_or(READ_SIZE)) {
            Ok(Taken::All(count)) => left = left.saturating_sub(count as u64),
            Ok(Taken::Rest(count, rest)) => {
                left = left.saturating_sub(count as u64);
                log.append(stream, &rest).await;
            }
            Err(Errno::INTR) => {}
            Ok(Taken::End) | Err(_) => return,
        }
    }
}
