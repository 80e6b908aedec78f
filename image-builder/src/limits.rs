//! What a `RUN` step may use, as the command line says it, and whether this machine can hold a step to it.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cgroups::Controllers;
use crate::error::Error;

/// The processes and threads of a step where nothing else is said: more than honest builds have, few enough that a fork
/// bomb ends before the machine does.
const DEFAULT_PIDS: u64 = 16_384;
/// `/dev/shm` of a step where nothing else is said, as Docker's.
const DEFAULT_SHM: u64 = 64 << 20;
/// The period in which a step's time on the processors is counted, in microseconds: the kernel's default.
pub(crate) const CPU_PERIOD: u64 = 100_000;
/// The least that the kernel takes, in microseconds for each period.
const MIN_CPU_QUOTA: u64 = 1_000;

/// The limits of a `RUN` step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepLimits {
    /// Memory in bytes; swap does not add to it.
    pub memory: Option<u64>,
    /// Time on the processors.
    pub cpus: Option<Cpus>,
    /// Processes and threads.
    pub pids: Pids,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// The size of `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Resource limits of each process.
    pub ulimits: Vec<Ulimit>,
}

impl Default for StepLimits {
    fn default() -> Self {
        Self {
            memory: None,
            cpus: None,
            pids: Pids::Default,
            timeout: None,
            shm_size: DEFAULT_SHM,
            ulimits: Vec::new(),
        }
    }
}

/// Processors, in microseconds of each 100 milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus(pub u64);

/// How many processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pids {
    /// A number that no honest build needs, where the machine can hold a step to it.
    #[default]
    Default,
    /// As many.
    Limit(u64),
    /// Any number.
    Unlimited,
}

impl Pids {
    pub(crate) fn number(self) -> Option<u64> {
        match self {
            Self::Default => Some(DEFAULT_PIDS),
            Self::Limit(number) => Some(number),
            Self::Unlimited => None,
        }
    }
}

/// A resource limit of a process, as `nofile=1024:4096`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// As in setrlimit(2): `RLIMIT_NOFILE`.
    pub name: String,
    /// The limit.
    pub soft: u64,
    /// What the process may raise it to.
    pub hard: u64,
}

impl StepLimits {
    /// Whether the machine can hold a step to what was asked for: an error where it cannot. Gives what is to be said about
    /// a limit that nobody asked for.
    pub(crate) fn check(&self, controllers: &Controllers) -> Result<Option<String>, Error> {
        let explicit = [
            ("--memory", self.memory.is_some(), controllers.memory.is_some()),
            ("--cpus", self.cpus.is_some(), controllers.cpu.is_some()),
            ("--pids-limit", matches!(self.pids, Pids::Limit(_)), controllers.pids.is_some()),
        ];
        if let Some((option, ..)) = explicit.iter().find(|(_, asked, can)| *asked && !can) {
            return Err(Error::Invalid {
                what: (*option).to_owned(),
                reason: format!(
                    "this machine cannot hold a step to it: {}; leave the option out, or run the build where cgroups can be \
                     made",
                    controllers.why_not
                ),
            });
        }
        let missing = self.pids == Pids::Default && controllers.pids.is_none();
        Ok(missing.then(|| format!("note: steps have no limit of processes: {}", controllers.why_not)))
    }
}

/// Bytes: a number, perhaps with b, k, m, g or t (of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: a number of bytes, perhaps with k, m, g or t, as 512m");
    let lower = text.to_ascii_lowercase();
    let end = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).filter(|size| *size > 0 && *size < i64::MAX as u64).ok_or_else(wrong)
}

/// A time: numbers with h, m, s or ms, as `1h30m`; without a unit, seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: a number of seconds, or as 90s, 10m, 1h30m");
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds)).filter(|time| !time.is_zero()).ok_or_else(wrong);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..end].parse().map_err(|_| wrong())?;
        let unit_end = rest[end..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| end + at);
        let unit = match &rest[end..unit_end] {
            "h" => Duration::from_secs(3600),
            "m" => Duration::from_secs(60),
            "s" => Duration::from_secs(1),
            "ms" => Duration::from_millis(1),
            _ => return Err(wrong()),
        };
        let part =
            u32::try_from(number).ok().and_then(|number| unit.checked_mul(number)).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = &rest[unit_end..];
    }
    Some(total).filter(|time| !time.is_zero()).ok_or_else(wrong)
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no number of processors, as 1.5 (at least 0.01)");
        let number: f64 = text.parse().map_err(|_| wrong())?;
        // No machine has more, and the product must not overflow.
        if !(number > 0.0 && number <= 1_000_000.0) {
            return Err(wrong());
        }
        let quota = (number * CPU_PERIOD as f64).round() as u64;
        if quota < MIN_CPU_QUOTA { Err(wrong()) } else { Ok(Self(quota)) }
    }
}

impl FromStr for Pids {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<i64>() {
            Ok(0 | -1) => Ok(Self::Unlimited),
            Ok(number) if number > 0 => Ok(Self::Limit(number.unsigned_abs())),
            _ => Err(format!("{text:?} is no number of processes; 0 or -1 is without a limit")),
        }
    }
}

impl FromStr for Ulimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const NAMES: [&str; 16] = [
            "as",
            "core",
            "cpu",
            "data",
            "fsize",
            "locks",
            "memlock",
            "msgqueue",
            "nice",
            "nofile",
            "nproc",
            "rss",
            "rtprio",
            "rttime",
            "sigpending",
            "stack",
        ];
        let wrong =
            |problem: &str| format!("{text:?}: {problem}; expected NAME=SOFT[:HARD], as nofile=1024:4096");
        let (name, values) = text.split_once('=').ok_or_else(|| wrong("it has no ="))?;
        if !NAMES.contains(&name) {
            return Err(wrong(&format!("unknown limit {name:?}, there are {}", NAMES.join(", "))));
        }
        let number = |text: &str| match text {
            "-1" => Ok(u64::MAX),
            _ => text.parse().map_err(|_| wrong(&format!("{text:?} is no number"))),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(wrong("the soft limit is above the hard one"));
        }
        Ok(Self { name: format!("RLIMIT_{}", name.to_ascii_uppercase()), soft, hard })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_times_and_numbers_are_parsed() {
        for (text, size) in [("1", 1), ("64m", 64 << 20), ("2G", 2 << 30), ("1gib", 1 << 30), ("3kb", 3072)] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "m", "0", "-1", "1.5g", "1x", "99999999999t"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for (text, millis) in [("5", 5000), ("90s", 90_000), ("1h30m", 5_400_000), ("250ms", 250)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "0", "0s", "m", "5x", "1h2", "99999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!("1.5".parse(), Ok(Cpus(150_000)));
        for text in ["0", "-1", "0.001", "nan", "inf", "x"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
        assert_eq!("-1".parse(), Ok(Pids::Unlimited));
        assert_eq!("7".parse(), Ok(Pids::Limit(7)));
        assert!("-2".parse::<Pids>().is_err());
        let limit = Ulimit { name: "RLIMIT_NOFILE".into(), soft: 3, hard: u64::MAX };
        assert_eq!("nofile=3:-1".parse(), Ok(limit));
        for text in ["nofile", "files=3", "nofile=3:2", "nofile=x"] {
            assert!(text.parse::<Ulimit>().is_err(), "{text}");
        }
    }
}
