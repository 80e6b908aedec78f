//! `logs`: what the command of `start` printed, the console, the shim's own log.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use envd_proto::process::ProcessSelector;
use envd_proto::process::process_selector::Selector;
use rustix::fs::inotify;
use sandbox_folder::client::{Code, Output, Process};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::Error;
use super::sandboxes;
use super::sandboxes::{Sandbox, Shim, plain};
use super::start::MAIN_TAG;
use crate::cli::Logs;

/// What is read of a file at a time.
const CHUNK: usize = 64 << 10;

/// The most of a file that is read back to find its last lines: more than the shim keeps of a console.
const MAX_TAIL: u64 = 64 << 20;

pub(crate) async fn logs(args: &Logs) -> Result<u8, Error> {
    let sandbox = sandboxes(&args.data)?.find(&args.id)?;
    let shim = sandbox.shim();
    match (args.console, args.shim) {
        (true, _) => files(args, &sandbox, shim.as_ref(), &["console.log.1", "console.log"]).await?,
        (_, true) => {
            files(args, &sandbox, shim.as_ref(), &[super::launch::SHIM_STDERR, "shim.log.1", "shim.log"])
                .await?
        }
        _ => {
            if let Err(error) = command(args, &sandbox).await {
                return Err(sandbox.explain(shim.as_ref(), error).await);
            }
        }
    }
    Ok(0)
}

/// Where a piece of output belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

async fn command(args: &Logs, sandbox: &Sandbox) -> Result<(), Error> {
    let client = sandbox.client().map_err(|error| match error {
        Error::WrongPhase { id, phase, .. } => {
            let remedy = ", and its command's output was in it; --console and --shim show what is left";
            Error::WrongPhase { id, phase, remedy }
        }
        other => other,
    })?;
    let main = ProcessSelector { selector: Some(Selector::Tag(MAIN_TAG.to_owned())) };
    let mut process = match client.attach(main, Some(0)).await {
        Err(error) if error.code() == Some(Code::NotFound) => {
            let reason = "it was started without a command, or that ended more than an hour ago; --console and \
                          --shim show the rest";
            return Err(Error::invalid("sandbox", reason));
        }
        attached => attached?,
    };
    let mut kept = Tail::new(args.tail);
    let mut replay = process.replay_bytes().unwrap_or(u64::MAX);
    while replay > 0 {
        let Some((stream, bytes)) = next(&mut process).await? else { return kept.print() };
        // What was dropped meanwhile was part of what is waited for.
        replay = replay.saturating_sub(bytes.len() as u64 + process.take_dropped());
        kept.push(stream, bytes)?;
    }
    kept.print()?;
    if args.follow {
        while let Some((stream, bytes)) = next(&mut process).await? {
            write(stream, &bytes)?;
        }
    }
    Ok(())
}

async fn next(process: &mut Process) -> Result<Option<(Stream, Bytes)>, Error> {
    Ok(match process.next().await? {
        Output::Stdout(bytes) | Output::Pty(bytes) => Some((Stream::Out, bytes)),
        Output::Stderr(bytes) => Some((Stream::Err, bytes)),
        Output::Ended(_) => None,
    })
}

/// The last lines of what comes, or all of it at once.
struct Tail {
    lines: Option<usize>,
    pieces: VecDeque<(Stream, Bytes)>,
    breaks: usize,
}

impl Tail {
    fn new(lines: Option<usize>) -> Self {
        Self { lines, pieces: VecDeque::new(), breaks: 0 }
    }

    fn push(&mut self, stream: Stream, bytes: Bytes) -> Result<(), Error> {
        let Some(lines) = self.lines else { return write(stream, &bytes) };
        self.breaks += breaks(&bytes);
        self.pieces.push_back((stream, bytes));
        // Whole pieces that are not among the last lines whatever comes.
        while let Some((_, first)) = self.pieces.front()
            && self.breaks - breaks(first) > lines
        {
            self.breaks -= breaks(first);
            self.pieces.pop_front();
        }
        Ok(())
    }

    fn print(self) -> Result<(), Error> {
        self.each(write)
    }

    /// Gives what is kept, which is the last lines.
    fn each(mut self, mut show: impl FnMut(Stream, &[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let Some(lines) = self.lines else { return Ok(()) };
        // A last line without an end is one too.
        let open = self.pieces.back().is_some_and(|(_, bytes)| !bytes.ends_with(b"\n"));
        let mut surplus = (self.breaks + usize::from(open)).saturating_sub(lines);
        for (stream, bytes) in std::mem::take(&mut self.pieces) {
            let mut rest = &bytes[..];
            while surplus > 0
                && let Some(at) = rest.iter().position(|byte| *byte == b'\n')
            {
                rest = &rest[at + 1..];
                surplus -= 1;
            }
            if surplus == 0 {
                show(stream, rest)?;
            }
        }
        Ok(())
    }
}

fn breaks(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

fn write(stream: Stream, bytes: &[u8]) -> Result<(), Error> {
    match stream {
        Stream::Out => {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush()).map_err(Error::io("write", "stdout"))
        }
        Stream::Err => io::stderr().lock().write_all(bytes).map_err(Error::io("write", "stderr")),
    }
}

/// Files of the folder, one after the other; the last one is followed.
async fn files(args: &Logs, sandbox: &Sandbox, shim: Option<&Shim>, names: &[&str]) -> Result<(), Error> {
    let paths: Vec<_> = names.iter().map(|name| sandbox.dir.join(name)).collect();
    let mut kept = Tail::new(args.tail);
    let mut last = None;
    for path in &paths {
        last = match File::open(path) {
            Ok(mut file) => {
                read_on(&mut file, args.tail.is_some(), |bytes| kept.push(Stream::Out, bytes)).map_err(
                    |error| match error {
                        Error::Io { action, source, .. } => Error::Io { action, path: path.clone(), source },
                        other => other,
                    },
                )?;
                Some(file)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("open", path)(error)),
        };
    }
    kept.print()?;
    match (args.follow, shim, paths.last()) {
        (true, Some(shim), Some(path)) => follow(path, last, shim).await,
        _ => Ok(()),
    }
}

fn read_on(
    file: &mut File,
    only_end: bool,
    mut taken: impl FnMut(Bytes) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed = |error| Error::io("read", "the log")(error);
    if only_end {
        let length = file.metadata().map_err(failed)?.len();
        let begin = length.saturating_sub(MAX_TAIL).max(file.stream_position().map_err(failed)?);
        file.seek(SeekFrom::Start(begin)).map_err(failed)?;
    }
    loop {
        let mut chunk = vec![0; CHUNK];
        let read = file.read(&mut chunk).map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        chunk.truncate(read);
        taken(harmless(chunk))?;
    }
}

/// What a guest writes to its console may be meant for the terminal that shows it.
fn harmless(bytes: Vec<u8>) -> Bytes {
    use std::io::IsTerminal;
    if io::stdout().is_terminal() {
        Bytes::from(plain(&String::from_utf8_lossy(&bytes)).into_bytes())
    } else {
        Bytes::from(bytes)
    }
}

/// Shows what is added to a file until the shim is gone; a file that is begun again is opened again.
async fn follow(path: &Path, mut file: Option<File>, shim: &Shim) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let watch = Watch::new(folder).map_err(Error::io("watch", folder))?;
    loop {
        // Asked before the file is read: what comes after the last read is then seen, or is the shim's last word.
        let gone = tokio::select! {
            biased;
            () = shim.gone() => true,
            () = std::future::ready(()) => false,
        };
        catch_up(path, &mut file)?;
        if gone {
            return Ok(());
        }
        tokio::select! {
            changed = watch.changed() => changed.map_err(Error::io("watch", folder))?,
            () = shim.gone() => {}
        }
    }
}

fn catch_up(path: &Path, file: &mut Option<File>) -> Result<(), Error> {
    let show = |bytes: Bytes| write(Stream::Out, &bytes);
    if let Some(old) = file {
        read_on(old, false, show)?;
    }
    let now = match std::fs::metadata(path) {
        Ok(now) => now,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look at", path)(error)),
    };
    let same = file.as_ref().and_then(|file| file.metadata().ok()).is_some_and(|old| old.ino() == now.ino());
    if !same {
        let mut new = File::open(path).map_err(Error::io("open", path))?;
        read_on(&mut new, false, show)?;
        *file = Some(new);
    }
    Ok(())
}

/// Changes of files in a folder.
struct Watch(AsyncFd<std::os::fd::OwnedFd>);

impl Watch {
    fn new(folder: &Path) -> io::Result<Self> {
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let changes =
            inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&inotify, PathBuf::from(folder), changes)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for descriptors that may be closed elsewhere; an OwnedFd is not"
        )]
        Ok(Self(AsyncFd::with_interest(inotify, Interest::READABLE)?))
    }

    /// Waits for a change; several are one.
    async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut events = [0; 4096];
            match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut events[..])?)) {
                Ok(read) => return read.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(lines: usize, pieces: &[&str]) -> String {
        let mut tail = Tail::new(Some(lines));
        for piece in pieces {
            tail.push(Stream::Out, Bytes::copy_from_slice(piece.as_bytes())).unwrap();
        }
        let mut shown = Vec::new();
        let show = |_, bytes: &[u8]| {
            shown.extend_from_slice(bytes);
            Ok(())
        };
        tail.each(show).unwrap();
        String::from_utf8(shown).unwrap()
    }

    #[test]
    fn a_tail_is_the_last_lines_however_they_came() {
        for (lines, pieces, expected) in [
            (1, &["a\n", "b\n", "c\n"][..], "c\n"),
            (2, &["a\nb\nc\n", "d"], "c\nd"),
            (2, &["a\nb", "b\nc", "\n"], "bb\nc\n"),
            (0, &["a\n", "b"], ""),
            (9, &["a\n", "b"], "a\nb"),
            (1, &["\n", "\n"], "\n"),
            (3, &[], ""),
        ] {
            assert_eq!(last(lines, pieces), expected, "{lines} of {pieces:?}");
        }
    }

    #[test]
    fn a_tail_keeps_little_more_than_its_lines() {
        let mut tail = Tail::new(Some(2));
        for _ in 0..1000 {
            tail.push(Stream::Out, Bytes::from_static(b"line\n")).unwrap();
        }
        assert!(tail.pieces.len() <= 4, "{}", tail.pieces.len());
    }
}
