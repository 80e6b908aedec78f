//! An empty file system, for the disk that a sandbox writes to.

use std::path::Path;

use crate::Error;
use crate::build::{Size, add_lost_found, explain};
use crate::ext4::{self, DataSource, Identity, Plan};
use crate::output::Output;
use crate::tree::{Place, Tree};

/// The longest volume label in bytes.
pub const MAX_LABEL: usize = 16;

/// Writes an empty ext4 of `bytes` (a multiple of 4096) to `output`, replacing what is there.
///
/// The file is sparse: it takes some hundred KiB on the host and is ready in milliseconds at any size, and the guest's
/// kernel writes nothing in the background either. There is no journal, because a scratch disk is thrown away after a
/// crash of its sandbox; for the same reason the file is not synced. UUID and hash seed follow from `seed`: give every
/// sandbox its own.
pub fn empty(output: &Path, bytes: u64, label: Option<&str>, seed: &[u8]) -> Result<(), Error> {
    let label = label.unwrap_or_default();
    if label.len() > MAX_LABEL || label.contains('\0') {
        return Err(Error::Invalid {
            what: format!("label {label:?}"),
            reason: format!("it has {} bytes, expected at most {MAX_LABEL} and no NUL", label.len()),
        });
    }
    let capacity = Size::Exact(bytes).capacity()?;
    let mut tree = Tree::new();
    add_lost_found(&mut tree);
    let plan = Plan::new(&tree, capacity, Identity::derive(seed), label.as_bytes())
        .map_err(|error| explain(&tree, error))?;
    let mut file = Output::create(output)?;
    ext4::write(&plan, &tree, &mut NoData, &mut file, &mut |_| {})?;
    file.publish()
}

/// No file, no data.
struct NoData;

impl DataSource for NoData {
    fn read(&mut self, _: Place, buffer: &mut [u8]) -> Result<(), Error> {
        buffer.fill(0);
        Ok(())
    }
}
