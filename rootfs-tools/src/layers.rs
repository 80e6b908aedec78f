//! The layers of an image, read twice: once for their entries, once for the data that survived.

use std::fs::File;
use std::io::{self, BufReader, Read};

use oci::layer::{Compression, LayerReader};
use oci::{Image, Layer};

use crate::Error;
use crate::apply::Applier;
use crate::error::at;
use crate::format::DataSource;
use crate::tree::Place;

const READ_BUFFER: usize = 256 << 10;

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
        _ => oci::Error::Io { path: what.into(), source: error }.into(),
    }
}

/// The first pass over one layer. A plain one is not hashed here: the second pass reads all of it, and nothing is
/// published before that.
pub(crate) fn index(layer: &Layer, applier: &mut Applier) -> Result<(), Error> {
    if !is_plain(layer) {
        return applier.apply(&name(layer), &mut LayerReader::new(layer.open()?));
    }
    // Opened by the store first, which says what is missing.
    drop(layer.store().open_blob(&layer.descriptor)?);
    let path = layer.store().blob_path(layer.descriptor.digest())?;
    let blob = File::open(&path).map_err(at(&path))?;
    let mut reader = LayerReader::new(BufReader::with_capacity(READ_BUFFER, blob));
    applier.apply(&name(layer), &mut reader).or_else(|error| {
        // Damage is better explained by the digest than by what the damage looks like.
        drain(layer, &mut *open(layer)?)?;
        Err(error)
    })
}

/// The second pass: data of the layers in ascending order.
pub(crate) struct Layers<'a> {
    image: &'a Image,
    /// The layer that is open, with the number of bytes read from it.
    current: Option<(usize, Box<dyn Read>, u64)>,
    /// Layers below this one were read to their end or need not be.
    settled: usize,
}

impl<'a> Layers<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        Self { image, current: None, settled: 0 }
    }

    /// Reads what was not read yet of layers that were not checked in the first pass. Only then is the data trusted.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        self.settle(self.image.layers.len())
    }

    /// Ends the layers below `next`.
    fn settle(&mut self, next: usize) -> Result<(), Error> {
        if let Some((index, mut stream, _)) = self.current.take() {
            drain(&self.image.layers[index], &mut *stream)?;
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
