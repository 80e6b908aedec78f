//! This terminal in raw mode: every key goes to the sandbox. Whatever ends the program, the terminal is as it was.

use std::io::{self, stdin, stdout};
use std::sync::{Mutex, Once, PoisonError};

use envd_proto::process::pty::Size;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// How it was; there while it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode, for as long as it is kept.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Whether standard input is a terminal.
    pub(crate) fn is_possible() -> bool {
        isatty(stdin())
    }

    /// Puts the terminal of standard input into raw mode.
    pub(crate) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            // So that the words of a panic are readable, and in case that nothing is unwound.
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                leave();
                before(panic);
            }));
        });
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let this = Self(());
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(this)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        leave();
    }
}

/// Gives the terminal its mode back, if it was taken.
pub(crate) fn leave() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that is gone has no mode.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &before);
    }
}

/// The size of the terminal, wherever it is.
pub(crate) fn size() -> Option<Size> {
    let size = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| Size { cols: size.ws_col.into(), rows: size.ws_row.into() })
}
