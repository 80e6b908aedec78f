//! The layers of an image, read twice: once for their entries, once for the data that survived. Compressed ones are
//! decompressed once, into files that the second pass reads.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use oci::layer::{Compression, LayerReader};
use oci::{Image, Layer};

use crate::Error;
use crate::apply::Applier;
use crate::build::Progress;
use crate::error::at;
use crate::format::DataSource;
use crate::spool::{gone, with_spools};
use crate::tree::Place;

/// Bytes of data that are read at once.
const READ_BUFFER: usize = 256 << 10;

/// Bytes that are read at once where only headers are wanted: the headers of some small files, and little of a large one.
const INDEX_BUFFER: usize = 16 << 10;

fn name(layer: &Layer) -> String {
    layer.descriptor.digest().to_string()
}

/// A plain layer's blob is its tar stream, so one digest names both.
fn is_plain(layer: &Layer) -> bool {
    Compression::of(layer.descriptor.media_type()) == Some(Compression::None)
        && layer.diff_id == *layer.descriptor.digest()
}

/// The checked tar stream of a layer, hashed no more often than needed.
fn open(layer: &Layer) -> Result<Box<dyn Read>, Error> {
    Ok(if is_plain(layer) {
        Box::new(layer.store().open_blob(&layer.descriptor)?)
    } else {
        Box::new(layer.open()?)
    })
}

/// Reads on to the end, where the digests are checked.
fn drain(layer: &Layer, stream: &mut dyn Read) -> Result<(), Error> {
    match io::copy(stream, &mut io::sink()) {
        Ok(_) => Ok(()),
        Err(error) => Err(reading(layer, error)),
    }
}

fn reading(layer: &Layer, error: io::Error) -> Error {
    let what = format!("layer {}", name(layer));
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            oci::Error::Corrupt { what, reason: error.to_string() }.into()
        }
        _ => oci::Error::Io { path: what.into(), error }.into(),
    }
}

/// The first pass: the entries of all layers. Plain ones are not hashed here: the second pass reads all of them, and
/// nothing is published before that. The others are decompressed into files in `folder`.
pub(crate) fn index<'a>(
    image: &'a Image,
    applier: &mut Applier,
    folder: &Path,
    threads: NonZeroUsize,
    progress: &mut dyn FnMut(Progress),
) -> Result<Layers<'a>, Error> {
    let count = image.layers.len();
    let compressed: Vec<&Layer> = image.layers.iter().filter(|layer| !is_plain(layer)).collect();
    let spools = with_spools(&compressed, folder, threads, |outcomes| {
        let mut outcomes = outcomes.into_iter();
        let mut spools = Vec::with_capacity(count);
        for (layer, number) in image.layers.iter().zip(1..) {
            progress(Progress::Indexing { layer: number, layers: count });
            if is_plain(layer) {
                index_plain(layer, applier)?;
                spools.push(None);
                continue;
            }
            let outcome = outcomes.next().and_then(|outcome| outcome.recv().ok());
            let mut spool = outcome.ok_or_else(gone)??;
            spool.rewind().map_err(at(folder))?;
            index_file(layer, &spool, applier)?;
            spools.push(Some(spool));
        }
        Ok::<_, Error>(spools)
    })??;
    let window = Window { bytes: Vec::new(), start: 0 };
    Ok(Layers { image, folder: folder.to_owned(), spools, window, current: None, settled: 0 })
}

fn index_file(layer: &Layer, stream: &File, applier: &mut Applier) -> Result<(), Error> {
    applier.apply(&name(layer), &mut LayerReader::seeking(BufReader::with_capacity(INDEX_BUFFER, stream)))
}

fn index_plain(layer: &Layer, applier: &mut Applier) -> Result<(), Error> {
    // Opened by the store first, which says what is missing.
    drop(layer.store().open_blob(&layer.descriptor)?);
    let path = layer.store().blob_path(layer.descriptor.digest())?;
    let blob = File::open(&path).map_err(at(&path))?;
    index_file(layer, &blob, applier).or_else(|error| {
        // Damage is better explained by the digest than by what the damage looks like.
        drain(layer, &mut *open(layer)?)?;
        Err(error)
    })
}

/// The second pass: data of the layers in ascending order.
pub(crate) struct Layers<'a> {
    image: &'a Image,
    folder: PathBuf,
    /// The streams of the layers that were decompressed, checked already.
    spools: Vec<Option<File>>,
    window: Window,
    /// The layer that is open, with the number of bytes read from it.
    current: Option<(usize, Box<dyn Read>, u64)>,
    /// Layers below this one were read to their end or need not be.
    settled: usize,
}

/// What was read of a spool in advance, because small files are neighbours.
struct Window {
    bytes: Vec<u8>,
    start: u64,
}

impl Window {
    fn read(&mut self, spool: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.len() >= READ_BUFFER {
            return spool.read_exact_at(buffer, offset);
        }
        let inside = |window: &Self| {
            let from = usize::try_from(offset.checked_sub(window.start)?).ok()?;
            window.bytes.get(from..from.checked_add(buffer.len())?).map(|_| from)
        };
        let from = match inside(self) {
            Some(from) => from,
            None => {
                self.bytes.resize(READ_BUFFER, 0);
                let mut filled = 0;
                while filled < buffer.len() {
                    match spool.read_at(&mut self.bytes[filled..], offset + filled as u64)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        count => filled += count,
                    }
                }
                self.bytes.truncate(filled);
                self.start = offset;
                0
            }
        };
        buffer.copy_from_slice(&self.bytes[from..from + buffer.len()]);
        Ok(())
    }
}

impl Layers<'_> {
    /// Reads what was not read yet of layers that were not checked in the first pass. Only then is the data trusted.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        self.settle(self.image.layers.len())
    }

    /// Ends the layers below `next`.
    fn settle(&mut self, next: usize) -> Result<(), Error> {
        if let Some((index, mut stream, _)) = self.current.take() {
            if self.spools[index].is_none() {
                drain(&self.image.layers[index], &mut *stream)?;
            }
            self.settled = index + 1;
        }
        while self.settled < next {
            let layer = &self.image.layers[self.settled];
            if is_plain(layer) {
                drain(layer, &mut *open(layer)?)?;
            }
            self.settled += 1;
        }
        Ok(())
    }
}

impl DataSource for Layers<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        let Place { source, offset } = place;
        let wanted = source as usize;
        if self.current.as_ref().is_none_or(|(index, ..)| *index != wanted)
            && let Some(Some(_)) = self.spools.get(wanted)
        {
            self.settle(wanted)?;
            self.window.bytes.clear();
            self.current = Some((wanted, Box::new(io::empty()), 0));
        }
        if let Some(Some(spool)) = self.spools.get(wanted) {
            return self.window.read(spool, offset, buffer).map_err(at(&self.folder));
        }
        if self.current.as_ref().is_none_or(|(index, ..)| *index != wanted) {
            self.settle(wanted)?;
            self.current = Some((wanted, open(&self.image.layers[wanted])?, 0));
        }
        let layer = &self.image.layers[wanted];
        let Some((_, stream, position)) = &mut self.current else { return Ok(()) };
        let skip = offset.saturating_sub(*position);
        let skipped =
            io::copy(&mut stream.take(skip), &mut io::sink()).map_err(|error| reading(layer, error))?;
        stream.read_exact(buffer).map_err(|error| reading(layer, error))?;
        *position += skipped + buffer.len() as u64;
        Ok(())
    }
}
