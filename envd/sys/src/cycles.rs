//! The processor's time-stamp counter.

/// What the counter shows. `None` where the processor has none that programs can read.
pub fn cycle_counter() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, it touches no memory, and Linux leaves it to programs (a process that
    // gave it up by PR_SET_TSC gets SIGSEGV, which is no undefined behaviour).
    return Some(unsafe { core::arch::x86_64::_rdtsc() });
    #[cfg(not(target_arch = "x86_64"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn it_goes_on() {
        let first = cycle_counter().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(cycle_counter().unwrap() > first);
    }
}
