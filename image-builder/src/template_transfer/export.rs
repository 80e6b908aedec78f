//! A template as one file: an archive of an image layout, which skopeo copies to a registry and back.

use std::io::{self, Read};
use std::path::Path;

use template::{DataDir, TemplateName};

use super::TransferReport;
use super::cache::Cache;
use crate::console::Console;
use crate::error::Error;
use crate::templates;

/// Writes a template to a file, which appears when it is whole.
pub fn export(
    data: &DataDir,
    name: &TemplateName,
    file: &Path,
    console: &Console,
) -> Result<TransferReport, Error> {
    let folder = templates::open(data, name.as_str())?;
    let cache = Cache::new(data);
    let store = cache.open()?;
    let packed = cache.pack(&store, &folder, console)?;
    let artifact = &packed.artifact;
    let bytes = artifact.chunks.iter().map(oci::Descriptor::size).sum();
    {
        let work = console.work(&format!("writing {}", file.display()), Some(bytes));
        let own = [&artifact.descriptor, &artifact.config, &artifact.list];
        let contents = [&packed.manifest, &packed.config, &packed.list];
        let blobs = own.into_iter().chain(&artifact.chunks);
        let mut next = 0;
        // Blobs are asked for in the order that they are named in.
        let open = |blob: &oci::Descriptor| -> io::Result<Box<dyn Read>> {
            next += 1;
            Ok(match contents.get(next - 1) {
                Some(bytes) => Box::new(bytes.as_slice()),
                None => {
                    work.advance(blob.size());
                    let (digest, _) = packed.chunks[next - 1 - contents.len()];
                    Box::new(store.packed(digest).map_err(io::Error::other)?.1)
                }
            })
        };
        oci::write_layout_archive(file, &artifact.descriptor, name.as_str(), blobs, open)?;
    }
    drop(store);
    cache.cut_back(data)?;
    Ok(TransferReport {
        name: name.clone(),
        path: folder.path().to_owned(),
        place: file.display().to_string(),
        digest: artifact.descriptor.digest().clone(),
        rootfs: folder.template().rootfs.digest.clone(),
        chunks: packed.chunks.len(),
        moved: packed.chunks.len(),
        bytes,
    })
}
