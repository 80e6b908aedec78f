//! The rules as nft takes them: a text for each transaction.
//!
//! ```text
//! tap0 ─► antispoof ─► resolve (DNAT) ─┬► gateway: dropped
//!                                      └► forward ─► out ─ verdict by daddr ─┬► allowed ─► leave (NAT) ─► uplink
//!                                                                            └► reserved, denied ─► refuse
//! uplink ─────────────────────────────────► forward ─► in ── verdict by saddr ─► the same ─► tap0
//! ```
//!
//! What the kernel would drop by itself on the way, to the loopback or to a group, is dropped before that, where it is counted.
//!
//! The verdict is asked for each packet and not only for the first of a connection: one that is closed while it is used gets
//! a reset at its next packet, from either side.

use std::collections::BTreeSet;
use std::fmt::{Display, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::addresses::{GATEWAY4, GATEWAY6, GUEST4, GUEST6, UplinkAddresses};
use crate::policy::Rules;
use crate::report::COUNTERS;
use crate::verdicts::{Run, Verdict, Verdicts};

/// The guest's side of the namespace.
pub(crate) const TAP: &str = "tap0";
/// The other side.
pub(crate) const UPLINK: &str = "uplink";
/// The table inside.
const TABLE: &str = "inet sandbox";

/// Connections of a sandbox at one time: each takes kernel memory of the host, those of all share one table there (262 144 on
/// a host of ordinary size), and the kernel walks a sandbox's for a new one of it (2 ms with 16 384).
const MAX_CONNECTIONS: u32 = 8192;

/// Everything for a fresh namespace.
pub(crate) fn fresh(rules: &Rules, host: &[IpAddr]) -> String {
    let mut counters = String::new();
    for name in COUNTERS {
        counters.push_str(&format!("  counter {name} {{ }}\n"));
    }
    let mut text = format!(
        r#"table {TABLE} {{
{counters}  map remote4 {{ type ipv4_addr : verdict; flags interval; }}
  map remote6 {{ type ipv6_addr : verdict; flags interval; }}
  set resolvers4 {{ type ipv4_addr; }}
  set resolvers6 {{ type ipv6_addr; }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain reserved {{ counter name reserved goto refuse; }}
  chain denied {{ counter name denied goto refuse; }}
  chain invalid {{
    counter name invalid
    meta l4proto tcp reject with tcp reset
    drop
  }}
  chain allowed {{
    iifname "{TAP}" counter name sent accept
    counter name received accept
  }}
  chain antispoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{TAP}" ip saddr != {GUEST4} counter name spoofed drop
    iifname "{TAP}" ip6 saddr != {{ {GUEST6}, fe80::/10, :: }} counter name spoofed drop
    iifname "{TAP}" ip daddr {{ 0.0.0.0/8, 127.0.0.0/8 }} counter name reserved drop
    iifname "{TAP}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    iifname "{TAP}" ip daddr {{ 224.0.0.0/4, 255.255.255.255 }} counter name multicast drop
    iifname "{TAP}" ip6 daddr ff00::/8 counter name multicast drop
    iifname "{TAP}" ip6 saddr {{ fe80::/10, :: }} counter name spoofed drop
  }}
  chain resolve {{ type nat hook prerouting priority dstnat; policy accept; }}
  chain leave {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{UPLINK}" masquerade
  }}
  chain gateway {{
    type filter hook input priority filter; policy drop;
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    iifname "{TAP}" counter name gateway drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{TAP}" oifname "{UPLINK}" goto out
    iifname "{UPLINK}" oifname "{TAP}" goto in
    iifname "{TAP}" counter name gateway drop
    counter name unsolicited drop
  }}
  chain out {{
    ct state invalid goto invalid
    ct state new ct count over {MAX_CONNECTIONS} counter name crowded drop
    ct status dnat ip daddr @resolvers4 counter name resolver accept
    ct status dnat ip6 daddr @resolvers6 counter name resolver accept
    ip daddr vmap @remote4
    ip6 daddr vmap @remote6
  }}
  chain in {{
    ct state != {{ established, related }} counter name unsolicited drop
    ct status dnat ip saddr @resolvers4 counter name resolver accept
    ct status dnat ip6 saddr @resolvers6 counter name resolver accept
    ct state related meta l4proto {{ icmp, ipv6-icmp }} counter name received accept
    ip saddr vmap @remote4
    ip6 saddr vmap @remote6
  }}
}}
"#
    );
    fill(&mut text, rules, host);
    text
}

/// What changes the rules of a namespace that has some. The counters go on.
pub(crate) fn change(rules: &Rules, host: &[IpAddr]) -> String {
    let mut text = String::new();
    for part in ["map", "set"].into_iter().zip([["remote4", "remote6"], ["resolvers4", "resolvers6"]]) {
        let (kind, [four, six]) = part;
        text.push_str(&format!("flush {kind} {TABLE} {four}\nflush {kind} {TABLE} {six}\n"));
    }
    text.push_str(&format!("flush chain {TABLE} resolve\n"));
    fill(&mut text, rules, host);
    text
}

/// What asks for the counters.
pub(crate) const LIST_COUNTERS: [&str; 3] = ["-j", "list", "counters"];

fn fill(text: &mut String, rules: &Rules, host: &[IpAddr]) {
    let verdicts = Verdicts::of(rules, host);
    elements(text, "remote4", &verdicts.four);
    elements(text, "remote6", &verdicts.six);
    let (mut four, mut six): (Vec<Ipv4Addr>, Vec<Ipv6Addr>) = Default::default();
    for resolver in &rules.resolvers {
        match resolver {
            IpAddr::V4(address) => four.push(*address),
            IpAddr::V6(address) => six.push(*address),
        }
    }
    resolve(text, "ip", "resolvers4", &GATEWAY4, &four);
    resolve(text, "ip6", "resolvers6", &GATEWAY6, &six);
}

fn elements<A: Display + PartialEq>(text: &mut String, map: &str, runs: &[Run<A>]) {
    let elements: Vec<String> = runs
        .iter()
        .map(|Run { first, last, verdict }| {
            let verdict = match verdict {
                Verdict::Allowed => "allowed",
                Verdict::Reserved => "reserved",
                Verdict::Denied => "denied",
            };
            let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
            format!("  {range} : goto {verdict}")
        })
        .collect();
    put(text, format_args!("add element {TABLE} {map} {{\n{}\n}}\n", elements.join(",\n")));
}

/// Questions to the gateway go to one of the resolvers; one that is asked again may go to another.
fn resolve(text: &mut String, family: &str, set: &str, gateway: &dyn Display, resolvers: &[impl Display]) {
    if resolvers.is_empty() {
        return;
    }
    let count = resolvers.len();
    let elements: BTreeSet<_> = resolvers.iter().map(ToString::to_string).collect();
    let elements: Vec<_> = elements.into_iter().collect();
    put(text, format_args!("add element {TABLE} {set} {{ {} }}\n", elements.join(", ")));
    let servers: Vec<_> = resolvers.iter().enumerate().map(|(index, to)| format!("{index} : {to}")).collect();
    put(
        text,
        format_args!(
            "add rule {TABLE} resolve iifname \"{TAP}\" {family} daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 \
             dnat {family} to numgen random mod {count} map {{ {} }}\n",
            servers.join(", ")
        ),
    );
}

/// The host's side of a veth uplink, in one line: a table that belongs to the process that makes it.
///
/// Nothing of the host is reached through it but single addresses that the owner opened, and the resolvers' port. No other
/// sandbox is, and nobody out there reaches a sandbox.
pub(crate) fn host_table(name: &str, link: &UplinkAddresses, rules: &Rules) -> String {
    let (inside4, inside6) = (link.inside4.addr(), link.inside6.addr());
    let mut text = format!(
        "table inet {name} {{ flags owner; \
         chain open {{ }}; \
         chain input {{ type filter hook input priority filter; policy accept; \
         iifname != \"{name}\" accept; icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept; \
         ct state {{ established, related }} accept; jump open; drop; }}; \
         chain forward {{ type filter hook forward priority filter; policy accept; \
         oifname \"{name}\" ct state != {{ established, related }} drop; \
         iifname \"{name}\" ip saddr != {inside4} drop; iifname \"{name}\" ip6 saddr != {inside6} drop; }}; \
         chain leave {{ type nat hook postrouting priority srcnat; policy accept; \
         oifname != \"{name}\" ip saddr {inside4} masquerade; oifname != \"{name}\" ip6 saddr {inside6} masquerade; }}; }}"
    );
    text.push_str("; ");
    text.push_str(&host_open(name, rules));
    text
}

/// What changes with the rules in the table of [`host_table`].
pub(crate) fn host_open(name: &str, rules: &Rules) -> String {
    let mut text = format!("flush chain inet {name} open");
    let family = |address: IpAddr| if address.is_ipv4() { "ip" } else { "ip6" };
    for range in &rules.allow {
        // A host's address is opened by itself and not by a range around it, inside as here.
        if range.prefix_len() == range.max_prefix_len() {
            let address = range.addr();
            put(
                &mut text,
                format_args!("; add rule inet {name} open {} daddr {address} accept", family(address)),
            );
        }
    }
    for &address in &rules.resolvers {
        put(
            &mut text,
            format_args!(
                "; add rule inet {name} open {} daddr {address} meta l4proto {{ tcp, udp }} th dport 53 accept",
                family(address)
            ),
        );
    }
    text
}

fn put(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // A String takes everything.
    let _ = text.write_fmt(arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_change_only_on_purpose() {
        let rules = Rules::parse(&["10.1.0.0/16", "203.0.113.2"], &["1.1.1.1"]).unwrap();
        let rules = rules.with_resolvers(&["10.255.255.53", "9.9.9.9", "2001:db8::53"]).unwrap();
        let host = ["203.0.113.2".parse().unwrap()];
        insta::assert_snapshot!("fresh", fresh(&rules, &host));
        insta::assert_snapshot!("change", change(&Rules::default(), &host));
        let host = host_table("tiffin7", &UplinkAddresses::of(7), &rules);
        insta::assert_snapshot!("host_table", host.replace("; ", ";\n"));
    }
}
