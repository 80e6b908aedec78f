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

const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const ENOSYS: i32 = rustix::io::Errno::NOSYS.raw_os_error();

/// CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID and CLONE_NEWNET
/// (`linux/sched.h`).
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// From `linux/socket.h`.
const AF_VSOCK: u64 = 40;

/// Bits of an address family: there are fewer than 64 (`AF_MAX`). What lies above names none.
const FAMILY_BITS: u32 = 6;

/// `personality(2)`: Linux, 32-bit addresses' layout, and asking without a change. Never ADDR_NO_RANDOMIZE.
const PERSONALITIES: [u64; 5] = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

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
    let masked = |mask, value| ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(mask), value);
    let mut allow = |name, condition| {
        context.add_rule_conditional(ScmpAction::Allow, ScmpSyscall::from_name(name)?, &[condition]).map(drop)
    };
    allow("clone", masked(NAMESPACE_FLAGS, 0))?;
    for personality in PERSONALITIES {
        allow("personality", ScmpArgCompare::new(0, ScmpCompareOp::Equal, personality))?;
    }
    // Differs from AF_VSOCK in one bit at least. Not by a plain "not equal": that compares 64 bits, of which the kernel
    // takes 32, so that AF_VSOCK with a bit above them would pass.
    for bit in 0..FAMILY_BITS {
        let above = u64::from(u32::MAX) & !((1 << FAMILY_BITS) - 1);
        allow("socket", masked(above | 1 << bit, !AF_VSOCK & (1 << bit)))?;
    }
    context.add_rule(ScmpAction::Errno(ENOSYS), ScmpSyscall::from_name("clone3")?)?;
    Ok(context)
}

/// Calls that are harmless with every argument.
const ALLOWED: &[&str] = &[
    "accept",
    "accept4",
    "access",
    "adjtimex",
    "alarm",
    "arch_prctl",
    "bind",
    "brk",
    "cachestat",
    "capget",
    "capset",
    "chdir",
    "chmod",
    "chown",
    "chroot",
    "clock_adjtime",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "close_range",
    "connect",
    "copy_file_range",
    "creat",
    "dup",
    "dup2",
    "dup3",
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_ctl_old",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "epoll_wait_old",
    "eventfd",
    "eventfd2",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fanotify_mark",
    "fchdir",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "fchown",
    "fchownat",
    "fcntl",
    "fdatasync",
    "fgetxattr",
    "flistxattr",
    "flock",
    "fork",
    "fremovexattr",
    "fsetxattr",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futex",
    "futex_requeue",
    "futex_wait",
    "futex_waitv",
    "futex_wake",
    "futimesat",
    "getcpu",
    "getcwd",
    "getdents",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getitimer",
    "getpeername",
    "getpgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getpriority",
    "getrandom",
    "getresgid",
    "getresuid",
    "getrlimit",
    "get_robust_list",
    "getrusage",
    "getsid",
    "getsockname",
    "getsockopt",
    "get_thread_area",
    "gettid",
    "gettimeofday",
    "getuid",
    "getxattr",
    "inotify_add_watch",
    "inotify_init",
    "inotify_init1",
    "inotify_rm_watch",
    "io_cancel",
    "ioctl",
    "io_destroy",
    "io_getevents",
    "io_pgetevents",
    "ioprio_get",
    "ioprio_set",
    "io_setup",
    "io_submit",
    "kill",
    "landlock_add_rule",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "lchown",
    "lgetxattr",
    "link",
    "linkat",
    "listen",
    "listxattr",
    "llistxattr",
    "lremovexattr",
    "lseek",
    "lsetxattr",
    "lstat",
    "madvise",
    "map_shadow_stack",
    "membarrier",
    "memfd_create",
    "memfd_secret",
    "mincore",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "mlock",
    "mlock2",
    "mlockall",
    "mmap",
    "mprotect",
    "mq_getsetattr",
    "mq_notify",
    "mq_open",
    "mq_timedreceive",
    "mq_timedsend",
    "mq_unlink",
    "mremap",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "msync",
    "munlock",
    "munlockall",
    "munmap",
    "name_to_handle_at",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pause",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "pipe",
    "pipe2",
    "pkey_alloc",
    "pkey_free",
    "pkey_mprotect",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "preadv",
    "preadv2",
    "prlimit64",
    "process_mrelease",
    "process_vm_readv",
    "process_vm_writev",
    "pselect6",
    "ptrace",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readahead",
    "readlink",
    "readlinkat",
    "readv",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "remap_file_pages",
    "removexattr",
    "rename",
    "renameat",
    "renameat2",
    "restart_syscall",
    "rmdir",
    "rseq",
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigqueueinfo",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "rt_tgsigqueueinfo",
    "sched_getaffinity",
    "sched_getattr",
    "sched_getparam",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "sched_getscheduler",
    "sched_rr_get_interval",
    "sched_setaffinity",
    "sched_setattr",
    "sched_setparam",
    "sched_setscheduler",
    "sched_yield",
    "seccomp",
    "select",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "sendfile",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "setitimer",
    "setpgid",
    "setpriority",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setrlimit",
    "set_robust_list",
    "setsid",
    "setsockopt",
    "set_thread_area",
    "set_tid_address",
    "setuid",
    "setxattr",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
    "shutdown",
    "sigaltstack",
    "signalfd",
    "signalfd4",
    "socketpair",
    "splice",
    "stat",
    "statfs",
    "statx",
    "symlink",
    "symlinkat",
    "sync",
    "sync_file_range",
    "syncfs",
    "sysinfo",
    "tee",
    "tgkill",
    "time",
    "timer_create",
    "timer_delete",
    "timer_getoverrun",
    "timer_gettime",
    "timer_settime",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
    "times",
    "tkill",
    "truncate",
    "umask",
    "uname",
    "unlink",
    "unlinkat",
    "utime",
    "utimensat",
    "utimes",
    "vfork",
    "vmsplice",
    "wait4",
    "waitid",
    "write",
    "writev",
];

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn a_socket_of_every_other_family_passes_the_rules() {
        // The rules' own arithmetic, against the plain question.
        let above = u64::from(u32::MAX) & !((1 << FAMILY_BITS) - 1);
        let passes = |family: u64| {
            (0..FAMILY_BITS).any(|bit| {
                let mask = above | 1 << bit;
                family & mask == !AF_VSOCK & (1 << bit)
            })
        };
        for family in 0..1 << FAMILY_BITS {
            assert_eq!(passes(family), family != AF_VSOCK, "{family}");
            assert_eq!(
                passes(family | 1 << 32),
                family != AF_VSOCK,
                "{family} with a bit that the kernel ignores"
            );
            assert!(!passes(family | 1 << 20));
        }
    }
}
