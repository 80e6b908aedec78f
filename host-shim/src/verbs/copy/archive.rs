//! Tar streams: `cp - ID:PATH` reads one from standard input, `cp ID:PATH -` writes one to standard output.

use std::io::{self, Read};

use bytes::Bytes;
use sandbox_folder::client::Attributes;
use tar::{Archive, Builder, EntryType, Header};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Stdout};
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;

use super::item::{Item, MAX_PATH, What, is_name};
use super::{Progress, Sink};
use crate::verbs::error::Error;

/// How much of a file is read at a time.
const CHUNK: usize = 64 << 10;

/// Chunks that are read before the ones before them are written.
const READ_AHEAD: usize = 4;

/// The unit of a tar stream.
const BLOCK: usize = 512;

/// An entry of the stream, or what is wrong with it.
enum Found {
    Item(Item),
    LeftOut(Vec<u8>, &'static str),
    Failed(String),
}

/// Gives the entries of the stream to `sink`.
pub(super) async fn pour(sink: &mut Sink, progress: &mut Progress) -> Result<(), Error> {
    let (sender, mut entries) = mpsc::channel(1);
    // A thread of its own: what reads standard input cannot be broken off.
    std::thread::spawn(move || {
        if let Err(error) = read(io::stdin().lock(), &sender) {
            let _ = sender.blocking_send(Found::Failed(error.to_string()));
        }
    });
    loop {
        let entry = tokio::select! {
            entry = entries.recv() => entry,
            // Whoever writes the stream may never write again.
            error = sink.failure() => return Err(error),
        };
        let Some(entry) = entry else { return Ok(()) };
        match entry {
            Found::Item(item) => sink.put(item, progress).await?,
            Found::LeftOut(path, why) => progress.leave_out(&path, why),
            Found::Failed(reason) => return Err(Error::invalid("tar stream", reason)),
        }
    }
}

fn read(stream: impl Read, entries: &mpsc::Sender<Found>) -> io::Result<()> {
    let mut archive = Archive::new(stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            continue;
        }
        let path = relative(&entry.path_bytes())?;
        let link = entry.link_name_bytes().map(|link| link.to_vec());
        let mut mtime = (i64::try_from(entry.header().mtime()?).unwrap_or(0), 0);
        if let Ok(Some(extensions)) = entry.pax_extensions() {
            for extension in extensions.flatten().filter(|extension| extension.key_bytes() == b"mtime") {
                mtime = pax_time(extension.value_bytes()).unwrap_or(mtime);
            }
        }
        let attributes = Attributes { mode: entry.header().mode()? & 0o7777, mtime: Some(mtime) };
        let mut rest = None;
        let what = match (kind, link) {
            (EntryType::Directory, _) => What::Directory,
            (EntryType::Symlink, Some(text)) => What::Symlink(text),
            (EntryType::Link, Some(of)) => What::Link(relative(&of)?),
            (EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse, _) => {
                let (sender, chunks) = mpsc::channel::<io::Result<Bytes>>(READ_AHEAD);
                rest = Some(sender);
                let chunks = futures::stream::unfold(chunks, |mut chunks| async {
                    let chunk = chunks.recv().await?;
                    Some((chunk, chunks))
                });
                let contents = Box::new(StreamReader::new(Box::pin(chunks)));
                What::File { length: entry.size(), contents }
            }
            _ => {
                let why = "it is no file, directory or link";
                if entries.blocking_send(Found::LeftOut(path, why)).is_err() {
                    return Ok(());
                }
                continue;
            }
        };
        if entries.blocking_send(Found::Item(Item { path, what, attributes })).is_err() {
            // Whoever took them has failed, and says why.
            return Ok(());
        }
        if let Some(sender) = rest {
            let size = entry.size();
            feed(&mut entry, size, &sender)?;
        }
    }
    Ok(())
}

/// Sends the `left` bytes of an entry.
fn feed(entry: &mut impl Read, mut left: u64, sender: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    loop {
        let mut chunk = vec![0; CHUNK];
        let read = match entry.read(&mut chunk) {
            // The tar crate tells of a stream that ends too early only at the next entry.
            Ok(0) if left > 0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the stream ends {left} bytes before the end of a file"),
            )),
            read => read,
        };
        match read {
            Ok(0) => return Ok(()),
            Ok(read) => {
                left = left.saturating_sub(read as u64);
                chunk.truncate(read);
                // A file that nobody wants any more is passed over.
                if sender.blocking_send(Ok(chunk.into())).is_err() {
                    return Ok(());
                }
            }
            Err(error) => {
                // The half of it must not be taken for the whole.
                let _ = sender.blocking_send(Err(io::Error::new(error.kind(), error.to_string())));
                return Err(error);
            }
        }
    }
}

/// A path of the stream, below where it is unpacked. As docker and tar: what begins with `/` counts from there too.
fn relative(path: &[u8]) -> io::Result<Vec<u8>> {
    let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    let path = names.clone().collect::<Vec<_>>().join(&b'/');
    if path.len() > MAX_PATH || !names.clone().all(is_name) {
        let shown = String::from_utf8_lossy(&path).into_owned();
        let reason = format!("the entry {shown:?} leads out of the directory, or is too long");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(path)
}

fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let nanos = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    Some((seconds.parse().ok()?, nanos))
}

/// Standard output as a tar stream.
pub(super) struct ArchiveSink {
    out: Stdout,
    /// Makes the headers; what it has made is taken out at once.
    builder: Builder<Vec<u8>>,
}

impl ArchiveSink {
    pub(super) fn new() -> Self {
        Self { out: tokio::io::stdout(), builder: Builder::new(Vec::new()) }
    }

    pub(super) async fn put(&mut self, Item { mut path, what, attributes }: Item) -> Result<(), Error> {
        if path.is_empty() {
            path = b".".to_vec();
        }
        let (kind, length, link) = match &what {
            What::File { length, .. } => (EntryType::Regular, *length, None),
            What::Directory => (EntryType::Directory, 0, None),
            What::Symlink(text) => (EntryType::Symlink, 0, Some(text)),
            What::Link(of) => (EntryType::Link, 0, Some(of)),
        };
        if matches!(what, What::Directory) {
            path.push(b'/');
        }
        let failed = |error| Error::io("write", "the tar stream")(error);
        let header = header(&mut self.builder, &path, kind, length, link.map(Vec::as_slice), attributes);
        self.out.write_all(&header.map_err(failed)?).await.map_err(failed)?;
        if let What::File { length, contents } = what {
            let mut contents = contents.take(length);
            let copied = tokio::io::copy(&mut contents, &mut self.out).await.map_err(failed)?;
            if copied < length {
                let reason = format!("{} became shorter meanwhile", String::from_utf8_lossy(&path));
                return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, reason)));
            }
            let padding = (BLOCK - (length % BLOCK as u64) as usize) % BLOCK;
            self.out.write_all(&vec![0; padding]).await.map_err(failed)?;
        }
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<(), Error> {
        let failed = |error| Error::io("write", "the tar stream")(error);
        self.out.write_all(&[0; 2 * BLOCK]).await.map_err(failed)?;
        self.out.flush().await.map_err(failed)
    }
}

/// The blocks before a file's contents: a pax header with what the old one cannot hold, and the old one.
fn header(
    builder: &mut Builder<Vec<u8>>,
    path: &[u8],
    kind: EntryType,
    length: u64,
    link: Option<&[u8]>,
    attributes: Attributes,
) -> io::Result<Vec<u8>> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(length);
    header.set_mode(attributes.mode);
    header.set_uid(0);
    header.set_gid(0);
    let (seconds, nanos) = attributes.mtime.unwrap_or((0, 0));
    header.set_mtime(u64::try_from(seconds).unwrap_or(0));
    let time = format!("{seconds}.{nanos:09}");
    let size = length.to_string();
    let mut extensions: Vec<(&str, &[u8])> = Vec::new();
    if nanos != 0 || seconds < 0 {
        extensions.push(("mtime", time.as_bytes()));
    }
    // Eleven octal digits.
    if length >= 1 << 33 {
        extensions.push(("size", size.as_bytes()));
    }
    let Some(old) = header.as_ustar_mut() else { return Err(io::ErrorKind::InvalidData.into()) };
    for (key, value, field) in [("path", Some(path), &mut old.name), ("linkpath", link, &mut old.linkname)] {
        let Some(value) = value else { continue };
        let fits = value.len().min(field.len());
        field[..fits].copy_from_slice(&value[..fits]);
        if fits < value.len() {
            extensions.push((key, value));
        }
    }
    header.set_cksum();
    if !extensions.is_empty() {
        builder.append_pax_extensions(extensions)?;
    }
    let mut blocks = std::mem::take(builder.get_mut());
    blocks.extend_from_slice(header.as_bytes());
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_header_says_tar_reads() {
        let long = [b"a/".repeat(80), b"\xff".to_vec()].concat();
        let mut builder = Builder::new(Vec::new());
        let attributes = Attributes { mode: 0o4755, mtime: Some((1_700_000_000, 5)) };
        let mut stream = header(&mut builder, &long, EntryType::Symlink, 0, Some(&long), attributes).unwrap();
        stream.extend(header(&mut builder, b"big", EntryType::Regular, 1 << 34, None, attributes).unwrap());
        let mut archive = Archive::new(&stream[..]);
        let mut entries = archive.entries().unwrap();
        let mut link = entries.next().unwrap().unwrap();
        assert_eq!((&*link.path_bytes(), &*link.link_name_bytes().unwrap()), (&long[..], &long[..]));
        assert_eq!(link.header().mode().unwrap(), 0o4755);
        let extensions = link.pax_extensions().unwrap().unwrap();
        let times = extensions.flatten().filter(|extension| extension.key_bytes() == b"mtime");
        let times: Vec<_> = times.map(|extension| pax_time(extension.value_bytes())).collect();
        assert_eq!(times, [Some((1_700_000_000, 5))]);
        let big = entries.next().unwrap().unwrap();
        assert_eq!((&*big.path_bytes(), big.size()), (&b"big"[..], 1 << 34));
    }

    /// Whoever reads a file of it must not take the half for the whole, however late the rest of the stream is looked at.
    #[test]
    fn a_file_that_the_stream_cuts_short_ends_with_an_error() {
        let mut builder = Builder::new(Vec::new());
        let attributes = Attributes { mode: 0o644, mtime: None };
        let mut stream = header(&mut builder, b"f", EntryType::Regular, 1000, None, attributes).unwrap();
        stream.extend([1; 700]);
        let (sender, mut entries) = mpsc::channel(1);
        let reading = std::thread::spawn(move || read(&stream[..], &sender));
        let Some(Found::Item(Item { what: What::File { length, mut contents }, .. })) =
            entries.blocking_recv()
        else {
            panic!("no file")
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut got = Vec::new();
        let error = runtime.block_on(contents.read_to_end(&mut got)).unwrap_err();
        assert_eq!((length, got.len(), error.kind()), (1000, 700, io::ErrorKind::UnexpectedEof));
        assert!(reading.join().unwrap().is_err());
    }

    #[test]
    fn no_entry_leads_out() {
        assert_eq!(relative(b"./a//b/").unwrap(), b"a/b");
        assert_eq!(relative(b"/etc/passwd").unwrap(), b"etc/passwd");
        assert_eq!(relative(b"./").unwrap(), b"");
        for bad in [&b"../x"[..], b"a/../../x", b"a/..", b"a\0b"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
    }
}
