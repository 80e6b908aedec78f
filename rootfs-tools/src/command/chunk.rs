//! `chunk`, `unchunk` and `prune-chunks`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use rootfs_tools::chunk::{self, ChunkSize, ChunkStore, Manifest};
use serde::Serialize;

use crate::{print_json, print_line};

pub(crate) const CHUNK_EXAMPLES: &str = "\
Examples:
  rootfs-tools chunk rootfs.ext4 --store chunks               writes rootfs.ext4.chunks.json
  rootfs-tools chunk rootfs.ext4 --store chunks -o v1.json    names the manifest
  rootfs-tools chunk */rootfs.ext4 --store chunks --json      one line of JSON for each file

The same file always gives the same manifest. Chunks that several files have are stored once, zeros never.

";

pub(crate) const UNCHUNK_EXAMPLES: &str = "\
Example:
  rootfs-tools unchunk rootfs.ext4.chunks.json --store chunks -o rootfs.ext4

Every chunk and the whole file are checked; zeros become holes.

";

pub(crate) const PRUNE_EXAMPLES: &str = "\
Example:
  rootfs-tools prune-chunks --store chunks v2.json v3.json    forgets what only v1.json needed

Name every manifest that is still needed: the chunks of all others go.

";

#[derive(Debug, Args)]
pub(crate) struct ChunkArgs {
    /// The files, of any kind
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The folder of chunks; made when it is not there
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The manifest to write, for a single FILE [default: FILE.chunks.json]
    #[arg(short, long, value_name = "MANIFEST")]
    output: Option<PathBuf>,
    /// Print a report for each file as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UnchunkArgs {
    /// The manifest
    manifest: PathBuf,
    /// The folder of chunks
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PruneChunksArgs {
    /// The manifests whose chunks stay
    #[arg(value_name = "MANIFEST", required = true)]
    manifests: Vec<PathBuf>,
    /// The folder of chunks
    #[arg(long, value_name = "DIR")]
    store: PathBuf,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

/// What `chunk --json` prints of a file.
#[derive(Serialize)]
struct Chunked<'a> {
    file: String,
    manifest: String,
    manifest_digest: oci::Digest,
    #[serde(flatten)]
    report: &'a chunk::SplitReport,
}

pub(crate) fn chunk(args: ChunkArgs) -> anyhow::Result<()> {
    let ChunkArgs { files, store, output, json } = args;
    if output.is_some() && files.len() > 1 {
        let reason = format!("expected one FILE, got {}: leave -o out to have one beside each", files.len());
        return Err(rootfs_tools::Error::Invalid { what: "-o MANIFEST".to_owned(), reason }.into());
    }
    let store = ChunkStore::open_or_create(&store)?;
    for file in &files {
        let manifest_path = output.clone().unwrap_or_else(|| beside(file));
        let (manifest, report) = chunk::split(file, &store, ChunkSize::default())?;
        let manifest_digest = manifest.write(&manifest_path)?;
        if json {
            print_json(&Chunked {
                file: file.display().to_string(),
                manifest: manifest_path.display().to_string(),
                manifest_digest,
                report: &report,
            })?;
            continue;
        }
        let chunk::SplitReport { chunks, zero, new, reused, stored_bytes, size, .. } = report;
        print_line(&format!(
            "{}: {} MiB in {chunks} chunks: {zero} zero, {reused} known, {new} new in {} KiB",
            manifest_path.display(),
            size.div_ceil(1 << 20),
            stored_bytes.div_ceil(1 << 10),
        ))?;
    }
    Ok(())
}

pub(crate) fn unchunk(args: UnchunkArgs) -> anyhow::Result<()> {
    let UnchunkArgs { manifest: path, store, output, json } = args;
    let manifest = Manifest::read(&path)?;
    let store = ChunkStore::open(&store)?;
    let report = chunk::join(&manifest, &store, &output)
        .with_context(|| format!("making {} of {}", output.display(), path.display()))?;
    if json {
        return print_json(&report);
    }
    let size = report.size.div_ceil(1 << 20);
    print_line(&format!("{}: {size} MiB, {}", output.display(), report.digest))
}

pub(crate) fn prune(args: PruneChunksArgs) -> anyhow::Result<()> {
    let PruneChunksArgs { manifests, store, json } = args;
    // All of them first: one that cannot be read must not cost its chunks.
    let manifests: Vec<Manifest> =
        manifests.iter().map(|path| Manifest::read(path)).collect::<Result<_, _>>()?;
    let report = ChunkStore::prune(&store, &manifests)?;
    if json {
        return print_json(&report);
    }
    let chunk::PruneReport { kept, removed, removed_bytes, missing } = report;
    print_line(&format!(
        "{}: removed {removed} chunks ({} KiB), kept {kept}",
        store.display(),
        removed_bytes.div_ceil(1 << 10)
    ))?;
    if missing > 0 {
        eprintln!("rootfs-tools: {missing} chunks that the manifests name are not in the store");
    }
    Ok(())
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".chunks.json");
    name.into()
}
