//! The steps to a network, and its changes.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use nix::net::if_::if_nametoindex;

use super::address_watch::AddressWatch;
use super::command::{command, inside, ip, namespace, run, sysctl};
use super::host_rules::HostRules;
use crate::addresses::{
    GATEWAY_MAC, GATEWAY4, GATEWAY6, GUEST_MAC, GUEST4, GUEST6, PREFIX_LENGTH4, PREFIX_LENGTH6, UPLINKS,
    UplinkAddresses,
};
use crate::network::Namespace;
use crate::report::counters;
use crate::requirements::is_on;
use crate::ruleset::{self, TAP, UPLINK};
use crate::{Error, Rate, Report, Rules, Uplink};

/// How many indices are tried for a name that no other uplink of this host has.
const ATTEMPTS: u16 = 64;

/// A bucket as large as a full packet of the largest kind, so that a low rate lets one through.
const LEAST_BURST: u64 = 64 << 10;

/// What waits behind a limit, as `tc` takes it: what is more than that is dropped, and senders slow down.
const SHORT_QUEUE: [&str; 2] = ["latency", "200ms"];

/// As [`SHORT_QUEUE`], for pasta: it recovers from a lost segment so slowly (Debian 12's, measured: 8 s and more for a MiB at
/// 512 KiB/s, and resets) that a whole window has to wait here instead.
const LONG_QUEUE: [&str; 2] = ["limit", "4mb"];

/// A TCP connection is one that was begun here. That of a guest's earlier life is not taken up in the middle: it ends at its
/// next segment, whatever the other side and the NATs on the way still know of it. What is left to be invalid is only that.
const CONNECTION_TRACKING: [(&str, &str); 2] =
    [("net/netfilter/nf_conntrack_tcp_loose", "0"), ("net/netfilter/nf_conntrack_tcp_be_liberal", "1")];

/// A network that is there.
#[derive(Debug)]
pub(super) struct Made {
    namespace: Namespace,
    outside: Option<Outside>,
    address_watch: AddressWatch,
    /// The host's addresses that are closed.
    host: Vec<IpAddr>,
    rules: Rules,
    /// The limits of the two devices.
    egress: Option<Rate>,
    ingress: Option<Rate>,
}

/// The host's side of a veth.
#[derive(Debug)]
struct Outside {
    name: String,
    rules: HostRules,
}

impl Made {
    /// Makes it. The filter is there before anything that it filters.
    pub(super) fn new(uplink: Uplink, rules: &Rules) -> Result<(Self, OwnedFd), Error> {
        let address_watch = AddressWatch::new()?;
        let host = address_watch.addresses()?;
        let namespace = namespace()?;
        let tap = inside(&namespace, || {
            nft(&ruleset::fresh(rules, &host))?;
            let tap = envd_sys::open_tap(TAP).map_err(Error::io("make the TAP"))?;
            ip(
                "the guest's side",
                &format!(
                    "link set lo up\n\
                     link set {TAP} address {GATEWAY_MAC}\n\
                     addr add {GATEWAY4}/{PREFIX_LENGTH4} dev {TAP}\n\
                     addr add {GATEWAY6}/{PREFIX_LENGTH6} dev {TAP} nodad\n\
                     link set {TAP} up\n\
                     neigh replace {GUEST4} lladdr {GUEST_MAC} dev {TAP} nud permanent\n\
                     neigh replace {GUEST6} lladdr {GUEST_MAC} dev {TAP} nud permanent\n"
                ),
            )?;
            for (name, value) in CONNECTION_TRACKING {
                sysctl(name, value)?;
            }
            sysctl("net/ipv4/ip_forward", "1")?;
            sysctl("net/ipv6/conf/all/forwarding", "1")?;
            Ok(tap)
        })?;
        let outside = match uplink {
            Uplink::Veth => Some(veth(&namespace, rules)?),
            Uplink::Pasta => {
                pasta(&namespace)?;
                None
            }
        };
        let (egress, ingress) = (None, None);
        let mut made =
            Self { namespace, outside, address_watch, host, rules: rules.clone(), egress, ingress };
        made.limit(rules)?;
        Ok((made, tap))
    }

    /// Cuts it off. The VMM has the TAP, and the namespace is there as long as that: without an uplink.
    pub(super) fn end(self) {
        if let Some(outside) = self.outside
            && let Err(error) = ip("the uplink's end", &format!("link del {}\n", outside.name))
        {
            eprintln!("{error}");
        }
    }

    /// Puts other rules in place of those that it has, which stay where that fails.
    pub(super) fn change(&mut self, rules: &Rules) -> Result<(), Error> {
        let done = self.put(rules);
        if done.is_ok() {
            self.rules.clone_from(rules);
        } else if let Err(error) = self.put(&self.rules.clone()) {
            eprintln!("the rules from before the change that failed: {error}");
        }
        done
    }

    fn put(&mut self, rules: &Rules) -> Result<(), Error> {
        self.close(rules, self.address_watch.addresses()?)?;
        if let Some(outside) = &mut self.outside {
            outside.rules.change(&ruleset::host_open(&outside.name, rules))?;
        }
        self.limit(rules)
    }

    fn close(&mut self, rules: &Rules, host: Vec<IpAddr>) -> Result<(), Error> {
        inside(&self.namespace, || nft(&ruleset::change(rules, &host)))?;
        self.host = host;
        Ok(())
    }

    /// What can be read when the host may have other addresses.
    pub(super) fn address_watch(&self) -> &AddressWatch {
        &self.address_watch
    }

    /// Closes the addresses that the host has now, in place of those that it had.
    pub(super) fn follow_host(&mut self) -> Result<(), Error> {
        let host = self.address_watch.addresses()?;
        if host == self.host { Ok(()) } else { self.close(&self.rules.clone(), host) }
    }

    /// What it has done.
    pub(super) fn report(&mut self) -> Result<Report, Error> {
        inside(&self.namespace, || {
            let mut list = command("nft")?;
            list.args(ruleset::LIST_COUNTERS).stdin(Stdio::null());
            let counters = counters(&run(list, "the counters", None)?)?;
            Ok(Report { uplink_up: if_nametoindex(UPLINK).is_ok(), counters })
        })
    }

    /// Each direction is shaped where it leaves the namespace, so both wait and none is dropped as long as senders adapt.
    fn limit(&mut self, rules: &Rules) -> Result<(), Error> {
        let sides = [(TAP, &mut self.ingress, rules.ingress), (UPLINK, &mut self.egress, rules.egress)];
        for (device, now, wanted) in sides {
            if *now != wanted {
                let queue = if self.outside.is_some() { SHORT_QUEUE } else { LONG_QUEUE };
                inside(&self.namespace, || shape(device, wanted, queue))?;
                *now = wanted;
            }
        }
        Ok(())
    }
}

fn nft(text: &str) -> Result<(), Error> {
    let mut command = command("nft")?;
    command.args(["-f", "-"]);
    run(command, "the rules", Some(text)).map(drop)
}

fn shape(device: &str, rate: Option<Rate>, queue: [&str; 2]) -> Result<(), Error> {
    let mut tc = command("tc")?;
    tc.args(["qdisc", "replace", "dev", device, "root"]).stdin(Stdio::null());
    match rate.map(Rate::bytes_per_second) {
        // A bucket holds a fiftieth of a second, which is some ticks of the slowest timer.
        Some(rate) => {
            let burst = (rate / 50).max(LEAST_BURST);
            tc.args(["tbf", "rate", &format!("{rate}bps"), "burst", &format!("{burst}b")]).args(queue)
        }
        None => tc.arg("pfifo"),
    };
    run(tc, "the limit of the rate", None).map(drop)
}

/// A pair of interfaces: `uplink` in the namespace, and one on the host whose name no other has. The kernel gives out the
/// name, and with it the addresses: two helpers cannot get the same.
fn veth(namespace: &Namespace, rules: &Rules) -> Result<Outside, Error> {
    let mut random = [0; 2];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(Error::io("read random bytes"))?;
    let first = u16::from_le_bytes(random);
    let mut attempt = 0;
    let (name, addresses) = loop {
        let index = first.wrapping_add(attempt) % UPLINKS;
        let name = format!("tiffin{index}");
        let mut link = command("ip")?;
        link.args(["link", "add", &name, "type", "veth", "peer", "name", UPLINK, "netns", "/proc/self/fd/0"]);
        link.stdin(namespace.try_clone().map_err(Error::io("share the network namespace"))?);
        match run(link, "the uplink", None) {
            Ok(_) => break (name, UplinkAddresses::of(index)),
            Err(Error::Step(reason)) if reason.contains("File exists") && attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error),
        }
    };
    let UplinkAddresses { outside4, inside4, outside6, inside6 } = addresses;
    let rules = HostRules::new(&ruleset::host_table(&name, &addresses, rules))?;
    let forwards6 = is_on("/proc/sys/net/ipv6/conf/all/forwarding");
    let mut lines = format!("addr add {outside4} dev {name}\n");
    if forwards6 {
        lines.push_str(&format!("addr add {outside6} dev {name} nodad\n"));
    }
    lines.push_str(&format!("link set {name} up\n"));
    ip("the host's side of the uplink", &lines)?;
    sysctl(&format!("net/ipv4/conf/{name}/forwarding"), "1")?;
    inside(namespace, || {
        let mut lines = format!("addr add {inside4} dev {UPLINK}\n");
        if forwards6 {
            lines.push_str(&format!("addr add {inside6} dev {UPLINK} nodad\n"));
        }
        lines.push_str(&format!("link set {UPLINK} up\nroute add default via {}\n", outside4.addr()));
        if forwards6 {
            lines.push_str(&format!("route add ::/0 via {} dev {UPLINK}\n", outside6.addr()));
        }
        ip("the uplink's inner side", &lines)
    })?;
    Ok(Outside { name, rules })
}

/// Ties the namespace to pasta. The program goes into the background once it is ready, and ends with this PID namespace.
fn pasta(namespace: &Namespace) -> Result<(), Error> {
    let has_default = |family: &str| -> Result<bool, Error> {
        let mut routes = command("ip")?;
        routes.args([family, "route", "show", "default"]).stdin(Stdio::null());
        Ok(!run(routes, "the host's routes", None)?.trim().is_empty())
    };
    let (four, six) = (has_default("-4")?, has_default("-6")?);
    let UplinkAddresses { outside4, inside4, outside6, inside6 } = UplinkAddresses::of(0);
    let mut pasta = command("pasta")?;
    // Its options are those of Debian 12 (2023), and are there in later versions. Ports are forwarded in no direction, and
    // the gateway is not the host.
    pasta.args(["--quiet", "--config-net", "--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ra"]);
    pasta.args(["--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"]);
    match (four, six) {
        (true, true) => {}
        (true, false) => drop(pasta.arg("--ipv4-only")),
        (false, true) => drop(pasta.arg("--ipv6-only")),
        (false, false) => {
            return Err(Error::Step(
                "the host has no default route: there is nothing to be tied to".to_owned(),
            ));
        }
    }
    if four {
        let (address, gateway) = (inside4.addr().to_string(), outside4.addr().to_string());
        pasta.args(["--address", &address, "--netmask", "31", "--gateway", &gateway]);
    }
    if six {
        pasta.args(["--address", &inside6.addr().to_string(), "--gateway", &outside6.addr().to_string()]);
    }
    // By a descriptor that every version keeps open: to other processes' it may not look.
    pasta.args(["--ns-ifname", UPLINK, "--netns-only", "--no-netns-quit", "--netns", "/proc/self/fd/0"]);
    pasta.stdin(namespace.try_clone().map_err(Error::io("share the network namespace"))?);
    run(pasta, "pasta", None).map(drop)
}
