//! How fast this host's time-stamp counter is, which is an emulated guest's counter too.
//!
//! A guest's kernel finds out by the timer chip, within milliseconds of its own. On a busy host it is off the processor just then, calls
//! the counter unstable, and lives on 250 ticks a second for ever: so does each clone of its snapshot. It is told instead.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use envd_sys::cycle_counter;

/// Time between two looks at the counter. The error is that of the looks (below a microsecond) over this: the guest's clock is
/// set from the host's when it starts, and this is how much it strays from there on.
const SPAN: Duration = Duration::from_millis(10);
/// How often a look is repeated, for one during which this process was not interrupted.
const LOOKS: usize = 16;
/// What no processor has; such a number is a mistake of ours.
const PLAUSIBLE_KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// The counter and the clock at the same moment.
#[derive(Clone, Copy, Debug)]
struct Look {
    cycles: u64,
    at: Instant,
}

/// In kHz. `None` where there is no counter, or none that makes sense.
pub async fn frequency() -> Option<NonZeroU32> {
    let first = look()?;
    tokio::time::sleep(SPAN).await;
    let second = look()?;
    khz(second.cycles.checked_sub(first.cycles)?, second.at - first.at)
}

/// The one that took least of several: its clock was read right beside its counter.
fn look() -> Option<Look> {
    let one = || {
        let before = Instant::now();
        let cycles = cycle_counter()?;
        let took = before.elapsed();
        Some((took, Look { cycles, at: before + took / 2 }))
    };
    let looks = std::iter::repeat_with(one).take(LOOKS).collect::<Option<Vec<_>>>()?;
    looks.into_iter().min_by_key(|(took, _)| *took).map(|(_, look)| look)
}

fn khz(cycles: u64, time: Duration) -> Option<NonZeroU32> {
    let khz = u128::from(cycles) * 1_000_000 / time.as_nanos().max(1);
    let khz = u64::try_from(khz).ok().filter(|khz| PLAUSIBLE_KHZ.contains(khz))?;
    NonZeroU32::new(u32::try_from(khz).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_not_told() {
        let ms = Duration::from_millis;
        assert_eq!(khz(25_961_280, ms(10)).map(NonZeroU32::get), Some(2_596_128));
        assert_eq!(khz(25_961_280, Duration::ZERO), None);
        assert_eq!(khz(0, ms(10)), None);
        assert_eq!(khz(u64::MAX, ms(10)), None);
    }

    #[tokio::test]
    #[cfg(target_arch = "x86_64")]
    async fn two_measurements_agree() {
        let (first, second) = (frequency().await.unwrap().get(), frequency().await.unwrap().get());
        // Far more than they differ by, far less than what a wrong unit would make.
        assert!(first.abs_diff(second) < first / 100, "{first} {second}");
    }
}
