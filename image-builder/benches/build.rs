//! What `image-builder build` takes, as ratios to buildah's time for the same on the same machine.
//!
//! ```text
//! mmdebstrap --variant=minbase bookworm /tmp/debian.tar
//! cargo bench -p image-builder --bench build -- /tmp/debian.tar [ROUNDS]
//!
//! cold      nothing but the base as an OCI layout: it is brought into the store, and four small steps run
//! steps     the base is in the store: four small steps run
//! changed   one file changed that the last step copies
//! cached    nothing changed
//! scan      a context of 50,000 files and 1 GiB, nothing changed
//! ```
//!
//! buildah runs with `--isolation chroot --layers`, and with the storage driver, overlay or vfs, that is faster here. Sides
//! are interleaved, so that what else the machine does hits both; each begins with nothing left to write back. Wall times of
//! whole processes, medians of the rounds.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use oci::layer::Compression;
use oci::{Hasher, MediaType, Store};
use serde_json::json;

const ROUNDS: usize = 5;
const SCAN_FILES: usize = 50_000;
/// 1 GiB in all.
const SCAN_FILE: usize = (1 << 30) / SCAN_FILES;
const SCAN_FOLDERS: usize = 500;

const DOCKERFILE: &str = "FROM localhost/base:latest\n\
    RUN mkdir -p /opt/app && echo 'deb' > /etc/step\n\
    COPY src /opt/app/src\n\
    RUN find /opt/app -type f | sort > /opt/app/list && cp /etc/passwd /opt/app/users\n\
    COPY main /opt/app/main\n";

fn main() -> anyhow::Result<()> {
    // Cargo adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [base] => all(Path::new(base), ROUNDS),
        [base, rounds] => all(Path::new(base), rounds.parse().context("ROUNDS must be a number")?),
        _ => {
            println!(
                "SKIPPED: no base was given (cargo bench -p image-builder --bench build -- BASE.tar [ROUNDS])"
            );
            Ok(())
        }
    }
}

/// Everything of one side is in a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
}

/// Who builds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Ours,
    Buildah(&'static str),
}

fn all(base: &Path, rounds: usize) -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "buildah's chroot isolation and our containers need root here"
    );
    // Not on /tmp, which may be a tmpfs.
    let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let bench = Bench { dir };
    bench.prepare(base)?;
    let load = fs::read_to_string("/proc/loadavg")?;
    println!("load {}", load.trim());
    let theirs = bench.faster_driver()?;
    let sides = [Side::Ours, theirs];
    let mut times = [[Vec::new(), Vec::new(), Vec::new(), Vec::new()], Default::default()];
    for round in 0..rounds {
        for (side, times) in sides.iter().zip(&mut times) {
            bench.empty(*side)?;
            fs::write(bench.path("context/main"), format!("round {round}"))?;
            let bring = bench.bring_base(*side)?;
            let build = bench.build(*side)?;
            times[0].push(bring + build);
            times[1].push(build);
            fs::write(bench.path("context/main"), format!("round {round} changed"))?;
            times[2].push(bench.build(*side)?);
            times[3].push(bench.build(*side)?);
        }
    }
    let limits = [Some(0.6), None, Some(0.3), Some(0.3)];
    for ((name, limit), index) in ["cold", "steps", "changed", "cached"].iter().zip(limits).zip(0..) {
        let (ours, theirs) = (median(&times[0][index]), median(&times[1][index]));
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        let limit = limit.map_or(String::new(), |limit| format!(", at most {limit} wanted"));
        println!("{name:8} {:>8.1} ms, buildah {:>8.1} ms: {ratio:.2}{limit}", millis(ours), millis(theirs));
    }
    let scan = bench.scan(rounds)?;
    println!("scan     {:>8.1} ms for {SCAN_FILES} files and 1 GiB, at most 2000 wanted", millis(scan));
    Ok(())
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The base as an OCI layout, and a context.
    fn prepare(&self, base: &Path) -> anyhow::Result<()> {
        let store = Store::open_or_create(&self.path("base"))?;
        let mut hasher = Hasher::new();
        std::io::copy(&mut File::open(base)?, &mut hasher)?;
        let diff_id = hasher.finish().0;
        let layer = store.put_blob(Compression::None.media_type(), File::open(base)?)?;
        let platform = oci::host_platform();
        let config = json!({
            "architecture": platform.architecture(), "os": platform.os(),
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            // buildah counts them.
            "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "mmdebstrap"}],
        });
        let config = store.put_blob(MediaType::ImageConfig, config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MediaType::ImageManifest, "config": config, "layers": [layer],
        });
        let manifest = store.put_blob(MediaType::ImageManifest, manifest.to_string().as_bytes())?;
        store.tag("latest", &manifest)?;
        fs::create_dir_all(self.path("context/src"))?;
        fs::write(self.path("context/Dockerfile"), DOCKERFILE)?;
        for number in 0..100 {
            fs::write(
                self.path("context/src").join(format!("{number}.txt")),
                format!("{number}\n").repeat(200),
            )?;
        }
        fs::write(self.path("context/main"), "main")?;
        // buildah asks for both, and takes nothing from this machine's own configuration.
        fs::write(
            self.path("policy.json"),
            json!({"default": [{"type": "insecureAcceptAnything"}]}).to_string(),
        )?;
        Ok(())
    }

    /// buildah with the driver that builds faster.
    fn faster_driver(&self) -> anyhow::Result<Side> {
        let mut found: Option<(Duration, Side)> = None;
        for driver in ["overlay", "vfs"] {
            let side = Side::Buildah(driver);
            self.empty(side)?;
            let time = self.bring_base(side).and_then(|bring| Ok(bring + self.build(side)?));
            match time {
                Ok(time) => {
                    println!("buildah with {driver}: {:.1} ms", millis(time));
                    found = Some(
                        found.map_or((time, side), |found| if found.0 < time { found } else { (time, side) }),
                    );
                }
                Err(error) => println!("buildah with {driver} does not work here: {error}"),
            }
        }
        let (_, side) = found.context("buildah works with no driver; it is Debian's package buildah")?;
        Ok(side)
    }

    fn command(&self, side: Side) -> Command {
        match side {
            Side::Ours => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
                command.arg("--quiet").arg("--data-dir").arg(self.path("ours"));
                command
            }
            Side::Buildah(driver) => {
                let mut command = Command::new("buildah");
                command
                    .arg("--root")
                    .arg(self.path("theirs/root"))
                    .arg("--runroot")
                    .arg(self.path("theirs/run"));
                command.args(["--storage-driver", driver]);
                command.env("STORAGE_OPTS", "");
                command
            }
        }
    }

    fn empty(&self, side: Side) -> anyhow::Result<()> {
        match side {
            Side::Ours => drop(fs::remove_dir_all(self.path("ours"))),
            Side::Buildah(_) => {
                if self.path("theirs").exists() {
                    // It knows what it has mounted.
                    let _ = self.command(side).args(["rm", "--all"]).output();
                    let _ = rustix::mount::unmount(
                        self.path("theirs/root/overlay"),
                        rustix::mount::UnmountFlags::DETACH,
                    );
                    fs::remove_dir_all(self.path("theirs"))?;
                }
            }
        }
        Ok(())
    }

    fn bring_base(&self, side: Side) -> anyhow::Result<Duration> {
        let mut command = self.command(side);
        // buildah makes a name of the path, and names have no capitals.
        command.current_dir(self.dir.path());
        let layout = "oci:base:latest";
        match side {
            Side::Ours => command.args(["load", layout, "-t", "localhost/base:latest"]),
            Side::Buildah(_) => command
                .arg("pull")
                .arg("--signature-policy")
                .arg(self.path("policy.json"))
                .args(["--quiet", layout]),
        };
        let time = timed(&mut command)?;
        if let Side::Buildah(_) = side {
            let images = self.command(side).args(["images", "--quiet", "--no-trunc"]).output()?;
            let id = String::from_utf8(images.stdout)?;
            let id = id.lines().next().context("buildah has no image")?.to_owned();
            timed(self.command(side).args(["tag", &id, "localhost/base:latest"]))?;
        }
        Ok(time)
    }

    fn build(&self, side: Side) -> anyhow::Result<Duration> {
        let mut command = self.command(side);
        match side {
            Side::Ours => command.args(["build", "-t", "app"]),
            Side::Buildah(_) => command
                .args(["build", "--isolation", "chroot", "--layers", "--pull=never", "--quiet", "-t", "app"])
                .arg("--signature-policy")
                .arg(self.path("policy.json")),
        };
        timed(command.arg(self.path("context")))
    }

    /// The median of builds with a large context of which everything is known.
    fn scan(&self, rounds: usize) -> anyhow::Result<Duration> {
        let folder = self.path("large");
        let mut random: u64 = 1;
        for index in 0..SCAN_FOLDERS {
            fs::create_dir_all(folder.join(format!("data/{index}")))?;
        }
        for index in 0..SCAN_FILES {
            let path = folder.join(format!("data/{}/{index}", index % SCAN_FOLDERS));
            let mut file = BufWriter::new(File::create(path)?);
            for _ in 0..SCAN_FILE / 8 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                file.write_all(&random.to_le_bytes())?;
            }
            file.flush()?;
        }
        fs::write(folder.join("Dockerfile"), "FROM scratch\nCOPY data /data\n")?;
        self.empty(Side::Ours)?;
        let build = || {
            timed(
                self.command(Side::Ours).args(["build", "--compression", "none", "-t", "large"]).arg(&folder),
            )
        };
        let first = build()?;
        println!("scan     {:>8.1} ms for the first time, with the writing of the layer", millis(first));
        let times = (0..rounds.max(1)).map(|_| build()).collect::<Result<Vec<_>, _>>()?;
        Ok(median(&times))
    }
}

/// Runs the command and says how long it took.
fn timed(command: &mut Command) -> anyhow::Result<Duration> {
    // What others left to be written is not ours.
    rustix::fs::sync();
    let begun = Instant::now();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("{:?}", command.get_program()))?;
    let time = begun.elapsed();
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(time)
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
