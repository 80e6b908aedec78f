//! `network`, and the options of a network that it shares with `run` and `start`.

use std::str::FromStr;

use clap::Args;
use sandbox_folder::network::{NetworkMode, NetworkRequest, NetworkSpec};

use super::run::Data;
use crate::verbs::complete;

/// A machine's network.
#[derive(Debug, Args)]
pub(crate) struct NetworkOptions {
    /// The machine's way out. `user` (an ordinary user) and `tap` (root) reach the internet and nothing of the host or of
    /// private networks; `slirp` reaches what this user reaches, this host's own services too.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    network: NetworkMode,

    #[command(flatten)]
    rules: NetworkRules,
}

/// What may be changed of a network.
#[derive(Debug, Args)]
pub(crate) struct NetworkRules {
    /// Open this address or range, as 10.1.0.0/16. Of all that have an address, these, the denied and those that are closed
    /// by themselves, the longest prefix decides; an address of this host is opened by itself only.
    #[arg(long, value_name = "CIDR")]
    allow_cidr: Vec<String>,

    /// Close this address or range.
    #[arg(long, value_name = "CIDR")]
    deny_cidr: Vec<String>,

    /// Limit the bytes per second, as 500k or 10m, in both directions or in one: in=10m, out=1m; the last one given of a
    /// direction holds. 0 for no limit.
    #[arg(long, value_name = "[in=|out=]RATE")]
    net_rate: Vec<NetRate>,

    /// Ask this resolver, which may be in a private network; up to 3 [default: the host's, or those that a resolver on its
    /// loopback asks]
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
}

impl NetworkOptions {
    /// What a spec says of it.
    pub(crate) fn spec(&self) -> NetworkSpec {
        self.rules.request(false).over(&NetworkSpec { mode: self.network, ..NetworkSpec::default() })
    }
}

impl NetworkRules {
    /// The change that is asked for; with `clear` what is not named is none.
    pub(crate) fn request(&self, clear: bool) -> NetworkRequest {
        let list = |list: &Vec<String>| (clear || !list.is_empty()).then(|| list.clone());
        let rate = |direction: Direction| {
            let given = self.net_rate.iter().rev().find(|rate| rate.is_of(direction));
            given.map(|rate| rate.bytes_per_s).or(clear.then_some(0))
        };
        NetworkRequest {
            allow: list(&self.allow_cidr),
            deny: list(&self.deny_cidr),
            egress_bytes_per_s: rate(Direction::Out),
            ingress_bytes_per_s: rate(Direction::In),
            dns: (!self.dns.is_empty()).then(|| self.dns.clone()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// A limit of one direction, or of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NetRate {
    direction: Option<Direction>,
    bytes_per_s: u64,
}

impl NetRate {
    fn is_of(self, direction: Direction) -> bool {
        self.direction.is_none_or(|own| own == direction)
    }
}

impl FromStr for NetRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected bytes per second as 500k or in=10m, got {text:?}");
        let (direction, rate) = match text.split_once('=') {
            None => (None, text),
            Some(("in", rate)) => (Some(Direction::In), rate),
            Some(("out", rate)) => (Some(Direction::Out), rate),
            Some(_) => return Err(expected()),
        };
        let lower = rate.to_ascii_lowercase();
        let (digits, factor) = match lower.chars().last() {
            Some('k') => (lower.trim_end_matches('k'), 1 << 10),
            Some('m') => (lower.trim_end_matches('m'), 1 << 20),
            Some('g') => (lower.trim_end_matches('g'), 1 << 30),
            _ => (lower.as_str(), 1),
        };
        let number: u64 = digits.parse().map_err(|_| expected())?;
        Ok(Self { direction, bytes_per_s: number.checked_mul(factor).ok_or_else(expected)? })
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  host-shim network web                              its rules, and what has become of its packets
  host-shim network web --deny-cidr 203.0.113.0/24   close it; connections that it has there are reset
  host-shim network web --clear --net-rate out=1m    all other rules go

What is given takes the place of what the sandbox has of that kind; what is not given stays. The change holds until the
sandbox ends, also over a pause, and for forks of it. A fork, a resume and a clone have a network made afresh, with counters
from 0: TCP connections to the outside that their guests still have are reset. Exit codes: 0 ok, 1 failure, 2 bad rules.")]
pub(crate) struct NetworkVerb {
    /// A sandbox with --network user or tap.
    #[arg(add = complete::ids())]
    pub(crate) id: String,

    #[command(flatten)]
    rules: NetworkRules,

    /// Lists and limits that are not given are emptied.
    #[arg(long)]
    clear: bool,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) data: Data,
}

impl NetworkVerb {
    /// The change that is asked for, if it is one.
    pub(crate) fn request(&self) -> Option<NetworkRequest> {
        let request = self.rules.request(self.clear);
        (request != NetworkRequest::default()).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_units_and_directions() {
        let rate = |direction, bytes_per_s| Ok(NetRate { direction, bytes_per_s });
        assert_eq!("500k".parse(), rate(None, 500 << 10));
        assert_eq!("in=10M".parse(), rate(Some(Direction::In), 10 << 20));
        assert_eq!("out=0".parse(), rate(Some(Direction::Out), 0));
        for text in ["", "k", "up=1m", "1.5m", "-1", "18446744073709551615g", "1t"] {
            assert!(text.parse::<NetRate>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn what_is_not_named_stays_unless_it_is_cleared() {
        let rules = NetworkRules {
            allow_cidr: vec!["10.0.0.0/8".into()],
            deny_cidr: Vec::new(),
            net_rate: vec!["1m".parse().unwrap(), "in=2m".parse().unwrap()],
            dns: Vec::new(),
        };
        let request = rules.request(false);
        assert_eq!((request.deny, request.dns), (None, None));
        assert_eq!((request.egress_bytes_per_s, request.ingress_bytes_per_s), (Some(1 << 20), Some(2 << 20)));
        assert_eq!(rules.request(true).deny, Some(Vec::new()));
    }
}
