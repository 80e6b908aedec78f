//! Token buckets: how many requests somebody may send.
//!
//! A bucket fills steadily, up to [`BURST_SECONDS`] of its rate; a request takes a token or is told when there is one. Nothing
//! runs in the background: a bucket is brought up to date when it is asked, and one that is full again is forgotten.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A bucket holds what comes in so many seconds: SDKs start with many calls at once, and then wait.
pub const BURST_SECONDS: u32 = 10;

/// Buckets of one kind. Addresses are free to whoever has a network of them.
const MAX_BUCKETS: usize = 1 << 16;

/// While all are taken, full ones are looked for no oftener than this: it is a walk over all of them.
const SWEEP: Duration = Duration::from_secs(1);

/// Requests in a second, and ten times as many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(u32);

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self(u32::MAX);

    /// So many requests each second; at least one. `u32::MAX` is no limit, as everywhere in the database.
    pub const fn per_second(requests: u32) -> Self {
        if requests == 0 { Self(1) } else { Self(requests) }
    }

    /// The requests of each second.
    pub fn requests(self) -> u32 {
        self.0
    }

    fn burst(self) -> f64 {
        f64::from(self.0) * f64::from(BURST_SECONDS)
    }
}

/// What clients of the control API may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// A team, unless something else was said about it.
    pub team: Rate,
    /// All requests without a team's key from one address.
    pub keyless: Rate,
}

impl Default for Rates {
    /// A build is polled five times a second, a sandbox of the first SDKs kept alive every five seconds: a team can have
    /// some hundred of those. Who has no key has little to ask.
    fn default() -> Self {
        Self { team: Rate::per_second(100), keyless: Rate::per_second(10) }
    }
}

impl Rates {
    /// Everything as fast as it comes.
    pub const UNLIMITED: Self = Self { team: Rate::UNLIMITED, keyless: Rate::UNLIMITED };
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn fill(&mut self, rate: Rate, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * f64::from(rate.0)).min(rate.burst());
        self.at = self.at.max(now);
    }

    fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        self.fill(rate, now);
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - self.tokens) / f64::from(rate.0)))
    }
}

/// A bucket for each `K`.
#[derive(Debug)]
pub struct Buckets<K>(Mutex<State<K>>);

#[derive(Debug)]
struct State<K> {
    of: HashMap<K, (Bucket, Rate)>,
    /// Of those that no bucket is left for, together.
    rest: Option<Bucket>,
    swept: Option<Instant>,
}

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(Mutex::new(State { of: HashMap::new(), rest: None, swept: None }))
    }
}

impl<K: Eq + Hash> Buckets<K> {
    /// A request of `who`, or the time until the next one may come.
    pub fn take(&self, who: K, rate: Rate) -> Result<(), Duration> {
        self.take_at(who, rate, Instant::now())
    }

    fn take_at(&self, who: K, rate: Rate, now: Instant) -> Result<(), Duration> {
        if rate == Rate::UNLIMITED {
            return Ok(());
        }
        let full = Bucket { tokens: rate.burst(), at: now };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { of, rest, swept } = &mut *state;
        if of.len() >= MAX_BUCKETS && !of.contains_key(&who) {
            if swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
                *swept = Some(now);
                of.retain(|_, (bucket, rate)| {
                    bucket.fill(*rate, now);
                    bucket.tokens < rate.burst()
                });
            }
            if of.len() >= MAX_BUCKETS {
                return rest.get_or_insert(full).take(rate, now);
            }
        }
        let (bucket, last) = of.entry(who).or_insert((full, rate));
        *last = rate;
        bucket.take(rate, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate_and_the_wait_that_was_told_is_enough() {
        let (buckets, rate, start) = (Buckets::default(), Rate::per_second(4), Instant::now());
        for _ in 0..40 {
            buckets.take_at("a", rate, start).unwrap();
        }
        let wait = buckets.take_at("a", rate, start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(250));
        buckets.take_at("b", rate, start).unwrap();
        assert!(buckets.take_at("a", rate, start + wait / 2).is_err());
        buckets.take_at("a", rate, start + wait).unwrap();
        assert!(buckets.take_at("a", rate, start + wait).is_err());
        // No more is saved up than a burst.
        let later = start + Duration::from_secs(3600);
        let passed = (0..100).filter(|_| buckets.take_at("a", rate, later).is_ok()).count();
        assert_eq!(passed, 40);
        // A clock that a request was read from before another's changes nothing.
        assert!(buckets.take_at("a", rate, start).is_err());
    }

    #[test]
    fn a_rate_that_changes_counts_from_then_on() {
        let (buckets, start) = (Buckets::default(), Instant::now());
        let passed = |rate| (0..1000).filter(|_| buckets.take_at("a", rate, start).is_ok()).count();
        assert_eq!(passed(Rate::per_second(50)), 500);
        assert_eq!(passed(Rate::per_second(1)), 0);
        assert_eq!(passed(Rate::UNLIMITED), 1000);
        assert_eq!(Rate::per_second(0), Rate::per_second(1));
    }

    #[test]
    fn more_addresses_than_buckets_share_one_until_others_are_full_again() {
        let (buckets, rate, start) = (Buckets::default(), Rate::per_second(1), Instant::now());
        for who in 0..MAX_BUCKETS {
            buckets.take_at(who, rate, start).unwrap();
        }
        let many = |now| (0..100).filter(|who| buckets.take_at(MAX_BUCKETS + who, rate, now).is_ok()).count();
        assert_eq!(many(start), 10, "all together");
        assert_eq!(buckets.0.lock().unwrap().of.len(), MAX_BUCKETS);
        buckets.take_at(0, rate, start).unwrap();
        assert_eq!(many(start + Duration::from_secs(60)), 100);
        assert_eq!(buckets.0.lock().unwrap().of.len(), 100);
    }
}
