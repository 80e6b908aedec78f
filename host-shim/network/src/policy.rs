//! What a guest may reach, and how fast.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Ranges in each list. The verdicts of ten thousand are still one transaction of nft; nobody needs as many, and a request
/// with them stays in one message ([`crate::helper`]).
pub const MAX_RANGES: usize = 1024;

/// Resolvers, as many as resolv.conf may name (`MAXNS`).
pub const MAX_RESOLVERS: usize = 3;

/// Slower than this a full packet would wait longer than senders do.
const MIN_RATE: u64 = 8 << 10;
/// 100 Gbit/s: no limit any more.
const MAX_RATE: u64 = 12_500_000_000;

/// How a namespace is tied to the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Uplink {
    /// A veth pair, routed and translated by the host's kernel: root only.
    Veth,
    /// pasta, a process that makes the guest's connections its own: for an ordinary user.
    Pasta,
}

/// Something in the rules makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what}: {reason}")]
pub struct InvalidRules {
    /// Which part.
    pub what: String,
    /// What was expected and what was got.
    pub reason: String,
}

fn invalid(what: &str, reason: String) -> InvalidRules {
    InvalidRules { what: what.to_owned(), reason }
}

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(u64);

impl Rate {
    /// Checks a rate.
    pub fn new(bytes_per_second: u64) -> Result<Self, InvalidRules> {
        if (MIN_RATE..=MAX_RATE).contains(&bytes_per_second) {
            return Ok(Self(bytes_per_second));
        }
        let reason = format!("expected {MIN_RATE} to {MAX_RATE} bytes per second, got {bytes_per_second}");
        Err(invalid("network rate", reason))
    }

    /// The number.
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }
}

/// What may change while a sandbox runs. By default: the internet, and nothing of the host or of private networks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Ranges that are open although they would be closed.
    pub allow: Vec<IpNet>,
    /// Ranges that are closed although they would be open. Of several ranges with an address the longest prefix decides.
    pub deny: Vec<IpNet>,
    /// What the guest may send.
    pub egress: Option<Rate>,
    /// What the guest may be sent.
    pub ingress: Option<Rate>,
    /// Where the guest's questions to its resolver go, open or closed.
    pub resolvers: Vec<IpAddr>,
}

impl Rules {
    /// Checks lists of ranges; limits and resolvers are none.
    pub fn parse(allow: &[impl AsRef<str>], deny: &[impl AsRef<str>]) -> Result<Self, InvalidRules> {
        let allow = ranges("allowed range", allow)?;
        let deny = ranges("denied range", deny)?;
        if let Some(both) = allow.iter().find(|range| deny.contains(range)) {
            return Err(invalid("denied range", format!("{both} is allowed too")));
        }
        Ok(Self { allow, deny, ..Self::default() })
    }

    /// The same with these resolvers.
    pub fn with_resolvers(mut self, resolvers: &[impl AsRef<str>]) -> Result<Self, InvalidRules> {
        if resolvers.len() > MAX_RESOLVERS {
            let reason = format!("{} are given, at most {MAX_RESOLVERS} are possible", resolvers.len());
            return Err(invalid("DNS servers", reason));
        }
        self.resolvers = resolvers.iter().map(|text| resolver(text.as_ref())).collect::<Result<_, _>>()?;
        Ok(self)
    }
}

fn ranges(what: &str, texts: &[impl AsRef<str>]) -> Result<Vec<IpNet>, InvalidRules> {
    if texts.len() > MAX_RANGES {
        let reason = format!("{} are given, at most {MAX_RANGES} are possible", texts.len());
        return Err(invalid(what, reason));
    }
    let mut ranges = texts.iter().map(|text| range(what, text.as_ref())).collect::<Result<Vec<_>, _>>()?;
    ranges.sort();
    ranges.dedup();
    Ok(ranges)
}

/// A range, or one address.
fn range(what: &str, text: &str) -> Result<IpNet, InvalidRules> {
    let parsed =
        text.parse::<IpNet>().or_else(|error| text.parse::<IpAddr>().map(IpNet::from).map_err(|_| error));
    let Ok(range) = parsed else {
        let reason = format!("expected an address or a range as 10.0.0.0/8 or 2001:db8::/32, got {text:?}");
        return Err(invalid(what, reason));
    };
    if range.trunc() != range {
        return Err(invalid(what, format!("got {text}, the range of this prefix is {}", range.trunc())));
    }
    Ok(range)
}

fn resolver(text: &str) -> Result<IpAddr, InvalidRules> {
    let what = "DNS server";
    let address: IpAddr =
        text.parse().map_err(|_| invalid(what, format!("expected an address, got {text:?}")))?;
    if !is_reachable_resolver(address) {
        return Err(invalid(what, format!("{address} is this host's own loopback, or no host's address")));
    }
    Ok(address)
}

/// Whether packets that are forwarded can get to such a resolver.
pub(crate) fn is_reachable_resolver(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(_) => false,
        // It would need the name of a link of the host.
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !(address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [&str; 0] = [];

    #[test]
    fn bad_rules_are_named() {
        let refused = |allow: &[&str], deny: &[&str]| Rules::parse(allow, deny).unwrap_err().to_string();
        let many: Vec<_> = (0..=MAX_RANGES).map(|index| format!("2001:db8::{index:x}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let resolvers = |list: &[&str]| Rules::default().with_resolvers(list).unwrap_err().to_string();
        for (found, expected) in [
            (refused(&["10.0.0.0/33"], &[]), "invalid allowed range: expected an address or a range"),
            (refused(&["example.com"], &[]), "got \"example.com\""),
            (
                refused(&[], &["10.0.0.1/8"]),
                "invalid denied range: got 10.0.0.1/8, the range of this prefix is 10.0.0.0/8",
            ),
            (refused(&["::/0"], &["::/0"]), "::/0 is allowed too"),
            (refused(&many, &[]), "1025 are given, at most 1024"),
            (Rate::new(1).unwrap_err().to_string(), "expected 8192 to"),
            (Rate::new(u64::MAX).unwrap_err().to_string(), "bytes per second"),
            (resolvers(&["127.0.0.53"]), "loopback"),
            (resolvers(&["::1"]), "loopback"),
            (resolvers(&["fe80::1"]), "no host's address"),
            (resolvers(&["dns"]), "expected an address"),
            (resolvers(&["1.1.1.1"; 4]), "at most 3"),
        ] {
            assert!(found.contains(expected), "{found} does not say {expected}");
        }
    }

    #[test]
    fn good_rules_are_sorted_and_unique() {
        let rules = Rules::parse(&["10.1.0.0/16", "1.1.1.1", "10.1.0.0/16"], &NONE).unwrap();
        assert_eq!(rules.allow, ["1.1.1.1/32".parse().unwrap(), "10.1.0.0/16".parse().unwrap()]);
        assert_eq!(Rules::parse(&NONE, &NONE).unwrap(), Rules::default());
    }
}
