//! Addresses that are the same for every sandbox, and those that are its own on the host.
//!
//! All of IPv4 is from 198.18.0.0/15, the range for measuring networks (RFC 2544), which nobody routes and no private
//! network should use; all of IPv6 from one unique local prefix (RFC 4193).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// The first 48 bits of every IPv6 address here.
const PREFIX6: [u16; 3] = [0xfd74, 0x6966, 0x6669];

/// The guest's hardware address: in every namespace the same, as the guest has it in its snapshot.
pub const GUEST_MAC: &str = "02:74:69:66:66:02";
/// The gateway's, so that a restored guest's neighbour table is right.
pub const GATEWAY_MAC: &str = "02:74:69:66:66:01";

/// The guest's address.
pub const GUEST4: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 2);
/// The guest's gateway and resolver.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);
/// The length of the prefix of both.
pub const PREFIX_LENGTH4: u8 = 30;

/// The guest's address.
pub const GUEST6: Ipv6Addr = address6(0xffff, 2);
/// The guest's gateway, and its resolver where there are only resolvers with IPv6 addresses.
pub const GATEWAY6: Ipv6Addr = address6(0xffff, 1);
/// The length of the prefix of both.
pub const PREFIX_LENGTH6: u8 = 64;

const fn address6(subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(PREFIX6[0], PREFIX6[1], PREFIX6[2], subnet, 0, 0, 0, host)
}

/// Uplinks that can be told apart on one host: pairs of addresses in 198.18.0.0/16.
pub(crate) const UPLINKS: u16 = 1 << 15;

/// Whether it is of the ranges of this module.
pub(crate) fn is_ours(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15).contains(&address),
        IpAddr::V6(address) => address.segments().starts_with(&PREFIX6),
    }
}

/// The two ends of a sandbox's uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UplinkAddresses {
    /// The end on the host.
    pub(crate) outside4: Ipv4Net,
    /// The end in the namespace.
    pub(crate) inside4: Ipv4Net,
    pub(crate) outside6: Ipv6Net,
    pub(crate) inside6: Ipv6Net,
}

impl UplinkAddresses {
    /// Those of an index below [`UPLINKS`].
    pub(crate) fn of(index: u16) -> Self {
        let first = Ipv4Addr::new(198, 18, 0, 0).to_bits() + 2 * u32::from(index % UPLINKS);
        let four = |bits: u32| Ipv4Net::new_assert(bits.into(), 31);
        let six = |host: u16| Ipv6Net::new_assert(address6(index % UPLINKS, host), 64);
        Self { outside4: four(first), inside4: four(first + 1), outside6: six(1), inside6: six(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks_have_their_own_addresses_and_none_has_a_guests() {
        let last = UplinkAddresses::of(UPLINKS - 1);
        assert_eq!(UplinkAddresses::of(0).outside4.to_string(), "198.18.0.0/31");
        assert_eq!(UplinkAddresses::of(1).inside4.to_string(), "198.18.0.3/31");
        assert_eq!(last.inside4.to_string(), "198.18.255.255/31");
        assert_eq!(last.inside6.to_string(), "fd74:6966:6669:7fff::2/64");
        assert!(!last.inside6.contains(&GUEST6));
        assert!(is_ours(last.outside4.addr().into()) && is_ours(last.outside6.addr().into()));
        assert!(is_ours(GUEST4.into()) && !is_ours("198.20.0.0".parse().unwrap()));
        assert!(is_ours(GUEST6.into()) && !is_ours("fd74:6966:6668::1".parse().unwrap()));
    }
}
