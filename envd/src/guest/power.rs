//! The end of the machine.

use rustix::system::{RebootCommand, reboot};

/// Syncs and ends the machine.
///
/// A reset, not a power-off: a microVM without ACPI has none, and every VMM that starts us takes a reset for the end.
pub(super) fn off() -> ! {
    rustix::fs::sync();
    let failed = reboot(RebootCommand::Restart);
    crate::log::error(format_args!("the machine cannot be reset: {failed:?}; panicking instead"));
    // The kernel panics when its init ends, and panic=-1 resets at once.
    std::process::exit(1)
}
