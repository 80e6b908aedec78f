//! What clients write to a process.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::carry::Pipe;
use crate::connect::{Code, Error};

/// Writes that wait for one process at one time; each may hold a message in memory.
const MAX_WRITERS: usize = 16;

/// Where input goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Pipe,
    Terminal,
}

/// What a client writes.
#[derive(Debug)]
pub(super) enum Data {
    /// For standard input.
    Stdin(bytes::Bytes),
    /// For the terminal.
    Terminal(bytes::Bytes),
}

/// The input of one process.
#[derive(Debug)]
pub(super) struct Input {
    kind: Kind,
    pipe: Mutex<Option<Arc<Pipe>>>,
    /// One write at a time, in the order of their arrival.
    turn: tokio::sync::Mutex<()>,
    writers: Semaphore,
    /// Interrupts a write that waits for a process that reads no more.
    closed: CancellationToken,
}

impl Input {
    /// The process reads /dev/null.
    pub(super) fn nothing() -> Self {
        Self::new(Kind::Nothing, None)
    }

    /// The process reads a pipe.
    pub(super) fn pipe(pipe: Pipe) -> Self {
        Self::new(Kind::Pipe, Some(Arc::new(pipe)))
    }

    /// The process has a terminal.
    pub(super) fn terminal(terminal: Arc<Pipe>) -> Self {
        Self::new(Kind::Terminal, Some(terminal))
    }

    fn new(kind: Kind, pipe: Option<Arc<Pipe>>) -> Self {
        Self {
            kind,
            pipe: Mutex::new(pipe),
            turn: tokio::sync::Mutex::new(()),
            writers: Semaphore::new(MAX_WRITERS),
            closed: CancellationToken::new(),
        }
    }

    /// Writes; returns when the kernel has it all for the process.
    pub(super) async fn write(&self, data: &Data) -> Result<(), Error> {
        let closed = || Error::new(Code::Internal, "stdin not enabled or closed");
        let bytes = match (self.kind, data) {
            (Kind::Terminal, Data::Terminal(bytes)) | (Kind::Pipe, Data::Stdin(bytes)) => bytes,
            (Kind::Nothing, Data::Stdin(_)) => return Err(closed()),
            (Kind::Terminal, Data::Stdin(_)) => {
                let message = "the process has a terminal: its input is 'pty', not 'stdin'";
                return Err(Error::new(Code::Internal, message));
            }
            (Kind::Pipe | Kind::Nothing, Data::Terminal(_)) => return Err(no_terminal()),
        };
        let _place = self.writers.try_acquire().map_err(|_| {
            let message = format!("{MAX_WRITERS} writes wait for the process already: no more at a time");
            Error::new(Code::ResourceExhausted, message)
        })?;
        let _turn = self.turn.lock().await;
        let pipe = self.current().ok_or_else(closed)?;
        let written = tokio::select! {
            written = pipe.write_all(bytes) => written,
            () = self.closed.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match written {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.close();
                Err(closed())
            }
            Err(error) => Err(Error::new(Code::Internal, format!("writing the input failed: {error}"))),
        }
    }

    /// Closes it for a client, who cannot close a terminal.
    pub(super) fn close_stdin(&self) -> Result<(), Error> {
        if self.kind == Kind::Terminal {
            let message = "a terminal's input cannot be closed: send an end of file (0x04) as 'pty' instead";
            return Err(Error::new(Code::Unknown, message));
        }
        self.close();
        Ok(())
    }

    /// Closes it; no error when it is closed.
    pub(super) fn close(&self) {
        self.closed.cancel();
        *self.pipe.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Gives the terminal another size.
    pub(super) fn resize(&self, size: Winsize) -> Result<(), Error> {
        let pipe = self.current().filter(|_| self.kind == Kind::Terminal).ok_or_else(no_terminal)?;
        tcsetwinsize(pipe.fd(), size)
            .map_err(|error| Error::new(Code::Internal, format!("resizing the terminal failed: {error}")))
    }

    fn current(&self) -> Option<Arc<Pipe>> {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn no_terminal() -> Error {
    Error::new(Code::Internal, "the process has no terminal: its input is 'stdin', not 'pty'")
}
