//! fork(2) for a process with one thread.

use std::io;

/// Which side of a fork this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The one that called; the child's pid.
    Parent(i32),
    /// The new one.
    Child,
}

/// Forks. Refused in a process with more than one thread: the child could meet a lock that another thread held.
pub fn fork() -> io::Result<Forked> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "a fork needs a process with one thread, this one has {threads}"
        )));
    }
    // SAFETY: there is no other thread, so the child has every lock and all memory in the state in which this one left it.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_cannot_fork() {
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(fork().unwrap_err().to_string().contains("one thread")));
        });
    }
}
