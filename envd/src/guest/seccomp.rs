//! The seccomp filter of the profile `restricted`: what Docker's default profile lets a container without added
//! capabilities do (moby, `profiles/seccomp/default.json`), by name for every architecture.
//!
//! Refused with EPERM, among others: mounts, new namespaces (unshare, setns, clone with their flags), bpf, perf, io_uring,
//! kernel modules, keyrings, userfaultfd, reboot, swap, the clock. clone3 keeps its flags in memory where no filter can
//! look: it does not exist here (ENOSYS), and C libraries fall back to clone. Of the address families only AF_VSOCK is
//! refused, which belongs to no namespace and leads to the host. Only the machine's own ABI: no x32, no 32-bit programs.

use std::fs::File;
use std::io::{self, Read, Seek};

use envd_sys::SeccompFilter;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use rustix::fs::{MemfdFlags, memfd_create};
use seccomp_profile::{ALLOWED, CLONE, Masked, PERSONALITIES, families};

const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ENOSYS: i32 = rustix::io::Errno::NOSYS.raw_os_error();

/// The filter. Takes some milliseconds, and memory that libseccomp gives back: make it in a process that ends or keeps it.
pub(crate) fn filter() -> io::Result<SeccompFilter> {
    let mut filter = File::from(memfd_create(c"seccomp", MemfdFlags::CLOEXEC)?);
    let context =
        context().map_err(|error| io::Error::other(format!("making the seccomp filter: {error}")))?;
    context.export_bpf(&filter).map_err(io::Error::other)?;
    filter.rewind()?;
    let mut bytes = Vec::new();
    filter.read_to_end(&mut bytes)?;
    SeccompFilter::from_bytes(&bytes)
}

fn context() -> Result<ScmpFilterContext, libseccomp::error::SeccompError> {
    let mut context = ScmpFilterContext::new(ScmpAction::Errno(EPERM))?;
    debug_assert!(context.is_arch_present(ScmpArch::Native)?);
    // Another architecture's calls, and x32's with them, are refused as all that is not on the list.
    context.set_act_badarch(ScmpAction::Errno(EPERM))?;
    for name in ALLOWED {
        // A name that this libseccomp does not know is a call that programs must be able to do without.
        if let Ok(call) = ScmpSyscall::from_name(name) {
            context.add_rule(ScmpAction::Allow, call)?;
        }
    }
    let masked = |bits: Masked| ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(bits.mask), bits.value);
    let mut allow = |name, condition| {
        context.add_rule_conditional(ScmpAction::Allow, ScmpSyscall::from_name(name)?, &[condition]).map(drop)
    };
    allow("clone", masked(CLONE))?;
    for personality in PERSONALITIES {
        allow("personality", ScmpArgCompare::new(0, ScmpCompareOp::Equal, personality))?;
    }
    for bits in families() {
        allow("socket", masked(bits))?;
    }
    context.add_rule(ScmpAction::Errno(ENOSYS), ScmpSyscall::from_name("clone3")?)?;
    Ok(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use seccomp_profile::AF_VSOCK;

    /// Forks are not for a test's threads: a thread of its own takes the filter and ends.
    fn confined<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let filter = filter().unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    filter.apply().unwrap();
                    work()
                })
                .join()
                .unwrap()
        })
    }

    #[test]
    fn ordinary_calls_pass_and_dangerous_ones_do_not() {
        use nix::sched::{CloneFlags, unshare};
        use rustix::io::Errno;
        use rustix::net::{AddressFamily, SocketType, socket};

        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().to_owned();
        confined(move || {
            std::fs::write(folder.join("file"), "text").unwrap();
            assert_eq!(std::fs::read_to_string(folder.join("file")).unwrap(), "text");
            for family in
                [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6, AddressFamily::NETLINK]
            {
                assert!(!matches!(socket(family, SocketType::DGRAM, None), Err(Errno::PERM)), "{family:?}");
            }
            let vsock = AddressFamily::from_raw(AF_VSOCK as u16);
            assert_eq!(socket(vsock, SocketType::STREAM, None).unwrap_err(), Errno::PERM);
            assert_eq!(unshare(CloneFlags::CLONE_NEWUSER), Err(nix::errno::Errno::EPERM));
            let mounted =
                rustix::mount::mount("none", &folder, "tmpfs", rustix::mount::MountFlags::empty(), None);
            assert_eq!(mounted, Err(Errno::PERM));
        });
    }
}
