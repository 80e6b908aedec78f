//! Whether KVM runs guests here.
//!
//! An openable /dev/kvm proves nothing. On hosts with a partial KVM, KVM_CREATE_VM succeeds and even a small ROM that
//! writes to a port ran to its end, while a Linux kernel failed: QEMU aborted on an MSR with `-cpu host`, and hung with
//! other models. So the proof is the guest kernel itself: booted without an initramfs and a disk it must reach
//! the panic for want of a root within a deadline. That takes 0.1 to 0.3 s on a sound KVM; the answer is
//! kept until the host's next boot.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use command_fds::FdMapping;
use tokio::io::AsyncReadExt;

use super::qemu::{Arguments, isolation};
use super::{Kind, Program, end, firecracker, process};
use crate::Error;
use crate::cache::Answer;

/// Ten times what a sound KVM needs.
const DEADLINE: Duration = Duration::from_secs(3);

/// A kernel prints a few hundred bytes before it gives up.
const MAX_OUTPUT: u64 = 64 << 10;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// A kernel ran.
    Works,
    /// Why it cannot be used.
    Unusable(String),
}

/// Finds out with the VMM that is to run guests, or remembers from `cache` what was found since this host's boot.
pub async fn probe(vmm: &Program, kernel: &Path, cache: &Path) -> Result<Kvm, Error> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        // Not kept: a changed group or mode should count at once.
        return Ok(Kvm::Unusable(format!("/dev/kvm: {error}")));
    }
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let this_boot = std::fs::read(boot_id).map_err(Error::io("read", boot_id))?;
    let known = Answer::about(cache, "kvm", &this_boot, &[&vmm.path, kernel])?;
    if let Some(text) = known.read() {
        return Ok(if text.is_empty() { Kvm::Works } else { Kvm::Unusable(text) });
    }
    let found = match vmm.kind {
        Kind::Qemu => boot(&vmm.path, arguments(kernel), Vec::new()).await?,
        Kind::Firecracker => boot_firecracker(&vmm.path, kernel).await?,
    };
    known.keep(match &found {
        Kvm::Works => "",
        Kvm::Unusable(reason) => reason,
    });
    Ok(found)
}

/// Firecracker has no command line for a machine: it reads what to boot from a file, and has no API then.
async fn boot_firecracker(program: &Path, kernel: &Path) -> Result<Kvm, Error> {
    const CONFIGURATION_FD: i32 = 3;
    const NAME: &str = "the machine of a probe (memfd_create)";
    let file = rustix::fs::memfd_create("probe", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = std::fs::File::from(file.map_err(|error| Error::io("make", NAME)(error.into()))?);
    file.write_all(firecracker::probe_configuration().as_bytes()).map_err(Error::io("write", NAME))?;
    let file = FdMapping { parent_fd: file.into(), child_fd: CONFIGURATION_FD };
    let path = format!("/proc/self/fd/{CONFIGURATION_FD}");
    // Its log is on standard error, where the reason of a failure is looked for.
    let args = ["--no-api", "--config-file", &path, "--level", "Error", "--log-path", "/proc/self/fd/2"];
    let args = args.into_iter().map(OsString::from).collect();
    boot(program, args, vec![file, firecracker::kernel_descriptor(kernel)?]).await
}

async fn boot(program: &Path, args: Vec<OsString>, fds: Vec<FdMapping>) -> Result<Kvm, Error> {
    let mut child = process::bound(program, args, fds)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn { program: program.display().to_string(), source })?;
    let (mut console, mut errors) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let run = async {
        if let (Some(stdout), Some(stderr)) = (stdout, stderr) {
            let (mut stdout, mut stderr) = (stdout.take(MAX_OUTPUT), stderr.take(MAX_OUTPUT));
            let _ = tokio::join!(stdout.read_to_end(&mut console), stderr.read_to_end(&mut errors));
        }
        child.wait().await
    };
    let ended = tokio::time::timeout(DEADLINE, run).await;
    if ended.is_err() {
        end(&mut child).await?;
        let reason = format!("a guest kernel did not run to its end within {} s", DEADLINE.as_secs());
        return Ok(Kvm::Unusable(reason));
    }
    Ok(judge(&String::from_utf8_lossy(&console), &String::from_utf8_lossy(&errors)))
}

/// The panic for want of a root is the last thing that a kernel does on its way up.
fn judge(console: &str, errors: &str) -> Kvm {
    if console.contains("Unable to mount root fs") || console.contains("No working init found") {
        return Kvm::Works;
    }
    let said =
        errors.lines().rfind(|line| line.to_ascii_lowercase().contains("error")).or(errors.lines().last());
    Kvm::Unusable(said.unwrap_or("a guest kernel ended before its last step").trim().to_owned())
}

fn arguments(kernel: &Path) -> Vec<OsString> {
    let mut args = Arguments::default();
    args.pair("-machine", "microvm,acpi=off,rtc=on,isa-serial=on").pair("-accel", "kvm").pair("-cpu", "host");
    args.pair("-m", "128M").pair("-smp", "1");
    isolation(&mut args);
    args.pair("-kernel", kernel)
        .pair("-append", "console=ttyS0 quiet panic=-1 reboot=t")
        .pair("-serial", "stdio");
    args.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_that_came_up_is_proof() {
        let panic = "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)";
        assert_eq!(judge(panic, ""), Kvm::Works);
        let early = judge("Kernel panic - not syncing: timer doesn't work", "");
        assert_eq!(early, Kvm::Unusable("a guest kernel ended before its last step".into()));
        let qemu =
            "qemu: error: failed to set MSR 0x10a to 0x69\nqemu: kvm_buf_set_msrs: Assertion failed.\n";
        assert_eq!(judge("", qemu), Kvm::Unusable("qemu: error: failed to set MSR 0x10a to 0x69".into()));
    }
}
