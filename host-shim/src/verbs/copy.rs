//! `cp`: files between a sandbox and this machine, with docker's rules.
//!
//! ```text
//!            ┌ local ───┐                       ┌ local ────┐
//! SRC ─side─►┤ remote   ├─► Item, Item, … ─sink─►┤ remote    ├─► DST
//!            └ archive ─┘   parents first       └ archive ──┘
//! ```
//!
//! A source gives items one after the other; contents are streams that nobody holds in memory. `place` decides by
//! docker's rules what they are called. What a sandbox says about its files is hostile input: no name leads out of the
//! folder that the user named, and no link in it is followed.

mod archive;
mod item;
mod local;
mod place;
mod remote;
mod side;

use host_shim::run::Interrupt;
use indicatif::ProgressBar;

use super::error::{Error, FAILED};
use super::{interrupts, sandboxes};
use crate::cli::Copy;
use item::{Item, What};
use place::Place;
use side::{Side, Target};

/// The exit code of a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

pub(crate) async fn copy(args: &Copy) -> Result<u8, Error> {
    let sandboxes = sandboxes(&args.data)?;
    let source = Side::parse(&args.source, &sandboxes, args.user.as_deref())?;
    let target = Side::parse(&args.destination, &sandboxes, args.user.as_deref())?;
    if !source.is_sandbox() && !target.is_sandbox() {
        let reason = "neither SRC nor DST is in a sandbox: expected ID:PATH on one side (a path here with a colon \
                      begins with . or /)";
        return Err(Error::invalid("copy", reason));
    }
    let interrupt: Interrupt = interrupts()?;
    let mut progress = Progress::new(args.quiet);
    let copied = tokio::select! {
        copied = carry(&source, &target, args.follow_link, &mut progress) => copied,
        // What was not whole yet goes with what is dropped here.
        () = interrupt.first.cancelled() => return Ok(INTERRUPTED),
    };
    progress.bar.finish_and_clear();
    match copied {
        Ok(()) => Ok(if progress.left_out { FAILED } else { 0 }),
        Err(error) => {
            let mut error = error;
            for side in [&source, &target] {
                if let Side::Sandbox { sandbox, shim, .. } = side {
                    error = sandbox.explain(shim.as_ref(), error).await;
                }
            }
            Err(error)
        }
    }
}

async fn carry(source: &Side, target: &Side, follow: bool, progress: &mut Progress) -> Result<(), Error> {
    let top = source.top(follow).await?;
    let (found, resolved) = target.look().await?;
    let Place { inside, name } = place::place(&top.shape, &found).map_err(|reason| {
        Error::invalid("copy", format!("{} to {}: {reason}", source.shown(), target.shown()))
    })?;
    let mut sink = target.sink(&resolved, inside)?;
    source.pour(&top, name, &mut sink, progress).await?;
    sink.finish().await
}

/// Where items go.
enum Sink {
    Local(local::LocalSink),
    Sandbox(remote::SandboxSink),
    Archive(archive::ArchiveSink),
}

impl Sink {
    async fn put(&mut self, item: Item, progress: &mut Progress) -> Result<(), Error> {
        let item = progress.count(item);
        match self {
            Self::Local(sink) => sink.put(item).await,
            Self::Sandbox(sink) => sink.put(item).await,
            Self::Archive(sink) => sink.put(item).await,
        }
    }

    /// Waits for a failure of what was put already. Cancel safe.
    async fn failure(&mut self) -> Error {
        match self {
            Self::Sandbox(sink) => sink.failure().await,
            Self::Local(_) | Self::Archive(_) => std::future::pending().await,
        }
    }

    /// Everything is there when this returns.
    async fn finish(self) -> Result<(), Error> {
        match self {
            Self::Local(sink) => sink.finish(),
            Self::Sandbox(sink) => sink.finish().await,
            Self::Archive(sink) => sink.finish().await,
        }
    }
}

/// What the user sees meanwhile, and whether all of it was copied.
struct Progress {
    bar: ProgressBar,
    items: u64,
    left_out: bool,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        use std::io::IsTerminal;
        let bar = if quiet || !std::io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) =
                indicatif::ProgressStyle::with_template("{spinner} {msg} {bytes} {bytes_per_sec}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(std::time::Duration::from_millis(100));
            bar
        };
        Self { bar, items: 0, left_out: false }
    }

    fn count(&mut self, item: Item) -> Item {
        self.items += 1;
        self.bar.set_message(format!("{} files", self.items));
        match item.what {
            What::File { length, contents } => {
                let contents = Box::new(item::Counted { inner: contents, bar: self.bar.clone() });
                Item { what: What::File { length, contents }, ..item }
            }
            what => Item { what, ..item },
        }
    }

    /// Something that cannot be copied.
    fn leave_out(&mut self, path: &[u8], why: &str) {
        self.left_out = true;
        let path = super::sandboxes::plain(&String::from_utf8_lossy(path));
        self.bar.suspend(|| eprintln!("host-shim: note: {path} is left out: {why}"));
    }
}

/// What a copy begins with.
struct Top {
    shape: place::Shape,
    what: Target,
}
