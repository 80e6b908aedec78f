//! What `rootfs-tools` takes, as ratios to what others take for the same on the same machine.
//!
//! ```text
//! mmdebstrap --variant=minbase bookworm /tmp/debian.tar
//! cargo bench -p rootfs-tools --bench rootfs -- /tmp/debian.tar [ROUNDS]
//!
//! plain      a plain layer, against tar -x and mke2fs -d, and against cat > file; both sides synced
//! gzip       the same layer as one and as four gzip ones, against decompressing them alone on as many threads, and
//!            against gzip -dc of one after the other
//! small      100,000 small files, against mke2fs -d of the unpacked tree
//! empty      an empty 64 GiB disk: milliseconds and bytes on the host
//! size       the image, against its data rounded to blocks
//! memory     peak memory with a million entries, against 64 MiB and 256 bytes for each
//! ```
//!
//! Sides are interleaved, so that what else the machine does hits both; each begins with nothing left to write back. Wall
//! times are of whole processes, medians of the rounds. The peak memory is the kernel's VmHWM of the building process.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use oci::layer::Compression;
use oci::{Hasher, MediaType, Store};
use rootfs_tools::{BuildOptions, build};
use serde_json::json;

/// The arguments with which this program runs itself for one side.
const ONE_BUILD: &str = "--one-build";
const ONE_DECOMPRESSION: &str = "--one-decompression";

const ROUNDS: usize = 10;

/// Rounds of what takes others many seconds.
const LONG_ROUNDS: usize = 3;

const SMALL_FILES: usize = 100_000;
const MANY_ENTRIES: usize = 1_000_000;

const MIB: u64 = 1 << 20;

fn main() -> anyhow::Result<()> {
    // Cargo adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [ONE_BUILD, layout, output] => one_build(Path::new(layout), Path::new(output)),
        [ONE_DECOMPRESSION, layout] => one_decompression(Path::new(layout)),
        [layer] => all(Path::new(layer), ROUNDS),
        [layer, rounds] => all(Path::new(layer), rounds.parse().context("ROUNDS must be a number")?),
        _ => {
            println!(
                "SKIPPED: no layer was given (cargo bench -p rootfs-tools --bench rootfs -- LAYER.tar [ROUNDS])"
            );
            Ok(())
        }
    }
}

fn one_build(layout: &Path, output: &Path) -> anyhow::Result<()> {
    let image = Store::open(layout)?.image("bench")?;
    let report = build(&image, &BuildOptions::default(), output, &mut |_| {})?;
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM in /proc/self/status")?;
    // The last number is what the build itself counts before it waits for the disk.
    println!(
        "{} {} {}",
        peak.trim().trim_end_matches(" kB"),
        report.entries,
        report.index_ms + report.write_ms
    );
    Ok(())
}

/// Decompresses all layers to nowhere, on as many threads as there are processors.
fn one_decompression(layout: &Path) -> anyhow::Result<()> {
    let image = Store::open(layout)?.image("bench")?;
    let next = AtomicUsize::new(0);
    let work = || -> anyhow::Result<()> {
        while let Some(layer) = image.layers.get(next.fetch_add(1, Ordering::Relaxed)) {
            let blob = File::open(layer.store().blob_path(layer.descriptor.digest())?)?;
            let mut stream = layer.decompress(blob)?;
            let mut buffer = vec![0; 256 << 10];
            while stream.read(&mut buffer)? > 0 {}
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism()?.get();
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
    })
}

struct Bench {
    folder: tempfile::TempDir,
    rounds: usize,
}

fn all(layer: &Path, rounds: usize) -> anyhow::Result<()> {
    ensure!(rounds > 0, "at least one round is needed");
    let bench = Bench { folder: tempfile::tempdir()?, rounds };
    println!("{:<44} {:>12} {:>12} {:>8}  limit", "", "ours", "theirs", "ratio");
    bench.plain(layer)?;
    bench.gzip(layer)?;
    bench.size(layer)?;
    bench.empty()?;
    bench.small()?;
    bench.memory()
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the sides one after the other, again and again; the medians.
    fn rounds<const N: usize>(
        &self,
        rounds: usize,
        mut sides: [&mut dyn FnMut() -> anyhow::Result<Duration>; N],
    ) -> anyhow::Result<[Duration; N]> {
        let mut times = [const { Vec::new() }; N];
        for _ in 0..rounds {
            for (side, times) in sides.iter_mut().zip(&mut times) {
                rustix::fs::sync();
                times.push(side()?);
            }
        }
        Ok(times.map(median))
    }

    /// One build in a process of its own: its wall time, its peak memory in KiB, its entries, and its time without the
    /// disk.
    fn build(&self, layout: &Path) -> anyhow::Result<(Duration, u64, u64, Duration)> {
        let output = self.path("rootfs.ext4");
        let program = std::env::current_exe()?;
        let started = Instant::now();
        let text = run(program.as_os_str(), &[ONE_BUILD.as_ref(), layout.as_os_str(), output.as_os_str()])?;
        let taken = started.elapsed();
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        let mut next = || numbers.next().context("a number is missing").and_then(|number| Ok(number?));
        Ok((taken, next()?, next()?, Duration::from_millis(next()?)))
    }

    fn unpack_and_mke2fs(&self, layer: &Path, bytes: u64) -> anyhow::Result<Duration> {
        let (unpacked, output) = (self.path("unpacked"), self.path("theirs.ext4"));
        fs::create_dir(&unpacked)?;
        let started = Instant::now();
        untar(layer, &unpacked)?;
        mke2fs(&unpacked, &output, bytes + bytes / 2, 16_384)?;
        File::open(&output)?.sync_all()?;
        let taken = started.elapsed();
        fs::remove_dir_all(&unpacked)?;
        fs::remove_file(&output)?;
        Ok(taken)
    }

    fn plain(&self, layer: &Path) -> anyhow::Result<()> {
        let layout = self.path("plain");
        let bytes = wrap(&[layer], Compression::None, &layout)?;
        let copy = self.path("copy");
        let [ours, theirs, cat] = self.rounds(
            self.rounds,
            [
                &mut || self.build(&layout).map(|(taken, ..)| taken),
                &mut || self.unpack_and_mke2fs(layer, bytes),
                &mut || {
                    let started = Instant::now();
                    let script = format!("cat {} > {}", layer.display(), copy.display());
                    run("sh".as_ref(), &["-c".as_ref(), script.as_ref()])?;
                    File::open(&copy)?.sync_all()?;
                    let taken = started.elapsed();
                    fs::remove_file(&copy)?;
                    Ok(taken)
                },
            ],
        )?;
        row("plain layer, tar -x and mke2fs -d", ours, theirs, ratio(theirs, ours), ">= 10");
        row("plain layer, cat layers > file", ours, cat, ratio(cat, ours), ">= 0.5");
        Ok(())
    }

    fn gzip(&self, layer: &Path) -> anyhow::Result<()> {
        for (name, count) in [("gzip", 1), ("gzip4", 4)] {
            let layout = self.path(name);
            wrap(&vec![layer; count], Compression::Gzip, &layout)?;
            let program = std::env::current_exe()?;
            let mut without_disk = Vec::new();
            let blob = self.path("gzip.gz");
            let packed = format!("gzip -c {} > {}", layer.display(), blob.display());
            run("sh".as_ref(), &["-c".as_ref(), packed.as_ref()])?;
            let unpack = format!("for n in $(seq {count}); do gzip -dc {} > /dev/null; done", blob.display());
            let [ours, theirs, gzip] = self.rounds(
                self.rounds,
                [
                    &mut || {
                        let (taken, _, _, no_disk) = self.build(&layout)?;
                        without_disk.push(no_disk);
                        Ok(taken)
                    },
                    &mut || {
                        let started = Instant::now();
                        run(program.as_os_str(), &[ONE_DECOMPRESSION.as_ref(), layout.as_os_str()])?;
                        Ok(started.elapsed())
                    },
                    &mut || {
                        let started = Instant::now();
                        run("sh".as_ref(), &["-c".as_ref(), unpack.as_ref()])?;
                        Ok(started.elapsed())
                    },
                ],
            )?;
            let without_disk = median(without_disk);
            let shown = format!("{count} gzip layers, decompressing alone");
            row(&format!("{shown}, synced"), ours, theirs, ratio(ours, theirs), "");
            row(
                &format!("{shown}, before the sync"),
                without_disk,
                theirs,
                ratio(without_disk, theirs),
                "<= 1.15",
            );
            let shown = format!("{count} gzip layers, gzip -dc > /dev/null, before the sync");
            row(&shown, without_disk, gzip, ratio(without_disk, gzip), "");
            fs::remove_file(&blob)?;
            fs::remove_dir_all(&layout)?;
        }
        Ok(())
    }

    fn small(&self) -> anyhow::Result<()> {
        let layer = self.path("small.tar");
        write_files(&layer, SMALL_FILES, 1000)?;
        let layout = self.path("small");
        let bytes = wrap(&[&layer], Compression::None, &layout)?;
        let (unpacked, output) = (self.path("unpacked"), self.path("theirs.ext4"));
        fs::create_dir(&unpacked)?;
        untar(&layer, &unpacked)?;
        let [ours, theirs] = self.rounds(
            self.rounds.min(LONG_ROUNDS),
            [&mut || self.build(&layout).map(|(taken, ..)| taken), &mut || {
                let started = Instant::now();
                mke2fs(&unpacked, &output, 8 * bytes, 4096)?;
                File::open(&output)?.sync_all()?;
                let taken = started.elapsed();
                fs::remove_file(&output)?;
                Ok(taken)
            }],
        )?;
        row("100,000 small files, mke2fs -d", ours, theirs, ratio(theirs, ours), ">= 8");
        Ok(())
    }

    fn empty(&self) -> anyhow::Result<()> {
        let output = self.path("empty.ext4");
        let mut allocated = 0;
        let [taken] = self.rounds(
            self.rounds,
            [&mut || {
                let started = Instant::now();
                rootfs_tools::empty(&output, 65_536 * MIB, None, b"bench")?;
                let taken = started.elapsed();
                allocated = fs::metadata(&output)?.blocks() * 512;
                Ok(taken)
            }],
        )?;
        println!("{:<44} {taken:>12.1?} {:>12} {:>8}  <= 20 ms", "empty disk of 64 GiB", "", "");
        let shown = format!("{:.2} MiB", allocated as f64 / MIB as f64);
        println!("{:<44} {shown:>12} {:>12} {:>8}  <= 4 MiB", "empty disk of 64 GiB, on the host", "", "");
        Ok(())
    }

    fn size(&self, layer: &Path) -> anyhow::Result<()> {
        self.build(&self.path("plain"))?;
        let length = fs::metadata(self.path("rootfs.ext4"))?.len();
        let (mut rounded, mut folders) = (0, 0);
        for entry in tar::Archive::new(File::open(layer)?).entries()? {
            let entry = entry?;
            match entry.header().entry_type() {
                tar::EntryType::Regular => rounded += entry.size().next_multiple_of(4096),
                tar::EntryType::Directory => folders += 4096,
                _ => {}
            }
        }
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / MIB as f64);
        // A folder is a block of data to any file system.
        for (name, data) in [("files", rounded), ("files and folders", rounded + folders)] {
            println!(
                "{:<44} {:>12} {:>12} {:>8.3}  <= 1.03",
                format!("size, {name} rounded to blocks"),
                mib(length),
                mib(data),
                length as f64 / data as f64
            );
        }
        Ok(())
    }

    fn memory(&self) -> anyhow::Result<()> {
        for (name, per_folder) in [("in a thousand folders", 1000), ("in one folder", MANY_ENTRIES)] {
            let layer = self.path("many.tar");
            write_files(&layer, MANY_ENTRIES, per_folder)?;
            let layout = self.path("many");
            wrap(&[&layer], Compression::None, &layout)?;
            let (taken, peak, entries, _) = self.build(&layout)?;
            let limit = (64 << 10) + entries * 256 / 1024;
            println!(
                "{:<44} {:>12} {:>12} {:>8.2}  <= 1  ({taken:.1?})",
                format!("peak memory, a million files {name}"),
                format!("{} MiB", peak / 1024),
                format!("{} MiB", limit / 1024),
                peak as f64 / limit as f64
            );
            fs::remove_dir_all(&layout)?;
            fs::remove_file(&layer)?;
        }
        Ok(())
    }
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

fn row(name: &str, ours: Duration, theirs: Duration, ratio: f64, limit: &str) {
    println!("{name:<44} {ours:>12.1?} {theirs:>12.1?} {ratio:>8.2}  {limit}");
}

/// A tar file with small files, `per_folder` in each folder.
fn write_files(path: &Path, count: usize, per_folder: usize) -> anyhow::Result<()> {
    let mut builder = tar::Builder::new(BufWriter::new(File::create(path)?));
    for number in 0..count {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        let data = format!("{number}\n");
        header.set_size(data.len() as u64);
        header.set_path(format!("folder-{}/file-{number}", number / per_folder))?;
        header.set_cksum();
        builder.append(&header, data.as_bytes())?;
    }
    builder.into_inner()?.flush()?;
    Ok(())
}

/// An OCI layout whose image `bench` has the tar files as its layers.
fn wrap(layers: &[&Path], compression: Compression, layout: &Path) -> anyhow::Result<u64> {
    let store = Store::open_or_create(layout)?;
    let (mut descriptors, mut diff_ids, mut bytes) = (Vec::new(), Vec::new(), 0);
    for layer in layers {
        let mut file = File::open(layer).with_context(|| layer.display().to_string())?;
        let mut hasher = Hasher::new();
        bytes += io::copy(&mut file, &mut hasher)?;
        diff_ids.push(hasher.finish().0);
        let blob: Box<dyn Read> = match compression {
            Compression::Gzip => {
                let output = Command::new("gzip").arg("-c").arg(layer).output().context("running gzip")?;
                ensure!(output.status.success(), "gzip: {}", String::from_utf8_lossy(&output.stderr));
                Box::new(io::Cursor::new(output.stdout))
            }
            _ => Box::new(File::open(layer)?),
        };
        descriptors.push(store.put_blob(compression.media_type(), blob)?);
    }
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let rootfs = json!({ "type": "layers", "diff_ids": diff_ids });
    let config =
        json!({ "architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs }).to_string();
    let config = store.put_blob(MediaType::ImageConfig, config.as_bytes())?;
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": descriptors }).to_string();
    let manifest = store.put_blob(MediaType::ImageManifest, manifest.as_bytes())?;
    store.tag("bench", &manifest)?;
    Ok(bytes)
}

fn untar(layer: &Path, to: &Path) -> anyhow::Result<()> {
    let args =
        ["-x".as_ref(), "-p".as_ref(), "-f".as_ref(), layer.as_os_str(), "-C".as_ref(), to.as_os_str()];
    run("tar".as_ref(), &args).map(drop)
}

/// Room for inode tables and slack, as somebody who does not know the tree would give it; `ratio` is bytes for each inode.
fn mke2fs(from: &Path, output: &Path, bytes: u64, ratio: u32) -> anyhow::Result<()> {
    let size = format!("{}M", bytes.div_ceil(MIB) + 64);
    let ratio = ratio.to_string();
    let from = ["-q", "-t", "ext4", "-i", &ratio, "-d"].map(OsStr::new).into_iter().chain([from.as_os_str()]);
    run("mke2fs".as_ref(), &from.chain([output.as_os_str(), size.as_ref()]).collect::<Vec<_>>()).map(drop)
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
