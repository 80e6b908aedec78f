//! `--rewrite-timestamp`: the layers of an image with no file newer than `SOURCE_DATE_EPOCH`.
//!
//! Steps keep the times that their files got: what is in the cache does not depend on the epoch, which is another one for
//! each commit. Only the layers that the build made are rewritten, into blobs of their own, as BuildKit's exporter does it.

use std::io;

use oci::layer::{Change, Compression, LayerReader, LayerWriter, Timestamp, WrittenLayer};
use oci::{Layer, Store};

use crate::error::Error;

/// The layer with every time after `latest` set to it.
pub(crate) fn clamp(
    store: &Store,
    layer: &Layer,
    latest: Timestamp,
    compression: Compression,
) -> Result<WrittenLayer, Error> {
    let mut reader = LayerReader::new(layer.open()?);
    let mut writer = LayerWriter::new(store, compression)?;
    while let Some(change) = reader.next_change()? {
        match change {
            Change::Whiteout(path) => writer.append_whiteout(&path)?,
            Change::Opaque(path) => writer.append_opaque(&path)?,
            Change::Node(mut node) => {
                node.metadata.mtime = node.metadata.mtime.min(latest);
                match node.kind {
                    oci::layer::Kind::File { .. } | oci::layer::Kind::Sparse { .. } => {
                        writer.append(&node, &mut reader)?;
                    }
                    _ => writer.append(&node, io::empty())?,
                }
            }
        }
    }
    Ok(writer.finish()?)
}
