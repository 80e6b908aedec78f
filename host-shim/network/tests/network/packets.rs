//! Packets that a kernel of the guest's own would send, past all that an ordinary one keeps to.

use std::collections::BTreeMap;

use serde_json::json;

use super::{both, rules};
use crate::world::World;

/// More than one sandbox may have.
const CONNECTIONS: u16 = 8192 + 100;

both!(
    no_packet_to_a_special_address_passes,
    a_connection_that_was_not_begun_here_is_cut,
    a_resolver_that_is_taken_away_is_cut_off,
);

fn no_packet_to_a_special_address_passes(mode: &str) {
    let Some(world) = World::make() else { return };
    // The widest that an owner can open: what is closed has longer prefixes.
    let mut driver = world.drive(mode, &rules(json!({"allow": ["0.0.0.0/0", "::/0"]})));
    for (to, counter) in [
        ("0.0.0.1", "reserved"),
        ("127.0.0.1", "reserved"),
        ("10.1.2.3", "reserved"),
        ("100.64.0.1", "reserved"),
        ("100.127.255.255", "reserved"),
        ("169.254.169.254", "reserved"),
        ("172.16.0.1", "reserved"),
        ("172.31.255.255", "reserved"),
        ("192.0.0.1", "reserved"),
        ("192.168.1.1", "reserved"),
        ("198.18.77.1", "reserved"),
        ("240.0.0.1", "reserved"),
        ("203.0.113.2", "reserved"),
        ("224.0.0.251", "multicast"),
        ("239.255.255.250", "multicast"),
        ("255.255.255.255", "multicast"),
        ("198.19.0.1", "gateway"),
        // IPv4 written as IPv6: mapped, compatible, NAT64, local NAT64, 6to4, Teredo.
        ("::ffff:10.1.2.3", "reserved"),
        ("::10.1.2.3", "reserved"),
        ("64:ff9b::10.1.2.3", "reserved"),
        ("64:ff9b::169.254.169.254", "reserved"),
        ("64:ff9b:1::10.1.2.3", "reserved"),
        ("2002:a01:203::1", "reserved"),
        ("2001:0:a01:203::1", "reserved"),
        ("fd00::1", "reserved"),
        ("fd74:6966:6669:77::2", "reserved"),
        ("fec0::1", "reserved"),
        ("2001:db8:1::2", "reserved"),
        ("ff02::1", "multicast"),
        ("ff02::fb", "multicast"),
        ("ff0e::1", "multicast"),
        ("fd74:6966:6669:ffff::1", "gateway"),
    ] {
        for tcp in [None, Some("syn")] {
            let before = driver.counters();
            driver.ok(json!({"send": {"to": to, "port": 7, "tcp": tcp}}));
            let after = driver.counters();
            assert!(after[counter] > before[counter], "{to}: {after:?}");
            let passed = |counters: &BTreeMap<String, u64>| (counters["sent"], counters["resolver"]);
            assert_eq!(passed(&after), passed(&before), "{to}: {after:?}");
        }
    }
    for (from, to) in [
        ("198.19.0.1", "8.8.8.8"),
        ("127.0.0.1", "8.8.8.8"),
        ("203.0.113.2", "8.8.8.8"),
        ("0.0.0.0", "8.8.8.8"),
        ("2001:db8::77", "2606:4700::1111"),
        ("fe80::1", "2606:4700::1111"),
        ("::", "2606:4700::1111"),
        ("fd74:6966:6669:ffff::1", "2606:4700::1111"),
    ] {
        let before = driver.counters();
        driver.ok(json!({"send": {"from": from, "to": to, "port": 7}}));
        let after = driver.counters();
        assert_eq!(after["spoofed"], before["spoofed"] + 1, "{from}: {after:?}");
        assert_eq!(after["sent"], before["sent"], "{from}: {after:?}");
    }
    // By the same way an open address is reached.
    for open in ["8.8.8.8", "2606:4700::1111"] {
        let before = driver.counters();
        driver.ok(json!({"send": {"to": open, "port": 53}}));
        assert!(driver.counters()["sent"] > before["sent"], "{open}");
    }
}

/// A restored guest goes on with connections that are none here. Its peer is not asked: it might take them up.
fn a_connection_that_was_not_begun_here_is_cut(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    for to in ["8.8.8.8", "2606:4700::1111"] {
        let before = driver.counters();
        driver.ok(json!({"send": {"to": to, "port": 7, "tcp": "ack"}}));
        let after = driver.counters();
        assert_eq!(after["invalid"], before["invalid"] + 1, "{after:?}");
        assert_eq!(after["sent"], before["sent"], "{after:?}");
    }
}

fn a_resolver_that_is_taken_away_is_cut_off(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    let connection = driver.ok(json!({"connect": "198.19.0.1:53"}));
    assert_eq!(driver.ok(json!({"ask": [connection, "1"]})), "1");
    driver.ok(json!({"change": rules(json!({"resolvers": ["8.8.8.8"]}))}));
    assert_eq!(driver.error(json!({"ask": [connection, "2"]})), "ConnectionReset");
    let connection = driver.ok(json!({"connect": "198.19.0.1:53"}));
    assert_eq!(driver.ok(json!({"ask": [connection, "3"]})), "3");
}

#[test]
fn a_sandbox_has_so_many_connections_and_no_more() {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive("tap", &rules(json!({})));
    // To somebody who does not answer: these are remembered for two minutes.
    driver.ok(json!({"flood": [{"to": "9.9.9.9", "port": 10_000, "tcp": "syn"}, CONNECTIONS]}));
    let after = driver.counters();
    assert!(after["crowded"] >= 99 && after["sent"] <= 8193, "{after:?}");
}

/// That a port is closed out there is told by a packet of no connection of its own.
#[test]
fn word_of_a_closed_port_comes_back() {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive("tap", &rules(json!({})));
    let before = driver.counters();
    assert_eq!(driver.error(json!({"ask_udp": ["8.8.8.8:9999", "who?"]})), "ConnectionRefused");
    assert!(driver.counters()["received"] > before["received"]);
}
