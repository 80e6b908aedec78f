//! The options of a start, checked.

use std::time::Duration;

use envd_proto::process::{OutputPolicy, Rlimit as WireRlimit, StartOptions};
use envd_sys::Rlimit;

use super::log::{DEFAULT_SIZE, MAX_SIZE, MIN_SIZE, Policy};
use crate::connect::{Code, Error};

/// How long the end of a process can be asked for when nobody says otherwise.
const KEEP_ENDED: Duration = Duration::from_secs(30);

/// The longest that can be asked for.
const MAX_KEEP_ENDED: Duration = Duration::from_secs(3600);

/// A tenant's process is killed before the agent when memory runs out; E2B's value.
const OOM_SCORE_ADJ: i32 = 100;

/// The spawner stands at -900: no process of a client is protected as well as that.
const MIN_OOM_SCORE_ADJ: i32 = -899;

/// The names of getrlimit(2) by the kernel's numbers (`asm-generic/resource.h`).
const RESOURCES: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// What a start asks for beside E2B's fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) log_size: usize,
    pub(super) policy: Policy,
    pub(super) keep_ended: Duration,
    pub(super) rlimits: Vec<Rlimit>,
    pub(super) nice: Option<i32>,
    pub(super) oom_score_adj: i32,
    pub(super) own_cgroup: bool,
}

impl Options {
    /// Checks what a client sent.
    pub(super) fn parse(options: Option<StartOptions>) -> Result<Self, Error> {
        let options = options.unwrap_or_default();
        let log_size = match options.log_bytes as usize {
            0 => DEFAULT_SIZE,
            size if (MIN_SIZE..=MAX_SIZE).contains(&size) => size,
            size => return Err(range("log_bytes", size, &format!("{MIN_SIZE} to {MAX_SIZE}"))),
        };
        let policy = match OutputPolicy::try_from(options.output_policy) {
            Ok(OutputPolicy::Unspecified) => Policy::Paced,
            Ok(OutputPolicy::Drop) => Policy::Drop,
            Ok(OutputPolicy::Block) => Policy::Block,
            Err(_) => return Err(range("output_policy", options.output_policy, "a value of OutputPolicy")),
        };
        let keep_ended =
            options.keep_ended_seconds.map_or(KEEP_ENDED, |seconds| Duration::from_secs(seconds.into()));
        if keep_ended > MAX_KEEP_ENDED {
            return Err(range("keep_ended_seconds", keep_ended.as_secs(), "at most 3600"));
        }
        if let Some(nice) = options.nice.filter(|nice| !(-20..=19).contains(nice)) {
            return Err(range("nice", nice, "-20 to 19"));
        }
        let oom_score_adj = options.oom_score_adj.unwrap_or(OOM_SCORE_ADJ);
        if !(MIN_OOM_SCORE_ADJ..=1000).contains(&oom_score_adj) {
            let expected =
                format!("{MIN_OOM_SCORE_ADJ} to 1000, since the sandbox's own spawner stands below");
            return Err(range("oom_score_adj", oom_score_adj, &expected));
        }
        if options.rlimits.len() > RESOURCES.len() {
            let count = options.rlimits.len();
            return Err(range("the number of rlimits", count, "one for each resource"));
        }
        Ok(Self {
            log_size,
            policy,
            keep_ended,
            rlimits: options.rlimits.iter().map(rlimit).collect::<Result<_, _>>()?,
            nice: options.nice,
            oom_score_adj,
            own_cgroup: options.own_cgroup,
        })
    }
}

fn rlimit(limit: &WireRlimit) -> Result<Rlimit, Error> {
    let lower = limit.resource.to_ascii_lowercase();
    let name = lower.strip_prefix("rlimit_").unwrap_or(&lower);
    let resource = (0..).zip(RESOURCES).find_map(|(number, known)| (known == name).then_some(number));
    let resource = resource.ok_or_else(|| {
        let message =
            format!("rlimit '{}' is unknown: expected one of {}", limit.resource, RESOURCES.join(", "));
        Error::new(Code::InvalidArgument, message)
    })?;
    let (soft, hard) = (limit.soft.unwrap_or(u64::MAX), limit.hard.unwrap_or(u64::MAX));
    if soft > hard {
        let message = format!("rlimit '{name}': the soft limit {soft} is above the hard limit {hard}");
        return Err(Error::new(Code::InvalidArgument, message));
    }
    Ok(Rlimit { resource, soft, hard })
}

fn range(name: &str, got: impl std::fmt::Display, expected: &str) -> Error {
    Error::new(Code::InvalidArgument, format!("options: {name} is {got}, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(options: StartOptions) -> Result<Options, Code> {
        Options::parse(Some(options)).map_err(|error| error.code())
    }

    fn limit(resource: &str, soft: Option<u64>, hard: Option<u64>) -> StartOptions {
        let rlimits = vec![WireRlimit { resource: resource.into(), soft, hard }];
        StartOptions { rlimits, ..Default::default() }
    }

    #[test]
    fn without_options_e2bs_values_hold() {
        let options = Options::parse(None).unwrap();
        assert_eq!((options.log_size, options.policy), (1 << 20, Policy::Paced));
        assert_eq!((options.keep_ended, options.oom_score_adj), (Duration::from_secs(30), 100));
        assert_eq!((options.nice, options.own_cgroup), (None, false));
        assert_eq!(code(StartOptions::default()), Ok(options));
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let default = StartOptions::default;
        for refused in [
            StartOptions { log_bytes: 4095, ..default() },
            StartOptions { log_bytes: (64 << 20) + 1, ..default() },
            StartOptions { output_policy: 3, ..default() },
            StartOptions { keep_ended_seconds: Some(3601), ..default() },
            StartOptions { nice: Some(20), ..default() },
            StartOptions { nice: Some(-21), ..default() },
            StartOptions { oom_score_adj: Some(1001), ..default() },
            StartOptions { oom_score_adj: Some(-900), ..default() },
            StartOptions { rlimits: vec![WireRlimit::default(); 17], ..default() },
            limit("files", Some(1), Some(1)),
            limit("", Some(1), Some(1)),
            limit("nofile", Some(2), Some(1)),
            limit("nofile", None, Some(1)),
        ] {
            assert_eq!(code(refused.clone()), Err(Code::InvalidArgument), "{refused:?}");
        }
        assert_eq!(
            code(StartOptions { oom_score_adj: Some(-899), ..default() }).unwrap().oom_score_adj,
            -899
        );
        let kept = code(StartOptions { keep_ended_seconds: Some(0), ..default() }).unwrap().keep_ended;
        assert_eq!(kept, Duration::ZERO);
    }

    #[test]
    fn limits_have_the_kernels_numbers() {
        let parsed = |name| code(limit(name, Some(7), None)).unwrap().rlimits[0];
        assert_eq!(parsed("cpu"), Rlimit { resource: 0, soft: 7, hard: u64::MAX });
        assert_eq!(parsed("RLIMIT_NOFILE").resource, 7);
        assert_eq!(parsed("rttime").resource, 15);
    }
}
