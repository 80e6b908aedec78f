//! What a host wants of the network, checked.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use envd_proto::control::{self, interface};

/// Interfaces of a machine; each costs the guest memory long before this.
const MAX_INTERFACES: usize = 16;
/// Addresses of an interface.
const MAX_ADDRESSES: usize = 32;
/// Routes of an interface.
const MAX_ROUTES: usize = 128;
/// Lines that resolvers read from resolv.conf (`MAXNS` of resolv.h).
const MAX_DNS_SERVERS: usize = 3;
/// Domains that they search (`MAXDNSRCH`).
const MAX_DNS_SEARCH: usize = 6;
/// The least that IPv4 may have (RFC 791), IPv6 (RFC 8200), and the most that a packet can have.
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
const MIN_MTU_IPV6: u32 = 1280;
/// The longest name of an interface (`IFNAMSIZ` less the NUL).
const MAX_NAME: usize = 15;

/// What is wrong with a wish.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network: {place}: {reason}")]
pub(crate) struct Invalid {
    place: String,
    reason: String,
}

fn invalid(place: impl Into<String>, reason: impl Into<String>) -> Invalid {
    Invalid { place: place.into(), reason: reason.into() }
}

/// A network that a machine can be given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) interfaces: Vec<InterfacePlan>,
    pub(super) resolv_conf: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InterfacePlan {
    pub(super) select: Select,
    pub(super) addresses: Vec<Cidr>,
    /// Those to the link come first, since gateways are reached by them.
    pub(super) routes: Vec<RoutePlan>,
    pub(super) mtu: Option<u32>,
    pub(super) mac: Option<Mac>,
}

/// Which interface is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Select {
    Name(String),
    Mac(Mac),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cidr {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RoutePlan {
    pub(super) destination: Cidr,
    pub(super) gateway: Option<IpAddr>,
    pub(super) metric: Option<u32>,
}

impl Plan {
    pub(crate) fn parse(network: &control::Network) -> Result<Self, Invalid> {
        bounded("interfaces", network.interfaces.len(), MAX_INTERFACES)?;
        let interfaces =
            network.interfaces.iter().map(InterfacePlan::parse).collect::<Result<Vec<_>, _>>()?;
        for (index, one) in interfaces.iter().enumerate() {
            if interfaces[..index].iter().any(|other| other.select == one.select) {
                return Err(invalid(one.select.to_string(), "it is configured twice"));
            }
        }
        Ok(Self { interfaces, resolv_conf: resolv_conf(network)? })
    }
}

impl InterfacePlan {
    fn parse(wanted: &control::Interface) -> Result<Self, Invalid> {
        let select = match &wanted.interface {
            Some(interface::Interface::Name(name)) => {
                let odd = |byte: u8| byte <= b' ' || byte == b'/' || byte >= 0x7f;
                if name.is_empty() || name.len() > MAX_NAME || name.bytes().any(odd) {
                    return Err(invalid(
                        format!("interface {name:?}"),
                        format!("expected a name of 1 to {MAX_NAME} characters"),
                    ));
                }
                Select::Name(name.clone())
            }
            Some(interface::Interface::Mac(mac)) => Select::Mac(Mac::parse(mac).ok_or_else(|| {
                invalid(format!("interface {mac:?}"), "expected a MAC as 02:00:00:00:00:01")
            })?),
            None => return Err(invalid("an interface", "neither name nor MAC says which one")),
        };
        let place = select.to_string();
        bounded(&format!("{place}: addresses"), wanted.addresses.len(), MAX_ADDRESSES)?;
        bounded(&format!("{place}: routes"), wanted.routes.len(), MAX_ROUTES)?;
        let mut addresses: Vec<Cidr> = Vec::new();
        for text in &wanted.addresses {
            let place = format!("{place}: address {text:?}");
            let address = Cidr::parse(text)
                .ok_or_else(|| invalid(&place, "expected an address with prefix, as 10.0.0.2/24"))?;
            if address.address.is_unspecified()
                || address.address.is_multicast()
                || address.address == IpAddr::V4(Ipv4Addr::BROADCAST)
            {
                return Err(invalid(place, "no machine can have this address"));
            }
            if addresses.iter().any(|other| other.address == address.address) {
                return Err(invalid(place, "it is given twice"));
            }
            addresses.push(address);
        }
        let mut routes = wanted
            .routes
            .iter()
            .map(|route| RoutePlan::parse(&place, route))
            .collect::<Result<Vec<_>, _>>()?;
        routes.sort_by_key(|route| route.gateway.is_some());
        let has_ipv6 = addresses.iter().any(|address| address.address.is_ipv6());
        let mtu = match wanted.mtu {
            0 => None,
            mtu if !MTU.contains(&mtu) || (has_ipv6 && mtu < MIN_MTU_IPV6) => {
                let least = if has_ipv6 { MIN_MTU_IPV6 } else { *MTU.start() };
                let reason = format!("expected {least} to {}", MTU.end());
                return Err(invalid(format!("{place}: MTU {mtu}"), reason));
            }
            mtu => Some(mtu),
        };
        let mac = match wanted.new_mac.as_str() {
            "" => None,
            text => {
                // The lowest bit of the first byte marks groups (IEEE 802).
                let mac = Mac::parse(text).filter(|mac| mac.0[0] & 1 == 0 && mac.0 != [0; 6]);
                Some(mac.ok_or_else(|| {
                    invalid(
                        format!("{place}: new MAC {text:?}"),
                        "expected a station's, as 02:00:00:00:00:01",
                    )
                })?)
            }
        };
        Ok(Self { select, addresses, routes, mtu, mac })
    }
}

impl RoutePlan {
    fn parse(place: &str, wanted: &control::Route) -> Result<Self, Invalid> {
        let place = format!("{place}: route {:?} via {:?}", wanted.destination, wanted.gateway);
        let gateway = match wanted.gateway.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| invalid(&place, "the gateway is no address"))?),
        };
        let destination = match (wanted.destination.as_str(), gateway) {
            ("", Some(IpAddr::V4(_))) => Cidr { address: Ipv4Addr::UNSPECIFIED.into(), prefix: 0 },
            ("", Some(IpAddr::V6(_))) => Cidr { address: Ipv6Addr::UNSPECIFIED.into(), prefix: 0 },
            ("", None) => return Err(invalid(place, "a route needs a destination or a gateway")),
            (text, _) => Cidr::parse(text)
                .ok_or_else(|| invalid(&place, "expected a destination with prefix, as 10.1.0.0/16"))?,
        };
        if destination.network() != destination.address {
            let reason =
                format!("the network of this prefix is {}/{}", destination.network(), destination.prefix);
            return Err(invalid(place, reason));
        }
        if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.address.is_ipv4()) {
            return Err(invalid(place, "destination and gateway are of two families"));
        }
        let metric = (wanted.metric != 0).then_some(wanted.metric);
        Ok(Self { destination, gateway, metric })
    }
}

impl Cidr {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        // `parse` would take "+8".
        let prefix = prefix.bytes().all(|byte| byte.is_ascii_digit()).then(|| prefix.parse().ok())??;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= bits).then_some(Self { address, prefix })
    }

    fn network(self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }

    /// Where everybody of an IPv4 network hears; networks of one or two addresses have none (RFC 3021).
    pub(super) fn broadcast(self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(address) if self.prefix < 31 => {
                let hosts = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
                Some(Ipv4Addr::from_bits(address.to_bits() | hosts))
            }
            _ => None,
        }
    }
}

impl Mac {
    fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(bytes))
    }
}

fn resolv_conf(network: &control::Network) -> Result<Option<String>, Invalid> {
    bounded("DNS servers", network.dns_servers.len(), MAX_DNS_SERVERS)?;
    bounded("DNS search domains", network.dns_search.len(), MAX_DNS_SEARCH)?;
    let mut text = String::new();
    for server in &network.dns_servers {
        let server: IpAddr =
            server.parse().map_err(|_| invalid(format!("DNS server {server:?}"), "expected an address"))?;
        text.push_str(&format!("nameserver {server}\n"));
    }
    for domain in &network.dns_search {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if domain.is_empty() || domain.len() > 253 || !domain.bytes().all(plain) {
            return Err(invalid(format!("DNS search domain {domain:?}"), "expected a domain's name"));
        }
    }
    if !network.dns_search.is_empty() {
        text.push_str(&format!("search {}\n", network.dns_search.join(" ")));
    }
    Ok((!text.is_empty()).then_some(text))
}

fn bounded(place: &str, count: usize, most: usize) -> Result<(), Invalid> {
    match count {
        count if count <= most => Ok(()),
        count => Err(invalid(place, format!("{count} are given, at most {most} are possible"))),
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "interface {name}"),
            Self::Mac(mac) => write!(f, "interface {mac}"),
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl fmt::Display for RoutePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.destination)?;
        match self.gateway {
            Some(gateway) => write!(f, " via {gateway}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use envd_proto::control::{Interface, Network, Route};

    fn interface(addresses: &[&str]) -> Interface {
        Interface {
            interface: Some(interface::Interface::Name("eth0".into())),
            addresses: addresses.iter().map(|&address| address.into()).collect(),
            ..Interface::default()
        }
    }

    fn refused(change: impl FnOnce(&mut Interface, &mut Network)) -> String {
        let (mut one, mut network) = (interface(&["10.0.0.2/24"]), Network::default());
        change(&mut one, &mut network);
        network.interfaces.push(one);
        Plan::parse(&network).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_wish_is_named() {
        let route = |destination: &str, gateway: &str| {
            vec![Route { destination: destination.into(), gateway: gateway.into(), metric: 0 }]
        };
        for (found, expected) in [
            (refused(|i, _| i.addresses[0] = "10.0.0.2".into()), "eth0: address \"10.0.0.2\": expected"),
            (refused(|i, _| i.addresses[0] = "10.0.0.2/33".into()), "expected an address with prefix"),
            (refused(|i, _| i.addresses[0] = "10.0.0.2/+8".into()), "expected an address with prefix"),
            (refused(|i, _| i.addresses[0] = "0.0.0.0/0".into()), "no machine can have"),
            (refused(|i, _| i.addresses.push("10.0.0.2/16".into())), "given twice"),
            (refused(|i, _| i.addresses = vec!["10.0.0.2/8".into(); 33]), "at most 32"),
            (refused(|i, _| i.mtu = 67), "MTU 67: expected 68"),
            (refused(|i, _| (i.mtu, i.addresses[0]) = (1000, "fd00::1/64".into())), "expected 1280"),
            (refused(|i, _| i.new_mac = "03:00:00:00:00:01".into()), "expected a station's"),
            (refused(|i, _| i.interface = None), "neither name nor MAC"),
            (
                refused(|i, _| i.interface = Some(interface::Interface::Mac("02:0:0".into()))),
                "expected a MAC",
            ),
            (refused(|i, _| i.interface = Some(interface::Interface::Name("a/b".into()))), "expected a name"),
            (refused(|i, _| i.routes = route("10.1.2.0/16", "")), "this prefix is 10.1.0.0/16"),
            (refused(|i, _| i.routes = route("", "")), "needs a destination or a gateway"),
            (refused(|i, _| i.routes = route("::/0", "10.0.0.1")), "two families"),
            (refused(|_, n| n.dns_servers.push("dns.example".into())), "DNS server \"dns.example\""),
            (refused(|_, n| n.dns_search.push("a\nnameserver 6.6.6.6".into())), "expected a domain's name"),
            (refused(|_, n| n.interfaces.push(interface(&[]))), "configured twice"),
        ] {
            assert!(found.contains(expected), "{found} does not say {expected}");
        }
    }

    #[test]
    fn a_good_wish_is_understood() {
        let mut one = interface(&["10.0.0.2/24", "fd00::2/64"]);
        let via = |gateway: &str| Route { gateway: gateway.into(), ..Route::default() };
        one.routes = vec![
            via("10.9.0.1"),
            Route { destination: "10.9.0.1/32".into(), ..Route::default() },
            via("fd00::1"),
        ];
        let network = Network {
            interfaces: vec![one],
            dns_servers: vec!["1.1.1.1".into(), "fd00::53".into()],
            dns_search: vec!["a.example".into(), "b.example".into()],
        };
        let plan = Plan::parse(&network).unwrap();
        let routes: Vec<_> = plan.interfaces[0].routes.iter().map(RoutePlan::to_string).collect();
        assert_eq!(routes, ["10.9.0.1/32", "0.0.0.0/0 via 10.9.0.1", "::/0 via fd00::1"]);
        assert_eq!(
            plan.resolv_conf.as_deref(),
            Some("nameserver 1.1.1.1\nnameserver fd00::53\nsearch a.example b.example\n")
        );
        assert_eq!(plan.interfaces[0].addresses[0].broadcast(), Some(Ipv4Addr::new(10, 0, 0, 255)));
        assert_eq!(Plan::parse(&Network::default()), Ok(Plan::default()));
    }
}
