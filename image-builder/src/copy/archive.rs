//! `ADD` of archives: tar, also compressed, unpacked into the destination as BuildKit does it.
//!
//! ```text
//! file --first bytes--> decoder --bounded--> unlinked file --LayerReader::plain--> nodes of the NewLayer
//! ```
//!
//! The destination is the archive's root: its links, also absolute ones, lead nowhere else. Devices and FIFOs are left out,
//! owners and modes are the archive's (`--chown` replaces owners, `--chmod` means nothing here), and folders that it does
//! not name are root's.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use oci::layer::{Change, Kind, LayerPath, LayerReader, Node};

use super::layer::{Contents, Found, Inode, NewLayer};
use super::{MAX_FILES, keeps_xattr};
use crate::error::{Error, at};

/// The most that one archive may become: more than any image, less than most disks.
const MAX_UNPACKED: u64 = 64 << 30;
/// Up to here an archive may become as large as it likes..
const FREE_UNPACKED: u64 = 1 << 30;
/// ..and beyond at most so many times as large as it is. Sources compress by 3 to 20.
const MAX_RATIO: u64 = 250;
/// The memory that all paths, link targets and attributes of an archive may take.
const MAX_NAMES: usize = 256 << 20;
/// The memory for the decoder of xz: its largest preset takes 65 MiB, this is twice the dictionary of `xz -9e`.
const XZ_MEMORY: u64 = 160 << 20;
/// The largest window of a zstd frame, as the power of two: what `zstd -d` takes without being told.
const ZSTD_WINDOW: u32 = 27;
/// The most symbolic links on the way to an entry, as BuildKit's.
const MAX_LINKS: usize = 255;
const TAR_BLOCK: usize = 512;
const BUFFER: usize = 256 << 10;

/// What one archive may take.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Of the stream, and of all its files.
    bytes: u64,
    entries: usize,
    names: usize,
}

impl Bounds {
    /// Those of an archive of that size.
    fn of(size: u64) -> Self {
        let bytes = size.saturating_mul(MAX_RATIO).clamp(FREE_UNPACKED, MAX_UNPACKED);
        Self { bytes, entries: MAX_FILES, names: MAX_NAMES }
    }
}

/// A file that is an archive.
pub(super) struct Archive<'a> {
    stream: Box<dyn Read + 'a>,
    /// Its own size, before it is unpacked.
    size: u64,
}

/// Opens the file as an archive; `None` when its contents are none. `reopen` gives it from its beginning.
pub(super) fn open<'a>(
    reopen: impl Fn() -> Result<Box<dyn Read + 'a>, Error>,
    size: u64,
    shown: &Path,
) -> Result<Option<Archive<'a>>, Error> {
    let mut head = Vec::new();
    reopen()?.take(6).read_to_end(&mut head).map_err(at(shown))?;
    let mut block = Vec::new();
    // What cannot be decoded is a file like others.
    let decoded =
        decoder(&head, reopen()?).and_then(|stream| stream.take(TAR_BLOCK as u64).read_to_end(&mut block));
    if decoded.is_err() || !is_header(&block) {
        return Ok(None);
    }
    Ok(Some(Archive { stream: decoder(&head, reopen()?).map_err(at(shown))?, size }))
}

fn decoder<'a>(head: &[u8], stream: Box<dyn Read + 'a>) -> io::Result<Box<dyn Read + 'a>> {
    let buffered = BufReader::with_capacity(BUFFER, stream);
    Ok(if head.starts_with(b"\x1f\x8b\x08") {
        Box::new(flate2::bufread::MultiGzDecoder::new(buffered))
    } else if head.starts_with(b"BZh") {
        Box::new(bzip2::bufread::MultiBzDecoder::new(buffered))
    } else if head.starts_with(b"\xfd7zXZ\0") {
        let flags = liblzma::stream::CONCATENATED;
        let stream =
            liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, flags).map_err(io::Error::other)?;
        Box::new(liblzma::bufread::XzDecoder::new_stream(buffered, stream))
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered)?;
        decoder.window_log_max(ZSTD_WINDOW)?;
        Box::new(decoder)
    } else {
        Box::new(buffered)
    })
}

/// Whether the block is the header of an entry: a file has no other mark that every tar program writes.
fn is_header(block: &[u8]) -> bool {
    if block.len() != TAR_BLOCK || block.iter().all(|byte| *byte == 0) {
        return false;
    }
    let total = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let sum = total(&block[..148]) + 8 * u32::from(b' ') + total(&block[156..]);
    tar::Header::from_byte_slice(block).cksum().is_ok_and(|stored| stored == sum)
}

/// Unpacks the archive into the directory of the new layer.
pub(super) fn unpack(
    archive: Option<Archive<'_>>,
    shown: &Path,
    scratch: &Path,
    new: &mut NewLayer<'_>,
    destination: &LayerPath,
) -> Result<(), Error> {
    let wrong = |reason: String| Error::Source { what: shown.display().to_string(), reason };
    let Some(archive) = archive else {
        return Err(wrong("it was an archive, and is none any more: it changed during the build".to_owned()));
    };
    let bounds = Bounds::of(archive.size);
    unpack_within(bounds, archive, shown, scratch, new, destination)
}

fn unpack_within(
    bounds: Bounds,
    archive: Archive<'_>,
    shown: &Path,
    scratch: &Path,
    new: &mut NewLayer<'_>,
    destination: &LayerPath,
) -> Result<(), Error> {
    let wrong = |reason: String| Error::Source { what: shown.display().to_string(), reason };
    new.directories(destination, new.owner.unwrap_or_default())?;
    let file = Arc::new(spool(archive, bounds.bytes, shown, scratch)?);
    let own = file.try_clone().map_err(at(shown))?;
    let mut reader = LayerReader::seeking(BufReader::with_capacity(BUFFER, own)).plain();
    let (mut entries, mut names, mut bytes) = (0, 0, 0u64);
    while let Some(change) =
        reader.next_change().map_err(|error| wrong(format!("it cannot be unpacked: {error}")))?
    {
        let Change::Node(node) = change else { continue };
        entries += 1;
        names += weight(&node);
        bytes = bytes.saturating_add(size(&node.kind));
        if entries > bounds.entries || names > bounds.names {
            let Bounds { entries, names, .. } = bounds;
            return Err(wrong(format!("it has more than {entries} entries, or {names} bytes of names")));
        }
        // Holes count: in a layer they are zeros.
        if bytes > bounds.bytes {
            return Err(wrong(bomb(bounds.bytes)));
        }
        if node.path.is_root() {
            continue;
        }
        let shown = node.path.to_string();
        put(new, node, &file, destination).map_err(|error| wrong(format!("entry {shown}: {error}")))?;
    }
    Ok(())
}

/// The decompressed archive in a file without a name.
fn spool(mut archive: Archive<'_>, limit: u64, shown: &Path, scratch: &Path) -> Result<File, Error> {
    let mut file = tempfile::tempfile_in(scratch).map_err(at(scratch))?;
    let wrong = |reason: String| Error::Source { what: shown.display().to_string(), reason };
    let mut buffer = vec![0; BUFFER];
    let mut total = 0u64;
    loop {
        let count = match archive.stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(wrong(format!("it cannot be unpacked: {error}"))),
        };
        total += count as u64;
        if total > limit {
            return Err(wrong(bomb(limit)));
        }
        file.write_all(&buffer[..count]).map_err(at(scratch))?;
    }
    file.seek(SeekFrom::Start(0)).map_err(at(scratch))?;
    Ok(file)
}

fn bomb(limit: u64) -> String {
    format!(
        "unpacked it has more than {limit} bytes, which is no archive of that size but a trap; if it is meant, unpack it in \
         a RUN step"
    )
}

fn weight(node: &Node) -> usize {
    let link = match &node.kind {
        Kind::Symlink(target) => target.len(),
        Kind::HardLink(target) => target.as_bytes().len(),
        Kind::Sparse { runs, .. } => std::mem::size_of_val(&**runs),
        _ => 0,
    };
    let xattrs = node.metadata.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    node.path.as_bytes().len() + link + xattrs
}

fn size(kind: &Kind) -> u64 {
    match kind {
        Kind::File { size, .. } | Kind::Sparse { size, .. } => *size,
        _ => 0,
    }
}

fn put(new: &mut NewLayer<'_>, node: Node, file: &Arc<File>, destination: &LayerPath) -> Result<(), Error> {
    let Node { path, mut metadata, kind } = node;
    let contents = match kind {
        Kind::Fifo | Kind::CharDevice { .. } | Kind::BlockDevice { .. } => return Ok(()),
        Kind::Directory => Some(Contents::Directory),
        kind @ (Kind::File { .. } | Kind::Sparse { .. }) => Some(Contents::Part(Arc::clone(file), kind)),
        Kind::Symlink(ref target) => Some(Contents::Symlink(target.clone())),
        Kind::HardLink(ref target) => {
            let target = real(new, target, destination)?;
            let path = real(new, &path, destination)?;
            if target == path {
                return Ok(());
            }
            prepare(new, &path, false)?;
            if let Some(owner) = new.owner {
                (metadata.uid, metadata.gid) = owner;
            }
            metadata.xattrs.retain(|name, _| keeps_xattr(name));
            return new.link(&target, path, metadata);
        }
    };
    let Some(contents) = contents else { return Ok(()) };
    let path = real(new, &path, destination)?;
    prepare(new, &path, matches!(contents, Contents::Directory))?;
    if let Some(owner) = new.owner {
        (metadata.uid, metadata.gid) = owner;
    }
    // Times before 1970 are 1970, as with BuildKit.
    metadata.mtime = metadata.mtime.max(Default::default());
    metadata.xattrs.retain(|name, _| keeps_xattr(name));
    new.put(path, Inode { metadata, contents })
}

/// Makes the way to an entry, and takes away what it replaces.
fn prepare(new: &mut NewLayer<'_>, path: &LayerPath, is_directory: bool) -> Result<(), Error> {
    if let Some((parent, _)) = path.split() {
        new.directories(&parent, (0, 0))?;
    }
    match new.found(path)? {
        Some(Found::Directory) if is_directory => Ok(()),
        Some(_) => new.remove(path),
        None => Ok(()),
    }
}

/// The path in the tree of an entry's path in the archive: links on the way are followed with the destination as root, the
/// last name is not.
fn real(new: &NewLayer<'_>, path: &LayerPath, destination: &LayerPath) -> Result<LayerPath, Error> {
    let outside = |reason: &str| Error::Source { what: path.to_string(), reason: reason.to_owned() };
    let mut pending: Vec<Vec<u8>> = path.components().rev().map(<[u8]>::to_vec).collect();
    let depth = destination.components().count();
    let mut current = destination.clone();
    let mut links = 0;
    while let Some(name) = pending.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                if current.components().count() == depth {
                    return Err(outside("a link on the way leads out of the destination"));
                }
                current = current.split().map(|(parent, _)| parent).unwrap_or_default();
                continue;
            }
            _ => {}
        }
        let next = current.join(&name)?;
        if pending.is_empty() {
            return Ok(next);
        }
        let Some(Found::Symlink(target)) = new.found(&next)? else {
            current = next;
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(outside("too many symbolic links on the way"));
        }
        if target.starts_with(b"/") {
            current = destination.clone();
        }
        pending.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
    }
    Ok(current)
}

#[cfg(test)]
mod tests;
