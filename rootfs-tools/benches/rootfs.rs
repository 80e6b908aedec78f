//! `rootfs-tools build` against `tar -x` followed by `mke2fs -d`, on the uncompressed layers of one image.
//!
//! ```text
//! mmdebstrap --variant=minbase bookworm /tmp/debian.tar
//! cargo bench -p rootfs-tools --bench rootfs -- /tmp/debian.tar [PAIRS]
//! ```
//!
//! Pairs are interleaved, so that what else the machine does hits both. Each side begins with nothing left to write back
//! and ends with the file synced. Wall times
//! are of whole processes; the peak memory is the kernel's VmHWM of the building process.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use oci::layer::Compression;
use oci::{MediaType, Store};
use rootfs_tools::{BuildOptions, build};
use serde_json::json;

/// The argument with which this program runs itself for one build.
const ONE_BUILD: &str = "--one-build";

const PAIRS: usize = 10;

fn main() -> anyhow::Result<()> {
    // Cargo adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [ONE_BUILD, layout, output] => one_build(Path::new(layout), Path::new(output)),
        [layer] => compare(Path::new(layer), PAIRS),
        [layer, pairs] => compare(Path::new(layer), pairs.parse().context("PAIRS must be a number")?),
        _ => {
            println!(
                "SKIPPED: no layer was given (cargo bench -p rootfs-tools --bench rootfs -- LAYER.tar [PAIRS])"
            );
            Ok(())
        }
    }
}

fn one_build(layout: &Path, output: &Path) -> anyhow::Result<()> {
    let image = Store::open(layout)?.image("bench")?;
    build(&image, &BuildOptions::default(), output, &mut |_| {})?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM in /proc/self/status")?;
    println!("{}", peak.trim().trim_end_matches(" kB"));
    Ok(())
}

fn compare(layer: &Path, pairs: usize) -> anyhow::Result<()> {
    ensure!(pairs > 0, "at least one pair is needed");
    let folder = tempfile::tempdir()?;
    let layout = folder.path().join("layout");
    let bytes = wrap(layer, &layout)?;
    let output = folder.path().join("rootfs.ext4");
    let unpacked = folder.path().join("unpacked");
    // Room for inode tables and slack, as somebody who does not know the tree would give it.
    let size = format!("{}M", (bytes + bytes / 2).div_ceil(1 << 20) + 64);

    let (mut ours, mut theirs, mut peak) = (Vec::new(), Vec::new(), 0);
    for pair in 1..=pairs {
        rustix::fs::sync();
        let started = Instant::now();
        let program = std::env::current_exe()?;
        let text = run(program.as_os_str(), &[ONE_BUILD.as_ref(), layout.as_os_str(), output.as_os_str()])?;
        ours.push(started.elapsed());
        peak = peak.max(text.trim().parse::<u64>()?);
        std::fs::remove_file(&output)?;

        std::fs::create_dir(&unpacked)?;
        rustix::fs::sync();
        let started = Instant::now();
        run(
            "tar".as_ref(),
            &[
                "-x".as_ref(),
                "-p".as_ref(),
                "-f".as_ref(),
                layer.as_os_str(),
                "-C".as_ref(),
                unpacked.as_os_str(),
            ],
        )?;
        let from = ["-q".as_ref(), "-t".as_ref(), "ext4".as_ref(), "-d".as_ref(), unpacked.as_os_str()];
        run("mke2fs".as_ref(), &[&from[..], &[output.as_os_str(), size.as_ref()]].concat())?;
        theirs.push(started.elapsed());
        std::fs::remove_file(&output)?;
        std::fs::remove_dir_all(&unpacked)?;
        println!("pair {pair}: rootfs-tools {:?}, tar and mke2fs {:?}", ours[pair - 1], theirs[pair - 1]);
    }
    let (ours, theirs) = (median(ours), median(theirs));
    println!("layer: {} MiB", bytes >> 20);
    println!("median of {pairs}: rootfs-tools {ours:?}, tar and mke2fs {theirs:?}");
    println!("ratio: {:.1}", theirs.as_secs_f64() / ours.as_secs_f64());
    println!("peak memory of rootfs-tools: {:.1} MiB", peak as f64 / 1024.0);
    Ok(())
}

/// An OCI layout whose image `bench` has the tar file as its one layer.
fn wrap(layer: &Path, layout: &Path) -> anyhow::Result<u64> {
    let store = Store::open_or_create(layout)?;
    let file = std::fs::File::open(layer).with_context(|| layer.display().to_string())?;
    let bytes = file.metadata()?.len();
    let descriptor = store.put_blob(Compression::None.media_type(), file)?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let rootfs = json!({ "type": "layers", "diff_ids": [descriptor.digest()] });
    let config =
        json!({ "architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs }).to_string();
    let config = store.put_blob(MediaType::ImageConfig, config.as_bytes())?;
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [descriptor] }).to_string();
    let manifest = store.put_blob(MediaType::ImageManifest, manifest.as_bytes())?;
    store.tag("bench", &manifest)?;
    Ok(bytes)
}

fn run(program: &OsStr, args: &[&OsStr]) -> anyhow::Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("running {program:?}"))?;
    ensure!(output.status.success(), "{program:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
