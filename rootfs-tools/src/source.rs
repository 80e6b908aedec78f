//! Whatever has a tree in it: an image, a folder, an ext4 file system.

use std::io::Read;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use oci::Image;
use oci::layer::LayerReader;

use crate::Error;
use crate::apply::Applier;
use crate::ext4::{FileSystem, ImageData};
use crate::folder::{Files, Folder};
use crate::format::DataSource;
use crate::layers::{self, Layers};
use crate::tree::{Place, Tree};

/// Where a tree comes from.
pub enum Source {
    /// An ext4 file system.
    FileSystem(Box<FileSystem>),
    /// The layers of an OCI image.
    Image(Box<Image>),
    /// A folder of this machine.
    Folder(PathBuf),
}

/// The data behind a tree.
pub(crate) enum Data<'a> {
    FileSystem(ImageData<'a>),
    Layers(Box<Layers<'a>>),
    Files(Files),
}

impl Source {
    /// Its tree, and the data of its files.
    pub(crate) fn read(&self) -> Result<(Tree, Data<'_>), Error> {
        Ok(match self {
            Self::FileSystem(fs) => (fs.tree()?.tree, Data::FileSystem(fs.data())),
            Self::Image(image) => {
                let mut applier = Applier::new();
                let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
                // Where temporary files are: there is no output to put them beside.
                let folder = std::env::temp_dir();
                let layers = layers::index(image, &mut applier, &folder, threads, &mut |_| {})?;
                (applier.finish().0, Data::Layers(Box::new(layers)))
            }
            Self::Folder(path) => {
                let Folder { tree, files, .. } = Folder::read(path)?;
                (tree, Data::Files(files))
            }
        })
    }
}

/// The tree of an image's layers, without their data.
pub(crate) fn image_tree(image: &Image) -> Result<Tree, Error> {
    let mut applier = Applier::new();
    for layer in &image.layers {
        applier.apply(layer.descriptor.digest().as_ref(), &mut LayerReader::new(layer.open()?))?;
    }
    Ok(applier.finish().0)
}

impl Data<'_> {
    /// Ends the reading: only now what was read is known to be what was asked for.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self {
            Self::FileSystem(_) => Ok(()),
            Self::Layers(layers) => layers.finish(),
            Self::Files(mut files) => files.finish(),
        }
    }
}

impl DataSource for Data<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        match self {
            Self::FileSystem(data) => data.read(place, buffer),
            Self::Layers(layers) => layers.read(place, buffer),
            Self::Files(files) => files.read(place, buffer),
        }
    }
}

/// The tree of uncompressed layers, the lowest first: names, metadata, and the places of the data in them
/// ([`Place::source`] counts the layers).
pub fn tree_of_layers<R: Read>(layers: impl IntoIterator<Item = R>) -> Result<Tree, Error> {
    let mut applier = Applier::new();
    for (layer, number) in layers.into_iter().zip(1..) {
        applier.apply(&format!("layer {number}"), &mut LayerReader::new(layer))?;
    }
    Ok(applier.finish().0)
}
