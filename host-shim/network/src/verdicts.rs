//! From lists of ranges to one verdict for each address.
//!
//! Ranges are nested or apart, never across each other. The longest prefix decides, as in a routing table, so a hole can be
//! cut into what is closed and a lid put on a part of what is open. nft's interval maps take no nested ranges: they are
//! flattened here.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::policy::Rules;

/// What becomes of packets to and from an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They pass.
    Allowed,
    /// It is the host's, another sandbox's, or of no public network.
    Reserved,
    /// The owner closed it.
    Denied,
}

/// What is closed unless it is opened: everything that is not the internet, and ways to write an IPv4 address as an IPv6
/// address that a gateway might unpack. (IANA's registries of special-purpose addresses.)
const RESERVED: [&str; 25] = [
    "0.0.0.0/8",           // this network
    "10.0.0.0/8",          // private
    "100.64.0.0/10",       // behind a carrier's NAT
    "127.0.0.0/8",         // loopback
    "169.254.0.0/16",      // link-local, where clouds keep their metadata
    "172.16.0.0/12",       // private
    "192.0.0.0/24",        // protocol assignments
    "192.168.0.0/16",      // private
    "198.18.0.0/15",       // other sandboxes
    "224.0.0.0/4",         // multicast
    "240.0.0.0/4",         // reserved, broadcast
    "::/3",                // loopback, mapped IPv4, everything below 2000::
    "::ffff:0:0/96",       // mapped IPv4
    "64:ff9b::/96",        // NAT64
    "64:ff9b:1::/48",      // local NAT64
    "2001::/32",           // Teredo
    "2002::/16",           // 6to4
    "4000::/2",            // unassigned
    "8000::/1",            // unassigned, and all below
    "fc00::/7",            // unique local
    "fd74:6966:6669::/48", // other sandboxes
    "fe80::/10",           // link-local
    "fec0::/10",           // site-local
    "ff00::/8",            // multicast
    "::1/128",             // loopback
];

/// A run of addresses, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run<A> {
    pub(crate) first: A,
    pub(crate) last: A,
    pub(crate) verdict: Verdict,
}

/// The verdicts of every address, in order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdicts {
    pub(crate) four: Vec<Run<Ipv4Addr>>,
    pub(crate) six: Vec<Run<Ipv6Addr>>,
}

impl Verdicts {
    /// Those of `rules` on a host that has the addresses `host`.
    pub(crate) fn of(rules: &Rules, host: &[IpAddr]) -> Self {
        let mut ranges =
            BTreeMap::from([(net("0.0.0.0/0"), Verdict::Allowed), (net("::/0"), Verdict::Allowed)]);
        ranges.extend(RESERVED.iter().map(|text| (net(text), Verdict::Reserved)));
        ranges.extend(host.iter().map(|&address| (address.into(), Verdict::Reserved)));
        // The owner's word is the last one on a range of the same length.
        ranges.extend(rules.allow.iter().map(|&range| (range, Verdict::Allowed)));
        ranges.extend(rules.deny.iter().map(|&range| (range, Verdict::Denied)));
        let (mut four, mut six) = (Vec::new(), Vec::new());
        for (range, verdict) in ranges {
            match range {
                IpNet::V4(range) => {
                    four.push((
                        range.network().to_bits().into(),
                        range.broadcast().to_bits().into(),
                        verdict,
                    ));
                }
                IpNet::V6(range) => {
                    six.push((range.network().to_bits(), range.broadcast().to_bits(), verdict))
                }
            }
        }
        Self {
            four: flatten(four, |bits| Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX))),
            six: flatten(six, Ipv6Addr::from_bits),
        }
    }
}

fn net(text: &str) -> IpNet {
    // Only what is written above comes here, and a test reads all of it.
    text.parse().unwrap_or_default()
}

/// Nested ranges to runs. The outermost covers everything.
fn flatten<A>(mut nested: Vec<(u128, u128, Verdict)>, address: impl Fn(u128) -> A) -> Vec<Run<A>> {
    // A range comes before what is inside of it.
    nested.sort_by_key(|&(first, last, _)| (first, u128::MAX - last));
    let mut runs: Vec<(u128, u128, Verdict)> = Vec::new();
    let mut emit = |first: u128, last: u128, verdict: Verdict| match runs.last_mut() {
        _ if first > last => {}
        // Neighbours of one verdict are one run.
        Some(before) if before.2 == verdict => before.1 = last,
        _ => runs.push((first, last, verdict)),
    };
    let mut open: Vec<(u128, Verdict)> = Vec::new();
    let mut next = 0;
    // Past the last address there is none: `next` has no value then, and all that is open ends there.
    let mut full = false;
    let mut close =
        |open: &mut Vec<(u128, Verdict)>, next: &mut u128, emit: &mut dyn FnMut(u128, u128, Verdict)| {
            if let Some((last, verdict)) = open.pop()
                && !full
            {
                emit(*next, last, verdict);
                match last.checked_add(1) {
                    Some(after) => *next = after.max(*next),
                    None => full = true,
                }
            }
        };
    for (first, last, verdict) in nested {
        while open.last().is_some_and(|&(end, _)| end < first) {
            close(&mut open, &mut next, &mut emit);
        }
        if let Some(&(_, outer)) = open.last()
            && first > 0
        {
            emit(next, first - 1, outer);
        }
        next = first;
        open.push((last, verdict));
    }
    while !open.is_empty() {
        close(&mut open, &mut next, &mut emit);
    }
    let run = |(first, last, verdict)| Run { first: address(first), last: address(last), verdict };
    runs.into_iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verdict(verdicts: &Verdicts, address: &str) -> Verdict {
        match address.parse().unwrap() {
            IpAddr::V4(address) => find(&verdicts.four, address),
            IpAddr::V6(address) => find(&verdicts.six, address),
        }
    }

    fn find<A: PartialOrd + Copy>(runs: &[Run<A>], address: A) -> Verdict {
        runs.iter().find(|run| run.first <= address && address <= run.last).unwrap().verdict
    }

    #[test]
    fn every_reserved_range_is_one() {
        let parsed: Vec<IpNet> = RESERVED.iter().map(|text| text.parse().unwrap()).collect();
        assert!(parsed.iter().all(|range| range.trunc() == *range && range.prefix_len() > 0));
    }

    #[test]
    fn the_internet_is_open_and_the_rest_is_closed() {
        let verdicts = Verdicts::of(&Rules::default(), &["203.0.113.2".parse().unwrap()]);
        for open in
            ["1.1.1.1", "203.0.113.1", "223.255.255.255", "2606:4700::1", "2001:db8::1", "3fff:ffff::"]
        {
            assert_eq!(verdict(&verdicts, open), Verdict::Allowed, "{open}");
        }
        for closed in [
            "0.0.0.0",
            "10.0.0.1",
            "100.127.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.0.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "203.0.113.2",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "64:ff9b::a00:1",
            "::ffff:10.0.0.1",
            "2002:a00:1::",
            "2001::1",
            "8000::",
            "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        ] {
            assert_eq!(verdict(&verdicts, closed), Verdict::Reserved, "{closed}");
        }
    }

    #[test]
    fn the_longest_prefix_decides() {
        let rules = Rules::parse(&["10.1.0.0/16", "0.0.0.0/0", "::/0"], &["10.1.2.3", "1.1.1.0/24"]).unwrap();
        let verdicts = Verdicts::of(&rules, &[]);
        for (address, expected) in [
            ("10.0.255.255", Verdict::Reserved),
            ("10.1.0.0", Verdict::Allowed),
            ("10.1.2.2", Verdict::Allowed),
            ("10.1.2.3", Verdict::Denied),
            ("10.1.2.4", Verdict::Allowed),
            ("10.2.0.0", Verdict::Reserved),
            ("1.1.1.255", Verdict::Denied),
            ("1.1.2.0", Verdict::Allowed),
            ("fd00::1", Verdict::Reserved),
        ] {
            assert_eq!(verdict(&verdicts, address), expected, "{address}");
        }
        let only = Verdicts::of(&Rules::parse(&["1.1.1.1"], &["0.0.0.0/0", "::/0"]).unwrap(), &[]);
        assert_eq!(verdict(&only, "1.1.1.1"), Verdict::Allowed);
        assert_eq!(verdict(&only, "1.1.1.2"), Verdict::Denied);
        assert_eq!(verdict(&only, "10.0.0.1"), Verdict::Reserved);
        assert_eq!(verdict(&only, "2606:4700::1"), Verdict::Denied);
    }

    fn any_range() -> impl Strategy<Value = IpNet> {
        // Few bits, so that ranges meet.
        let four = (0..4u32, 0..=32u8).prop_map(|(bits, length)| {
            let address = IpAddr::V4(Ipv4Addr::from_bits(bits << 30 | bits << 3 | bits));
            IpNet::new(address, length).unwrap().trunc()
        });
        let six = (0..4u128, 0..=128u8).prop_map(|(bits, length)| {
            let address = IpAddr::V6(Ipv6Addr::from_bits(bits << 126 | bits << 60 | bits));
            IpNet::new(address, length).unwrap().trunc()
        });
        prop_oneof![four, six]
    }

    proptest! {
        #[test]
        fn runs_say_what_a_search_for_the_longest_prefix_says(
            allow in proptest::collection::vec(any_range(), 0..12),
            deny in proptest::collection::vec(any_range(), 0..12),
        ) {
            let rules = Rules { allow: allow.clone(), deny: deny.clone(), ..Rules::default() };
            let verdicts = Verdicts::of(&rules, &[]);
            prop_assert_eq!(verdicts.four.first().unwrap().first, Ipv4Addr::UNSPECIFIED);
            prop_assert_eq!(verdicts.four.last().unwrap().last, Ipv4Addr::BROADCAST);
            prop_assert_eq!(verdicts.six.last().unwrap().last.to_bits(), u128::MAX);
            prop_assert!(verdicts.four.windows(2).all(|pair| pair[0].last.to_bits() + 1 == pair[1].first.to_bits()));
            prop_assert!(verdicts.six.windows(2).all(|pair| pair[0].last.to_bits() + 1 == pair[1].first.to_bits()));
            let naive = |address: IpAddr| {
                let mut best = (0, Verdict::Allowed);
                let all = RESERVED.iter().map(|text| (text.parse().unwrap(), Verdict::Reserved))
                    .chain(allow.iter().map(|range| (*range, Verdict::Allowed)))
                    .chain(deny.iter().map(|range| (*range, Verdict::Denied)));
                for (range, verdict) in all {
                    if IpNet::contains(&range, &address) && range.prefix_len() >= best.0 {
                        best = (range.prefix_len(), verdict);
                    }
                }
                best.1
            };
            // Around every end of a range.
            for range in allow.iter().chain(&deny) {
                for end in [range.network(), range.broadcast()] {
                    let near = match end {
                        IpAddr::V4(end) => {
                            let bits = end.to_bits();
                            [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(|bits| IpAddr::V4(bits.into()))
                        }
                        IpAddr::V6(end) => {
                            let bits = end.to_bits();
                            [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(|bits| IpAddr::V6(bits.into()))
                        }
                    };
                    for address in near {
                        prop_assert_eq!(verdict(&verdicts, &address.to_string()), naive(address), "{}", address);
                    }
                }
            }
        }
    }
}
