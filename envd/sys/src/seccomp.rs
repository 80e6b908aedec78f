//! Seccomp filters: classic BPF programs that the kernel runs at each system call.

use std::fmt;
use std::io;

/// Instructions at most (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// The size of one instruction (`struct sock_filter`).
const INSTRUCTION: usize = 8;

/// A program for `seccomp(SECCOMP_SET_MODE_FILTER)`.
#[derive(Clone)]
pub struct SeccompFilter {
    program: Vec<libc::sock_filter>,
}

impl fmt::Debug for SeccompFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeccompFilter").field("instructions", &self.program.len()).finish()
    }
}

impl SeccompFilter {
    /// A filter from its bytes, as libseccomp's `seccomp_export_bpf` gives them. The kernel checks what they do.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let (instructions, rest) = bytes.as_chunks::<INSTRUCTION>();
        if instructions.is_empty() || !rest.is_empty() || instructions.len() > MAX_INSTRUCTIONS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "a seccomp filter has 1 to {MAX_INSTRUCTIONS} instructions of {INSTRUCTION} bytes, got {} bytes",
                    bytes.len()
                ),
            ));
        }
        let program = instructions
            .iter()
            .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
                code: u16::from_ne_bytes([c0, c1]),
                jt,
                jf,
                k: u32::from_ne_bytes([k0, k1, k2, k3]),
            })
            .collect();
        Ok(Self { program })
    }

    /// Takes away from the calling thread for ever, and from all that it starts: what the filter refuses, and the
    /// privileges of setuid programs. Async-signal-safe.
    pub fn apply(&self) -> io::Result<()> {
        // SAFETY: prctl takes numbers here.
        match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64) } {
            0 => self.apply_privileged(),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// As [`SeccompFilter::apply`], and setuid programs keep their privileges: needs CAP_SYS_ADMIN. Async-signal-safe.
    pub fn apply_privileged(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            // Checked at its making.
            len: self.program.len() as u16,
            // The kernel only reads it.
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: seccomp reads `program` and the instructions that it points to, which both outlive the call.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0u64, &raw const program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_filter_are_refused() {
        for bytes in [vec![], vec![0; 7], vec![0; 9], vec![0; (MAX_INSTRUCTIONS + 1) * INSTRUCTION]] {
            assert_eq!(SeccompFilter::from_bytes(&bytes).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        assert!(SeccompFilter::from_bytes(&[0; INSTRUCTION * 2]).is_ok());
    }
}
