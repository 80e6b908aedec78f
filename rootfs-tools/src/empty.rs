//! An empty file system, for the disk that a sandbox writes to.

use std::path::Path;

use crate::Error;
use crate::ext4::{Ext4, Size};
use crate::format::{Format, NoData};
use crate::output::Output;
use crate::tree::Tree;

/// Writes an empty ext4 of `bytes` (a multiple of 4096) to `output`, replacing what is there.
///
/// The file is sparse: it takes some hundred KiB on the host and is ready in milliseconds at any size, and the guest's
/// kernel writes nothing in the background either. There is no journal, because a scratch disk is thrown away after a
/// crash of its sandbox; for the same reason the file is not synced. UUID and hash seed follow from `seed`: give every
/// sandbox its own.
pub fn empty(output: &Path, bytes: u64, label: Option<&str>, seed: &[u8]) -> Result<(), Error> {
    let format = Ext4::new(seed).size(Size::Exact(bytes)).label(label.unwrap_or_default())?;
    let mut tree = Tree::new();
    let prepared = format.prepare(&mut tree)?;
    let mut file = Output::create(output)?;
    prepared.write(&mut NoData, &mut file, &mut |_| {})?;
    file.publish()
}
