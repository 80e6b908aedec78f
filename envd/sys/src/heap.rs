//! The heap's free memory.

/// Gives the heap's free pages back to the kernel. The allocator keeps what lies below anything that is still in use, which
/// after a burst can be most of what the process has.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time and from any thread; it touches free memory alone.
    unsafe {
        libc::malloc_trim(0);
    }
}
