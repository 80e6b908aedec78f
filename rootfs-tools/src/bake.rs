//! The agent inside an image: a root file system that boots with `init=/sbin/envd` and nothing else.
//!
//! What it adds is one more layer on top of the image's, in memory: the binary, the directories that it mounts on, and the
//! two devices that a kernel without `CONFIG_DEVTMPFS_MOUNT` needs before it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use oci::{Hasher, Image};

use crate::build::{Progress, Writing};
use crate::ext4::{Ext4, Journal, Size};
use crate::format::DataSource;
use crate::initramfs::read_static_binary;
use crate::layers::Layers;
use crate::output::Output;
use crate::tree::{Attributes, Content, FileData, Node, NodeId, Place, ResolveError, Tree};
use crate::{BuildReport, Error};

/// Where the agent mounts what a kernel gives for nothing; on a read-only root it could not make them.
const MOUNT_POINTS: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// The kernel opens the first as init's standard streams, and a program that was given none opens the second.
const DEVICES: [(&str, u16, u32, u32); 2] = [("/dev/console", 0o600, 5, 1), ("/dev/null", 0o666, 1, 3)];

/// What init is on a machine whose kernel was told nothing.
const INIT: &str = "/sbin/init";

/// The longest name in a directory, and the longest path, that Linux takes.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;

/// Where in the image the agent goes: an absolute path that a kernel's command line can name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPath(String);

impl Default for AgentPath {
    fn default() -> Self {
        Self("/sbin/envd".to_owned())
    }
}

impl fmt::Display for AgentPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for AgentPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let plain = |name: &str| {
            !matches!(name, "" | "." | "..")
                && name.len() <= MAX_NAME
                && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
        };
        match text.strip_prefix('/') {
            Some(rest) if text.len() <= MAX_PATH && rest.split('/').all(plain) => Ok(Self(text.to_owned())),
            _ => Err(Error::Invalid {
                what: format!("path {text:?}"),
                reason: "expected an absolute path without '.', '..', blanks and quotes, as init= of a kernel takes it"
                    .to_owned(),
            }),
        }
    }
}

/// What [`bake()`] may be told.
#[derive(Clone, Debug, Default)]
pub struct BakeOptions {
    /// How large the file system is.
    pub size: Size,
    /// Whether it has a journal, which a disk that is written to and kept should have.
    pub journal: Journal,
    /// Where the agent goes.
    pub path: AgentPath,
    /// Whether `/sbin/init` becomes a link to it, in place of what the image has there.
    pub init_link: bool,
}

/// Writes the file system of `image` with the static binary `envd` in it, as [`crate::build()`] does without.
///
/// The binary belongs to root and has mode 0755. The same image, binary and options give the same bytes.
pub fn bake(
    image: &Image,
    envd: &Path,
    options: &BakeOptions,
    output: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<BuildReport, Error> {
    let binary = read_static_binary(envd)?;
    let BakeOptions { size, journal, path, init_link } = options;
    let seed = format!("{} {} {path} {init_link}", image.digest, Hasher::digest_of(&binary));
    // Layers are bounded far below 2^32 (the manifest's own size).
    let layer = image.layers.len() as u32;
    let add = |tree: &mut Tree| add_agent(tree, layer, options, binary.len() as u64);
    let source = |layers| Baked { layers, layer, binary: &binary };
    let format = Ext4::new(seed.as_bytes()).size(*size).journal(*journal)?;
    let writing = Writing { format, file: Output::create_hashed(output)? };
    writing.run(image, None, add, source, |source| source.layers.finish(), progress)
}

fn add_agent(tree: &mut Tree, layer: u32, options: &BakeOptions, size: u64) -> Result<(), Error> {
    for path in MOUNT_POINTS {
        directory(tree, path, layer)?;
    }
    for (path, mode, major, minor) in DEVICES {
        let (parent, name) = split(path);
        let parent = directory(tree, parent, layer)?;
        if tree.child(parent, name.as_bytes()).is_none() {
            add(tree, path, layer, mode, Content::CharDevice { major, minor })?;
        }
    }
    let path = options.path.to_string();
    add(
        tree,
        &path,
        layer,
        0o755,
        Content::File { size, data: FileData::Whole(Place { source: layer, offset: 0 }) },
    )?;
    if options.init_link && path != INIT {
        add(tree, INIT, layer, 0o777, Content::Symlink(path.as_bytes().into()))?;
    }
    Ok(())
}

/// Adds what belongs to root at `path`, in place of anything but a directory.
fn add(tree: &mut Tree, path: &str, layer: u32, mode: u16, content: Content) -> Result<(), Error> {
    let (parent, name) = split(path);
    let parent = directory(tree, parent, layer)?;
    if tree.child(parent, name.as_bytes()).is_some_and(|found| tree.is_directory(found.node)) {
        return Err(unsupported(path, "the image has a directory there"));
    }
    let node = tree.add(Node { attributes: Attributes { mode, ..Attributes::default() }, content });
    tree.link(parent, name.as_bytes(), node, layer);
    Ok(())
}

/// The directory at `path`; links are followed, and what is missing is made.
fn directory(tree: &mut Tree, path: &str, layer: u32) -> Result<NodeId, Error> {
    match tree.resolve(path.as_bytes(), Some(layer)) {
        Ok(found) => Ok(found.unwrap_or(NodeId::ROOT)),
        Err(ResolveError::NotADirectory) => {
            Err(unsupported(path, "the image has a file in place of a directory"))
        }
        Err(ResolveError::TooManyLinks) => {
            Err(unsupported(path, "the image has a loop of symbolic links there"))
        }
        Err(ResolveError::TooDeep) => Err(unsupported(path, "it is too deep in the image")),
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn unsupported(path: &str, reason: &str) -> Error {
    Error::Unsupported { path: path.to_owned(), reason: format!("{reason}: nothing can be baked in") }
}

/// The image's layers, and one more that is in memory.
struct Baked<'a> {
    layers: Layers<'a>,
    layer: u32,
    binary: &'a [u8],
}

impl DataSource for Baked<'_> {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        if place.source != self.layer {
            return self.layers.read(place, buffer);
        }
        // The plan asks for what the node says that it has, and that is the binary's own length.
        let offset = place.offset as usize;
        buffer.copy_from_slice(&self.binary[offset..offset + buffer.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_what_a_kernel_can_be_told() {
        for good in ["/sbin/envd", "/envd", "/usr/lib/tiffin/envd-1.2"] {
            assert_eq!(good.parse::<AgentPath>().unwrap().to_string(), good);
        }
        let long = format!("/{}", "x".repeat(256));
        for bad in
            ["", "/", "envd", "/a//b", "/a/", "/a/../b", "/./a", "/a b", "/a\"b", "/\u{e9}", "/a\n", &long]
        {
            assert!(bad.parse::<AgentPath>().is_err(), "{bad:?}");
        }
    }
}
