//! The agent's boot against an init that only dials out: CPU time of QEMU from its start to the hello.
//!
//! Three guests in turn, so that a noisy machine is noisy for all of them: the yardstick, the agent without a container,
//! the agent with one. `make bench-boot` builds what it needs and prints the medians and their ratios.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use e2e::{DEADLINE, made, template};
use envd_channel::control::{ControlReader, Framing};
use envd_proto::boot;
use envd_proto::control::{FromAgent, from_agent};
use host_shim::vmm::{Accelerator, Boot, Netdev, Scratch, VmSpec, Wiring, qemu, tsc};
use tokio::net::UnixStream;

/// Interleaved rounds; the first one is a warm-up and not counted.
const ROUNDS: usize = 16;

#[derive(Clone, Copy)]
struct Sample {
    cpu: Duration,
    wall: Duration,
}

/// A VMM that dies with the bench.
struct Vm(Child);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() {
    // `cargo test` and `cargo nextest` run benches too, once each and to see that they build: only `--bench` measures.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("boot: not measured without --bench");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let yardstick = folder.path().join("dial-out.cpio");
    rootfs_tools::guest_image(&made("TIFFIN_DIAL_OUT"), &yardstick).unwrap();
    let agent = made("TIFFIN_GUEST_IMAGE");
    let guests: [(&str, &Path, &str); 3] = [
        ("init that only dials out", &yardstick, ""),
        ("envd, no container", &agent, "envd.container=none"),
        ("envd, container created", &agent, ""),
    ];
    let mut samples = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for turn in 0..guests.len() {
            // Each guest comes after each other one equally often.
            let n = (round + turn) % guests.len();
            let (_, image, extra) = guests[n];
            let sample = runtime.block_on(boot(folder.path(), image, extra)).unwrap();
            if round > 0 {
                samples[n].push(sample);
            }
        }
        eprint!("\rround {} of {ROUNDS}", round + 1);
    }
    eprintln!();
    println!("{:<28} {:>10} {:>10} {:>18}", "medians of 15", "CPU ms", "wall ms", "CPU to the first");
    let first = median(&samples[0], |sample| sample.cpu);
    for ((name, ..), samples) in guests.iter().zip(&samples) {
        let (cpu, wall) = (median(samples, |sample| sample.cpu), median(samples, |sample| sample.wall));
        println!("{name:<28} {:>10.0} {:>10.0} {:>18.2}", cpu * 1e3, wall * 1e3, cpu / first);
    }
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> Duration) -> f64 {
    let mut values: Vec<_> = samples.iter().map(of).collect();
    values.sort_unstable();
    values[values.len() / 2].as_secs_f64()
}

async fn boot(folder: &Path, image: &Path, extra: &str) -> io::Result<Sample> {
    let scratch: PathBuf = folder.join("scratch.ext4");
    rootfs_tools::empty(&scratch, 256 << 20, None, b"bench").map_err(io::Error::other)?;
    let spec = VmSpec {
        boot: Some(Boot {
            kernel: made("TIFFIN_KERNEL"),
            guest_image: image.to_owned(),
            profile: boot::Profile::default(),
            init: boot::Init::default(),
            volumes: Vec::new(),
        }),
        rootfs: template().join("rootfs.ext4"),
        scratch: Scratch::Raw(scratch),
        disks: Vec::new(),
        network: Netdev::Nothing,
        cpus: 1,
        memory_mib: 256,
        accelerator: Accelerator::Tcg,
        wiring: Wiring::Serial,
    };
    let ram = folder.join("ram");
    fs::File::create(&ram)?.set_len(spec.memory_mib << 20)?;
    let ram = fs::File::options().read(true).write(true).open(ram)?;
    let mut arguments = qemu::arguments(&spec, tsc::frequency().await);
    if let Some(at) = arguments.iter().position(|argument| argument == "-append") {
        arguments[at + 1].push(format!(" {extra}"));
    }
    let (control, control_far) = StdUnixStream::pair()?;
    let (_mux, mux_far) = StdUnixStream::pair()?;
    let (_console, console_far) = StdUnixStream::pair()?;
    let (_monitor, monitor_far) = StdUnixStream::pair()?;
    let fds = [
        (OwnedFd::from(control_far), qemu::CONTROL_FD),
        (mux_far.into(), qemu::MUX_FD),
        (console_far.into(), qemu::CONSOLE_FD),
        (monitor_far.into(), qemu::MONITOR_FD),
        (ram.into(), qemu::RAM_FD),
    ];
    let fds = fds.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    let mut command = Command::new(qemu::find().map_err(io::Error::other)?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    command.fd_mappings(fds.into()).map_err(io::Error::other)?;
    let start = Instant::now();
    let vm = Vm(command.spawn()?);
    control.set_nonblocking(true)?;
    let mut reader = ControlReader::<_, FromAgent>::new(UnixStream::from_std(control)?, Framing::Records);
    let message = tokio::time::timeout(DEADLINE, reader.receive()).await??;
    let wall = start.elapsed();
    match message.and_then(|(_, message)| message.message) {
        Some(from_agent::Message::Hello(hello)) => {
            if std::env::var_os("PHASES").is_some() {
                for phase in &hello.phases {
                    eprint!(" {} {}..{}", phase.name, phase.start_us / 1000, phase.end_us / 1000);
                }
                eprintln!(
                    " container {} wall {} cpu {}",
                    hello.container,
                    wall.as_millis(),
                    cpu_time(vm.0.id())?.as_millis()
                );
            }
        }
        other => return Err(io::Error::other(format!("expected a hello, got {other:?}"))),
    }
    Ok(Sample { cpu: cpu_time(vm.0.id())?, wall })
}

/// CPU time of all threads of a process, in the scheduler's nanoseconds.
fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("schedstat"))?;
        let on_cpu = text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok());
        nanoseconds += on_cpu.ok_or_else(|| io::Error::other(format!("schedstat of {pid}: {text:?}")))?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}
