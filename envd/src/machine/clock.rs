//! The machine's clock.

use std::io;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

const NANOSECONDS: i64 = 1_000_000_000;

/// What the clock was, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Before {
    realtime_ns: i64,
    monotonic_ns: i64,
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(NANOSECONDS).saturating_add(time.tv_nsec)
}

/// Sets it to the host's time.
pub(super) fn set(unix_time_ns: i64) -> io::Result<Before> {
    let before = Before {
        realtime_ns: nanoseconds(clock_gettime(ClockId::Realtime)),
        monotonic_ns: nanoseconds(clock_gettime(ClockId::Monotonic)),
    };
    clock_settime(ClockId::Realtime, timespec(unix_time_ns))?;
    Ok(before)
}

impl Before {
    /// As if it had not been set.
    pub(super) fn restore(self) {
        let passed = nanoseconds(clock_gettime(ClockId::Monotonic)) - self.monotonic_ns;
        if let Err(error) = clock_settime(ClockId::Realtime, timespec(self.realtime_ns + passed)) {
            crate::log::error(format_args!("setting the clock back: {error}"));
        }
    }
}

fn timespec(ns: i64) -> Timespec {
    Timespec { tv_sec: ns.div_euclid(NANOSECONDS), tv_nsec: ns.rem_euclid(NANOSECONDS) }
}
