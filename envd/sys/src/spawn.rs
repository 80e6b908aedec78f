//! Starting a program: clone3(2) into its cgroup, then nothing but system calls until execve(2).
//!
//! ```text
//! parent                       child
//!   clone3 ───────────────────►  signals, session, stdio, terminal, limits, groups, gid, uid, cwd, seccomp, execve
//!   failure pipe ◄─────────────  (stage, errno), or closed by a successful execve
//! ```
//!
//! Everything that needs memory is made before the clone. The child calls the kernel directly and takes no lock, so it
//! does not matter which locks other threads of the parent held.

use std::convert::Infallible;
use std::ffi::{CString, c_char, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::pipe::{PipeFlags, pipe_with};

use crate::SeccompFilter;

/// From `linux/sched.h`: it does not fit the C library's `int`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The size of the kernel's `sigset_t` in bytes.
const SIGSET_SIZE: usize = 8;

/// The kernel's `sigset_t` without a signal.
const EMPTY_SIGSET: [u64; 1] = [0];

/// The kernel's `struct sigaction` (handler, flags, restorer, mask) for `SIG_DFL`.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// A program to start.
#[derive(Debug)]
pub struct Spawn<'fd> {
    /// Paths to try in turn, as a search of `PATH` gives them.
    pub programs: Vec<CString>,
    /// The arguments, the program's name first.
    pub argv: Vec<CString>,
    /// The environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// The working directory, entered with the program's own credentials.
    pub cwd: CString,
    /// Whom to run as; `None` keeps the caller's credentials.
    pub credentials: Option<Credentials>,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'fd>; 3],
    /// A cgroup2 directory to be born in; `None` is the caller's own.
    pub cgroup: Option<BorrowedFd<'fd>>,
    /// Whether standard input is a terminal, which becomes the controlling one of the program's session.
    pub terminal: bool,
    /// Limits, set with the caller's credentials.
    pub rlimits: Vec<Rlimit>,
    /// The nice value; `None` keeps the caller's.
    pub nice: Option<i32>,
    /// What to write to `oom_score_adj`, decimal; `None` keeps the caller's.
    pub oom_score_adj: Option<CString>,
    /// What the program may ask of the kernel, and no new privileges; `None` leaves both as they are.
    pub filter: Option<&'fd SeccompFilter>,
}

/// A limit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimit {
    /// The kernel's number of the resource (`RLIMIT_*`).
    pub resource: u32,
    /// The limit that holds; `u64::MAX` is none.
    pub soft: u64,
    /// What an unprivileged process may raise it to; `u64::MAX` is no limit.
    pub hard: u64,
}

/// A user with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

/// A child process that has not necessarily reached its program yet.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid in the caller's pid namespace.
    pub pid: i32,
    /// Refers to this process even when its pid is used again.
    pub pidfd: OwnedFd,
    /// Ends without a byte when the program runs, or gives the bytes of a [`Failure`].
    pub failure: OwnedFd,
}

/// The step at which a child gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Session, signals, stdio or terminal.
    Prepare,
    /// Groups, gid or uid.
    Credentials,
    /// Entering the working directory.
    Cwd,
    /// Executing the program.
    Exec,
    /// Applying the seccomp filter.
    Filter,
    /// Limits, nice value or oom score.
    Limits = 5,
}

/// Why a child did not reach its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The step.
    pub stage: Stage,
    /// The system's error number.
    pub errno: i32,
}

impl Failure {
    /// The size of a failure on the pipe.
    pub const SIZE: usize = 5;

    /// Reads what a child wrote to its failure pipe.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Option<Self> {
        let stage = match bytes[0] {
            0 => Stage::Prepare,
            1 => Stage::Credentials,
            2 => Stage::Cwd,
            3 => Stage::Exec,
            4 => Stage::Filter,
            5 => Stage::Limits,
            _ => return None,
        };
        Some(Self { stage, errno: i32::from_ne_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) })
    }

    fn encode(self) -> [u8; Self::SIZE] {
        let errno = self.errno.to_ne_bytes();
        [self.stage as u8, errno[0], errno[1], errno[2], errno[3]]
    }
}

impl Spawn<'_> {
    /// Starts the child. Whether the program was reached is told by [`Spawned::failure`].
    pub fn start(&self) -> io::Result<Spawned> {
        let argv = pointers(&self.argv);
        let env = pointers(&self.env);
        let (failure, report) = pipe_with(PipeFlags::CLOEXEC)?;

        let mut pidfd: RawFd = -1;
        // SAFETY: clone_args is plain integers, for which zero is valid and means "not used".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = libc::CLONE_PIDFD as u64;
        args.pidfd = &raw mut pidfd as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        if let Some(cgroup) = self.cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = cgroup.as_raw_fd() as u64;
        }
        // SAFETY: args is initialised, lives over the call, and its size is given. Without CLONE_VM the child works on a
        // copy of the memory. The child calls only `Child::run`, which allocates nothing and takes no lock.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let child = Child { spawn: self, argv: &argv, env: &env };
                let failure = match child.run() {
                    Err(failure) => failure.encode(),
                };
                // SAFETY: write reads `failure`, which lives on this stack; _exit ends the child without running the
                // parent's exit handlers.
                unsafe {
                    libc::write(report.as_raw_fd(), failure.as_ptr().cast(), failure.len());
                    libc::_exit(127)
                }
            }
            pid => {
                // SAFETY: the call succeeded, so the kernel has stored a new descriptor that nobody else owns.
                let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
                Ok(Spawned { pid: pid as i32, pidfd, failure })
            }
        }
    }
}

/// A NULL-terminated array for execve. The strings must outlive it.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// What runs between clone and execve: async-signal-safe calls only.
struct Child<'a> {
    spawn: &'a Spawn<'a>,
    argv: &'a [*const c_char],
    env: &'a [*const c_char],
}

impl Child<'_> {
    fn run(&self) -> Result<Infallible, Failure> {
        let spawn = self.spawn;
        self.reset_signals();
        // SAFETY: setsid takes no argument.
        check(Stage::Prepare, unsafe { libc::setsid() }.into())?;
        self.move_stdio()?;
        if spawn.terminal {
            // SAFETY: TIOCSCTTY takes a number; descriptor 0 was just opened.
            check(Stage::Prepare, unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into())?;
        }
        self.set_limits()?;
        if let Some(score) = &spawn.oom_score_adj {
            self.set_oom_score(score)?;
        }
        if let Some(credentials) = &spawn.credentials {
            self.take_credentials(credentials)?;
        }
        // SAFETY: cwd is NUL-terminated and outlives the call.
        check(Stage::Cwd, unsafe { libc::chdir(spawn.cwd.as_ptr()) }.into())?;
        if let Some(filter) = spawn.filter {
            filter.apply().map_err(|_| Failure { stage: Stage::Filter, errno: last_errno() })?;
        }
        Err(self.exec())
    }

    /// The agent ignores and blocks signals that programs expect at their defaults.
    fn reset_signals(&self) {
        // SAFETY: the arrays are larger than the kernel's sigaction and sigset_t, zero means SIG_DFL without flags and the
        // empty set, and both live over the calls. Signals whose disposition cannot be changed answer EINVAL, which does
        // not matter. The C library's wrappers would refuse the signals that it keeps for itself.
        unsafe {
            for signal in 1..=crate::LAST_SIGNAL {
                let none = std::ptr::null_mut::<u64>();
                libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT_ACTION.as_ptr(), none, SIGSET_SIZE);
            }
            let none = std::ptr::null_mut::<u64>();
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                EMPTY_SIGSET.as_ptr(),
                none,
                SIGSET_SIZE,
            );
        }
    }

    fn move_stdio(&self) -> Result<(), Failure> {
        // A descriptor that is itself 0, 1 or 2 would be overwritten by an earlier one: move all out of the way first.
        let mut moved = [0; 3];
        for (to, from) in moved.iter_mut().zip(&self.spawn.stdio) {
            // SAFETY: F_DUPFD_CLOEXEC takes a descriptor that is open here and a number.
            *to = unsafe { libc::fcntl(from.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
            check(Stage::Prepare, (*to).into())?;
        }
        for (target, from) in (0..).zip(moved) {
            // SAFETY: dup2 takes two numbers; `from` was just opened. It clears close-on-exec on the target.
            check(Stage::Prepare, unsafe { libc::dup2(from, target) }.into())?;
        }
        Ok(())
    }

    fn set_limits(&self) -> Result<(), Failure> {
        for limit in &self.spawn.rlimits {
            let new = [limit.soft, limit.hard];
            let none = std::ptr::null_mut::<u64>();
            // SAFETY: prlimit64 reads two u64, which is the kernel's struct rlimit64, from `new`, which outlives the call.
            let set = unsafe { libc::syscall(libc::SYS_prlimit64, 0, limit.resource, new.as_ptr(), none) };
            check(Stage::Limits, set)?;
        }
        if let Some(nice) = self.spawn.nice {
            // SAFETY: setpriority takes numbers.
            let set = unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, nice) };
            check(Stage::Limits, set)?;
        }
        Ok(())
    }

    fn set_oom_score(&self, score: &CString) -> Result<(), Failure> {
        let bytes = score.as_bytes();
        // SAFETY: the path is a C string literal, `bytes` outlives the write, and the descriptor was opened here.
        unsafe {
            let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            check(Stage::Limits, file.into())?;
            let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
            check(Stage::Limits, written as c_long)?;
            libc::close(file);
        }
        Ok(())
    }

    /// By raw system calls: the C library's wrappers signal every thread of the process that this child is a copy of.
    fn take_credentials(&self, credentials: &Credentials) -> Result<(), Failure> {
        let Credentials { uid, gid, groups } = credentials;
        // SAFETY: setgroups reads `groups.len()` ids from `groups`, which outlives the call; the others take numbers.
        unsafe {
            check(Stage::Credentials, libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
            check(Stage::Credentials, libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid))?;
            check(Stage::Credentials, libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid))?;
        }
        Ok(())
    }

    /// Tries each path as execvpe(3) does: a permission error is told only when no other path works.
    fn exec(&self) -> Failure {
        let mut errno = libc::ENOENT;
        for program in &self.spawn.programs {
            // SAFETY: the path is NUL-terminated, argv and env are NULL-terminated arrays of NUL-terminated strings, and
            // all outlive the call.
            unsafe { libc::execve(program.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            match last_errno() {
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => errno = libc::EACCES,
                other => return Failure { stage: Stage::Exec, errno: other },
            }
        }
        Failure { stage: Stage::Exec, errno }
    }
}

fn last_errno() -> i32 {
    // SAFETY: __errno_location gives this thread's errno, which is always valid to read.
    unsafe { *libc::__errno_location() }
}

fn check(stage: Stage, result: c_long) -> Result<(), Failure> {
    if result < 0 { Err(Failure { stage, errno: last_errno() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    fn strings(texts: &[&str]) -> Vec<CString> {
        texts.iter().map(|text| CString::new(*text).unwrap()).collect()
    }

    fn run(programs: &[&str], argv: &[&str], cwd: &str) -> (String, Option<Failure>, Option<i32>) {
        let null = File::open("/dev/null").unwrap();
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let spawn = Spawn {
            programs: strings(programs),
            argv: strings(argv),
            env: strings(&["GREETING=hello"]),
            cwd: CString::new(cwd).unwrap(),
            credentials: None,
            stdio: [null.as_fd(), write.as_fd(), write.as_fd()],
            cgroup: None,
            terminal: false,
            rlimits: vec![Rlimit { resource: libc::RLIMIT_CORE, soft: 0, hard: 4096 }],
            nice: Some(5),
            oom_score_adj: None,
            filter: None,
        };
        let spawned = spawn.start().unwrap();
        drop(write);
        let mut failure = Vec::new();
        File::from(spawned.failure).read_to_end(&mut failure).unwrap();
        let failure = failure.first_chunk().map(|bytes| Failure::decode(*bytes).unwrap());
        let mut output = String::new();
        File::from(read).read_to_string(&mut output).unwrap();
        let status = waitid(WaitId::PidFd(spawned.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
        (output, failure, status.exit_status())
    }

    #[test]
    fn a_program_runs_with_its_arguments_environment_and_cwd() {
        let script = "echo $0 $1 $GREETING $(pwd); exit 7";
        let (output, failure, status) =
            run(&["/nonexistent/sh", "/bin/sh"], &["sh", "-c", script, "zero", "one"], "/tmp");
        assert_eq!(output, "zero one hello /tmp\n");
        assert_eq!((failure, status), (None, Some(7)));
    }

    #[test]
    fn programs_get_default_signals_and_a_session_of_their_own() {
        let (output, ..) = run(
            &["/bin/sh"],
            &["sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status; ps -o sid= -p $$; echo $$"],
            "/",
        );
        let lines: Vec<_> = output.split_whitespace().collect();
        assert_eq!(lines[..4], ["SigBlk:", "0000000000000000", "SigIgn:", "0000000000000000"]);
        assert_eq!(lines[4], lines[5], "the program leads its session");
    }

    #[test]
    fn limits_and_the_nice_value_are_the_programs() {
        let (output, ..) = run(&["/bin/sh"], &["sh", "-c", "nice; ulimit -S -c; ulimit -H -c"], "/");
        // The shell counts core files in blocks of 512 bytes.
        assert_eq!(output, "5\n0\n8\n");
    }

    #[test]
    fn failures_name_their_step() {
        let exec = run(&["/nonexistent"], &["x"], "/").1.unwrap();
        assert_eq!(exec, Failure { stage: Stage::Exec, errno: libc::ENOENT });
        let denied = run(&["/etc/passwd", "/nonexistent"], &["x"], "/").1.unwrap();
        assert_eq!(denied, Failure { stage: Stage::Exec, errno: libc::EACCES });
        let cwd = run(&["/bin/sh"], &["sh"], "/nonexistent").1.unwrap();
        assert_eq!(cwd, Failure { stage: Stage::Cwd, errno: libc::ENOENT });
    }
}
