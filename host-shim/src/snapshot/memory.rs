//! The RAM of a VM that maps its base privately, as the kernel shows it in `/proc/PID`.

use std::fs::File;

use super::Error;

/// Bytes of a page, of the guest's RAM and of the host's page tables (x86).
pub const PAGE_SIZE: u64 = 4096;

/// Consecutive pages of the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// The first page.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
}

/// The private mapping of a base file in another process.
#[derive(Debug)]
pub struct GuestMemory {
    _memory: File,
}

impl GuestMemory {
    /// Finds the mapping of `base` in process `pid`; it must be private and cover the file exactly once.
    pub fn of(pid: u32, base: &File) -> Result<Self, Error> {
        let _ = (pid, base);
        todo!()
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// The pages that the process has of its own, sorted: those that are not the base's any more.
    pub fn private_pages(&self) -> Result<Vec<PageRange>, Error> {
        todo!()
    }
}
