//! What files share as chunks, by chunk size: what is stored, how many chunks and bytes of manifest that takes, and how long.
//!
//! ```text
//! cargo bench -p rootfs-tools --bench chunks -- FIRST.ext4 SECOND.ext4 ..
//! ```
//!
//! The files go into one store in the order in which they are given, so `new` is what each adds to those before it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use rootfs_tools::chunk::{ChunkSize, ChunkStore, join, split};

const SIZES: [u64; 7] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20];

fn main() -> anyhow::Result<()> {
    // Cargo adds --bench.
    let files: Vec<PathBuf> =
        std::env::args().skip(1).filter(|arg| arg != "--bench").map(PathBuf::from).collect();
    if files.is_empty() {
        println!("SKIPPED: no file was given (cargo bench -p rootfs-tools --bench chunks -- FILE..)");
        return Ok(());
    }
    let total: u64 =
        files.iter().map(|file| Ok(std::fs::metadata(file)?.len())).sum::<std::io::Result<_>>()?;
    for (number, file) in files.iter().enumerate() {
        println!("{}: {}", number + 1, file.display());
    }
    println!(
        "\n| chunk KiB | chunks stored | new in each file, % | stored, % of all {} MiB | manifests KiB | chunk MB/s | unchunk MB/s |",
        total >> 20
    );
    println!("|---|---|---|---|---|---|---|");
    for size in SIZES {
        measure(&files, total, size)?;
    }
    Ok(())
}

fn measure(files: &[PathBuf], total: u64, size: u64) -> anyhow::Result<()> {
    let folder = tempfile::tempdir_in(std::env::current_dir()?)?;
    let store = ChunkStore::open_or_create(&folder.path().join("store"))?;
    let chunk_size = ChunkSize::new(size).context("a chunk size that is none")?;
    rustix::fs::sync();
    let started = Instant::now();
    let split_all = |file: &PathBuf| split(file, &store, chunk_size);
    let made = files.iter().map(split_all).collect::<Result<Vec<_>, _>>()?;
    let split_time = started.elapsed().as_secs_f64();
    rustix::fs::sync();
    let started = Instant::now();
    for (manifest, _) in &made {
        join(manifest, &store, Path::new(&folder.path().join("joined")))?;
    }
    let join_time = started.elapsed().as_secs_f64();
    let new: Vec<String> = made
        .iter()
        .map(|(_, report)| format!("{:.1}", 100.0 * report.new_bytes as f64 / report.size as f64))
        .collect();
    let stored: u64 = made.iter().map(|(_, report)| report.stored_bytes).sum();
    let chunks: u64 = made.iter().map(|(_, report)| report.new).sum();
    let manifests: usize = made.iter().map(|(manifest, _)| manifest.to_json().len()).sum();
    println!(
        "| {} | {chunks} | {} | {:.1} | {} | {:.0} | {:.0} |",
        size >> 10,
        new.join(" "),
        100.0 * stored as f64 / total as f64,
        manifests >> 10,
        total as f64 / split_time / 1e6,
        total as f64 / join_time / 1e6,
    );
    Ok(())
}
