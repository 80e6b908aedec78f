//! What a snapshot's files cost, as ratios to a plain copy of the same bytes in the same run.
//!
//! `cargo run --release -p host-shim --example snapshot_speed [FOLDER] [MiB of data] [MiB of dirty pages]`

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host_shim::snapshot::hash::{self, Scheme};
use host_shim::snapshot::{
    AgentVersion, Description, Digest, Durability, FileName, GuestKey, GuestMemory, HostKey, NewSnapshot,
    Origin, PAGE_SIZE, SnapshotChannel, SnapshotFolder, SnapshotMachine, Verb, delta, disk, ram,
};

const RUNS: usize = 7;
const RAM: u64 = 256 << 20;
const MIB: u64 = 1 << 20;

/// Maps argv[1] privately, and dirties argv[2] pages: runs of four, evenly spread.
const DIRTY: &str = "
import mmap, os, sys
file = open(sys.argv[1], 'r+b')
ram = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
pages, total = int(sys.argv[2]), len(ram) // 4096
step = max(total * 4 // max(pages, 1), 4)
for first in range(0, total, step):
    for page in range(first, min(first + 4, total)):
        ram[page * 4096:page * 4096 + 4096] = os.urandom(4096)
print('ready', flush=True)
sys.stdin.read()
";

struct Vmm(Child);

impl Vmm {
    fn start(base: &Path, pages: u64) -> io::Result<Self> {
        use std::io::BufRead;
        let mut child = Command::new("python3")
            .args(["-c", DIRTY])
            .arg(base)
            .arg(pages.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            io::BufReader::new(out).read_line(&mut line)?;
        }
        Ok(Self(child))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn median(mut once: impl FnMut() -> io::Result<()>) -> io::Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..RUNS {
        let start = Instant::now();
        once()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[RUNS / 2])
}

fn report(what: &str, bytes: u64, time: Duration, plain: Duration) {
    let (seconds, mib) = (time.as_secs_f64(), bytes as f64 / MIB as f64);
    let ratio = seconds / plain.as_secs_f64();
    println!("{what:<44} {:7.1} ms {:7.0} MiB/s {ratio:5.2} x plain copy", seconds * 1e3, mib / seconds);
}

/// Bytes from one file to another, a MiB at a time.
fn plain_copy(from: &File, to: &Path, pieces: &[(u64, u64)]) -> io::Result<()> {
    let out = File::create(to)?;
    let mut buffer = vec![0; MIB as usize];
    for (start, length) in pieces {
        let mut done = 0;
        while done < *length {
            let bytes = &mut buffer[..(length - done).min(MIB) as usize];
            from.read_exact_at(bytes, start + done)?;
            out.write_all_at(bytes, start + done)?;
            done += bytes.len() as u64;
        }
    }
    Ok(())
}

fn fresh(path: &Path) -> io::Result<File> {
    let _ = fs::remove_file(path);
    File::options().read(true).write(true).create_new(true).open(path)
}

fn random(length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

/// A whole base: written, and opened as a restore does.
fn whole_folder(target: &Path, memory: &File, disk: &File) -> Result<(), Box<dyn std::error::Error>> {
    let cache = target.with_extension("cache");
    let nothing: Digest = format!("sha256:{}", "0".repeat(64)).parse()?;
    let description = Description {
        key: HostKey {
            vmm: "none".into(),
            vmm_version: "0".into(),
            accelerator: "none".into(),
            cpu: nothing.clone(),
        },
        machine: SnapshotMachine {
            cpus: 1,
            memory_mib: RAM / MIB,
            disk_mib: RAM / MIB,
            channel: SnapshotChannel::Serial,
            profile: Default::default(),
            init: Default::default(),
            volumes: Vec::new(),
        },
        guest: GuestKey { kernel: nothing.clone(), guest_image: nothing.clone(), rootfs: nothing },
        agent: AgentVersion { version: "0".into(), protocol: 0 },
        origin: Origin { verb: Verb::Template, sandbox: "abc1".parse()? },
        generation: 0,
        startup_done: true,
        created_unix_s: 0,
    };
    for durability in [Durability::Volatile, Durability::Synced] {
        let start = Instant::now();
        let mut new = NewSnapshot::begin(target)?;
        new.add_bytes(FileName::State, &[1; 50_000])?;
        new.add_ram(memory)?;
        new.add_copy(FileName::Scratch, disk)?;
        let stopped = start.elapsed();
        new.publish(description.clone(), durability, Some(&cache))?;
        let (stopped, all) = (stopped.as_secs_f64() * 1e3, start.elapsed().as_secs_f64() * 1e3);
        println!(
            "folder, RAM and a disk of the same data, {durability:?}: {stopped:.1} ms, published after {all:.1} ms"
        );
    }
    let whole = SnapshotFolder::open(target)?;
    let verify = median(|| whole.verify().map_err(io::Error::other))?;
    let restore = median(|| {
        SnapshotFolder::open(target).and_then(|folder| folder.verify_once(&cache)).map_err(io::Error::other)
    })?;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!("folder: verify {:.1} ms, open and verify_once {:.3} ms", ms(verify), ms(restore));
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| std::env::temp_dir().display().to_string());
    let data = arguments.next().map_or(Ok(64), |text| text.parse())? * MIB;
    let dirty = arguments.next().map_or(Ok(48), |text| text.parse())? * MIB;
    let dir = tempfile::tempdir_in(folder)?;
    let path = |name: &str| dir.path().join(name);

    // RAM: extents of 256 KiB, evenly spread over a memfd.
    let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC)?;
    let memory = File::from(memfd);
    memory.set_len(RAM)?;
    let piece = 256 << 10;
    let pieces: Vec<_> =
        (0..data / piece).map(|index| (index * (RAM / (data / piece)) / piece * piece, piece)).collect();
    for (start, length) in &pieces {
        memory.write_all_at(&random(*length)?, *start)?;
    }
    let out = path("copy");
    let plain = median(|| {
        let _ = fs::remove_file(&out);
        plain_copy(&memory, &out, &pieces)
    })?;
    println!("{} MiB of data in a RAM of {} MiB, {}:", data / MIB, RAM / MIB, dir.path().display());
    report("plain copy of the allocated pages", data, plain, plain);
    let ram_path = path("ram");
    let save = median(|| {
        ram::save_shared(&memory, &fresh(&ram_path)?, &ram_path).map(drop).map_err(io::Error::other)
    })?;
    report("ram: save (the VM stands still)", data, save, plain);
    let saved = File::open(&ram_path)?;
    let sparse = median(|| hash::digest(&saved, Scheme::Sparse).map(drop))?;
    report("ram: hash (the VM runs)", data, sparse, plain);
    report("ram: save and hash", data, save + sparse, plain);
    let mut dense = fresh(&path("dense"))?;
    dense.write_all(&random(data)?)?;
    let hashed = median(|| hash::digest(&dense, Scheme::Plain).map(drop))?;
    report("plain SHA-256, one thread", data, hashed, plain);

    let plain_disk = median(|| {
        let _ = fs::remove_file(&out);
        plain_copy(&saved, &out, &pieces)
    })?;
    let disk_copy = median(|| {
        let _ = fs::remove_file(&out);
        disk::copy_sparse(&saved, &out).map(drop).map_err(io::Error::other)
    })?;
    report("disk: copy_sparse", data, disk_copy, plain_disk);
    let link = median(|| {
        let _ = fs::remove_file(path("link"));
        disk::link_or_copy(&saved, &path("link")).map(drop).map_err(io::Error::other)
    })?;
    println!("{:<44} {:7.3} ms", "disk: link", link.as_secs_f64() * 1e3);

    whole_folder(&path("folder"), &memory, &saved)?;

    let vmm = Vmm::start(&ram_path, dirty / PAGE_SIZE)?;
    let guest = GuestMemory::of(vmm.0.id(), &saved)?;
    let pages: u64 = guest.private_pages()?.iter().map(|range| range.count).sum();
    let bytes = pages * PAGE_SIZE;
    println!("{} MiB of private pages, in runs of 4:", bytes / MIB);
    dense.set_len(0)?;
    dense.write_all_at(&random(bytes)?, 0)?;
    let plain = median(|| {
        let _ = fs::remove_file(&out);
        plain_copy(&dense, &out, &[(0, bytes)])
    })?;
    report("plain copy of as many bytes", bytes, plain, plain);
    let find = median(|| guest.private_pages().map(drop).map_err(io::Error::other))?;
    report("delta: find", bytes, find, plain);
    let delta_path = path("ram.delta");
    let save = median(|| {
        delta::save_delta(&guest, &fresh(&delta_path)?, &delta_path).map(drop).map_err(io::Error::other)
    })?;
    report("delta: save (the VM stands still)", bytes, save, plain);
    let delta_file = File::open(&delta_path)?;
    let hashed = median(|| hash::digest(&delta_file, Scheme::Sparse).map(drop))?;
    report("delta: hash (the VM runs)", bytes, hashed, plain);
    report("delta: save and hash", bytes, save + hashed, plain);
    let clone = Vmm::start(&ram_path, 0)?;
    let clones = GuestMemory::of(clone.0.id(), &saved)?;
    let apply =
        median(|| delta::apply_delta(&delta_file, &delta_path, &clones).map(drop).map_err(io::Error::other))?;
    report("delta: apply", bytes, apply, plain);
    Ok(())
}
