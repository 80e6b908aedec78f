//! One interface: found, saved, changed, restored.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;

use super::netlink::{
    self, NLM_F_CREATE, NLM_F_REPLACE, Netlink, RTM_DELADDR, RTM_DELROUTE, RTM_GETADDR, RTM_GETLINK,
    RTM_GETROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE, attribute, number,
};
use super::plan::{Cidr, InterfacePlan, RoutePlan, Select};

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const IFINFOMSG: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;

const IFADDRMSG: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
/// No duplicate address detection: the host gave the address out, and a second of waiting is long for a clone.
const IFA_F_NODAD: u32 = 2;

const RTMSG: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

/// An interface as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    mtu: u32,
    up: bool,
}

impl Link {
    fn parse(body: &[u8]) -> Option<Self> {
        let name = netlink::find(body, IFINFOMSG, IFLA_IFNAME)?;
        Some(Self {
            index: number(body, 4)?,
            name: String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(),
            mac: netlink::find(body, IFINFOMSG, IFLA_ADDRESS).unwrap_or_default().to_vec(),
            mtu: number(netlink::find(body, IFINFOMSG, IFLA_MTU)?, 0)?,
            up: number(body, 8)? & IFF_UP != 0,
        })
    }

    /// Names the interface and the step in an error.
    fn failed(&self, what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
        let place = format!("interface {}: {what}", self.name);
        move |error| io::Error::new(error.kind(), format!("{place}: {error}"))
    }

    fn message(&self, up: bool) -> Vec<u8> {
        let mut body = vec![AF_UNSPEC, 0, 0, 0];
        body.extend_from_slice(&self.index.to_ne_bytes());
        body.extend_from_slice(&(if up { IFF_UP } else { 0 }).to_ne_bytes());
        body.extend_from_slice(&IFF_UP.to_ne_bytes());
        body
    }

    /// Sets what differs from `self`: MAC, MTU, and whether it is up.
    fn change(&self, netlink: &mut Netlink, mac: &[u8], mtu: u32, up: bool) -> io::Result<()> {
        if mac != self.mac {
            // Many drivers change it only while they are down.
            netlink.request(RTM_NEWLINK, 0, &self.message(false)).map_err(self.failed("taking it down"))?;
            let mut body = self.message(false);
            attribute(&mut body, IFLA_ADDRESS, mac);
            netlink.request(RTM_NEWLINK, 0, &body).map_err(self.failed("changing its MAC"))?;
        }
        if mtu != self.mtu {
            let mut body = self.message(self.up && mac == self.mac);
            attribute(&mut body, IFLA_MTU, &mtu.to_ne_bytes());
            netlink.request(RTM_NEWLINK, 0, &body).map_err(self.failed(format!("MTU {mtu}")))?;
        }
        netlink.request(RTM_NEWLINK, 0, &self.message(up)).map_err(self.failed("bringing it up or down"))
    }
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    Ok(netlink.dump(RTM_GETLINK, &[0; IFINFOMSG])?.iter().filter_map(|body| Link::parse(body)).collect())
}

/// The interface that is meant. One that is not there is an error that names those that are.
pub(super) fn find(netlink: &mut Netlink, select: &Select) -> io::Result<Link> {
    let links = links(netlink)?;
    let found = links.iter().find(|link| match select {
        Select::Name(name) => link.name == *name,
        Select::Mac(mac) => link.mac == mac.0,
    });
    found.cloned().ok_or_else(|| {
        let names: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
        let message = format!("{select}: the machine has no such interface, it has {}", names.join(", "));
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}

/// Gives an interface the plan's addresses and routes, and no others.
pub(super) fn apply(netlink: &mut Netlink, before: &Saved, wanted: &InterfacePlan) -> io::Result<()> {
    let link = &before.link;
    clear(netlink, before)?;
    let mac = wanted.mac.as_ref().map_or(link.mac.as_slice(), |mac| &mac.0);
    link.change(netlink, mac, wanted.mtu.unwrap_or(link.mtu), true)?;
    for address in &wanted.addresses {
        netlink
            .request(RTM_NEWADDR, NLM_F_CREATE, &address_message(link, *address))
            .map_err(link.failed(format!("address {address}")))?;
    }
    for route in &wanted.routes {
        // The kernel makes the routes of the addresses' own networks: one that is asked for too takes their place.
        netlink
            .request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &route_message(link, route))
            .map_err(link.failed(format!("route {route}")))?;
    }
    Ok(())
}

/// Removes routes and addresses but the link-local ones and the kernel's own.
fn clear(netlink: &mut Netlink, now: &Saved) -> io::Result<()> {
    let link = &now.link;
    for route in &now.routes {
        match netlink.request(RTM_DELROUTE, 0, route) {
            // It went with another one.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            result => result.map_err(link.failed("removing a route"))?,
        }
    }
    for address in &now.addresses {
        match netlink.request(RTM_DELADDR, 0, address) {
            // Secondary addresses of a network go with its first.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            result => result.map_err(link.failed("removing an address"))?,
        }
    }
    Ok(())
}

/// The bodies of its addresses, but link-local IPv6 ones, which are the kernel's.
fn addresses(netlink: &mut Netlink, link: &Link) -> io::Result<Vec<Vec<u8>>> {
    let mut found = netlink.dump(RTM_GETADDR, &[0; IFADDRMSG])?;
    found.retain(|body| {
        let ours = number(body, 4) == Some(link.index);
        let address = netlink::find(body, IFADDRMSG, IFA_ADDRESS).unwrap_or_default();
        let link_local =
            body.first() == Some(&AF_INET6) && matches!(address, [0xfe, second, ..] if second & 0xc0 == 0x80);
        ours && !link_local
    });
    Ok(found)
}

/// The bodies of its routes in the main table that the kernel did not make by itself.
fn routes(netlink: &mut Netlink, link: &Link) -> io::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut request = [0; RTMSG];
        request[0] = family;
        found.extend(netlink.dump(RTM_GETROUTE, &request)?);
    }
    found.retain(|body| {
        let out = netlink::find(body, RTMSG, RTA_OIF).and_then(|value| number(value, 0));
        out == Some(link.index) && body.get(4) == Some(&RT_TABLE_MAIN) && body.get(5) != Some(&RTPROT_KERNEL)
    });
    Ok(found)
}

fn address_message(link: &Link, wanted: Cidr) -> Vec<u8> {
    let mut body = vec![family(wanted.address), wanted.prefix, 0, RT_SCOPE_UNIVERSE];
    body.extend_from_slice(&link.index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        attribute(&mut body, kind, &octets(wanted.address));
    }
    if let Some(broadcast) = wanted.broadcast() {
        attribute(&mut body, IFA_BROADCAST, &broadcast.octets());
    }
    if wanted.address.is_ipv6() {
        attribute(&mut body, IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
    }
    body
}

fn route_message(link: &Link, wanted: &RoutePlan) -> Vec<u8> {
    let scope = match (wanted.gateway, wanted.destination.address) {
        (None, IpAddr::V4(_)) => RT_SCOPE_LINK,
        _ => RT_SCOPE_UNIVERSE,
    };
    let family = family(wanted.destination.address);
    let mut body =
        vec![family, wanted.destination.prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST];
    body.extend_from_slice(&0u32.to_ne_bytes());
    if wanted.destination.prefix > 0 {
        attribute(&mut body, RTA_DST, &octets(wanted.destination.address));
    }
    attribute(&mut body, RTA_OIF, &link.index.to_ne_bytes());
    if let Some(gateway) = wanted.gateway {
        attribute(&mut body, RTA_GATEWAY, &octets(gateway));
    }
    if let Some(metric) = wanted.metric {
        attribute(&mut body, RTA_PRIORITY, &metric.to_ne_bytes());
    }
    body
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What an interface was: the kernel's own messages, which make it again.
#[derive(Debug)]
pub(super) struct Saved {
    link: Link,
    addresses: Vec<Vec<u8>>,
    routes: Vec<Vec<u8>>,
}

impl Saved {
    pub(super) fn take(netlink: &mut Netlink, link: &Link) -> io::Result<Self> {
        Ok(Self { link: link.clone(), addresses: addresses(netlink, link)?, routes: routes(netlink, link)? })
    }

    pub(super) fn restore(&self, netlink: &mut Netlink) -> io::Result<()> {
        let link = &self.link;
        let now = links(netlink)?.into_iter().find(|now| now.index == link.index);
        let now = now.ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("interface {} is gone", link.name))
        })?;
        let changed = Self::take(netlink, &now)?;
        clear(netlink, &changed)?;
        now.change(netlink, &link.mac, link.mtu, link.up)?;
        for address in &self.addresses {
            netlink
                .request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, address)
                .map_err(link.failed("restoring an address"))?;
        }
        // The kernel lists routes by destination; one through a gateway needs the way to it first.
        let (direct, through): (Vec<_>, Vec<_>) =
            self.routes.iter().partition(|route| netlink::find(route, RTMSG, RTA_GATEWAY).is_none());
        // A link that is down takes no routes, and lost them when it went down.
        for route in direct.into_iter().chain(through).filter(|_| link.up) {
            netlink
                .request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route)
                .map_err(link.failed("restoring a route"))?;
        }
        Ok(())
    }
}
