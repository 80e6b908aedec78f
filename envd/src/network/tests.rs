//! Against the kernel, in a network namespace of the test's own, with `ip` as the oracle.

use std::process::Command;

use envd_proto::control::{Interface, Network, Route, interface};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use super::*;

/// Runs a test in a new network namespace with two pairs of interfaces, or says loudly why not.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("SKIPPED: a network namespace needs root: {error}");
            return;
        }
        for words in [
            "link set lo up",
            "link add net0 type veth peer name net1",
            "link set net1 up",
            "link add veth0 type veth peer name veth1",
            "link set veth1 up",
        ] {
            if !ip(words) {
                eprintln!("SKIPPED: `ip {words}` failed: no iproute2, or a kernel without veth");
                return;
            }
        }
        test();
    });
    thread.join().unwrap();
}

/// A child has its parent thread's network namespace.
fn ip(words: &str) -> bool {
    Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success())
}

fn ip_json(words: &str) -> Vec<Value> {
    let output = Command::new("ip").arg("-j").args(words.split(' ')).output().unwrap();
    serde_json::from_slice::<Value>(&output.stdout).unwrap().as_array().unwrap().clone()
}

fn addresses(interface: &str) -> Vec<String> {
    let links = ip_json(&format!("addr show dev {interface}"));
    let mut found: Vec<_> = links[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|address| address["scope"] != "link")
        .map(|address| format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"]))
        .collect();
    found.sort();
    found
}

/// Destination and gateway of the routes that the kernel did not make.
fn routes(interface: &str) -> Vec<String> {
    let mut found = Vec::new();
    for family in ["-4", "-6"] {
        for route in ip_json(&format!("{family} route show dev {interface}")) {
            if route["protocol"] != "kernel" {
                found.push(format!(
                    "{} {}",
                    route["dst"].as_str().unwrap(),
                    route["gateway"].as_str().unwrap_or("-")
                ));
            }
        }
    }
    found.sort();
    found
}

fn plan(name: &str, addresses: &[&str], via: &[(&str, &str)], change: impl FnOnce(&mut Interface)) -> Plan {
    let mut one = Interface {
        interface: Some(interface::Interface::Name(name.into())),
        addresses: addresses.iter().map(|&address| address.into()).collect(),
        routes: via
            .iter()
            .map(|&(destination, gateway)| Route {
                destination: destination.into(),
                gateway: gateway.into(),
                metric: 0,
            })
            .collect(),
        ..Interface::default()
    };
    change(&mut one);
    Plan::parse(&Network { interfaces: vec![one], ..Network::default() }).unwrap()
}

#[test]
fn an_interface_gets_its_addresses_routes_mtu_and_mac_and_a_clone_replaces_them() {
    in_namespace(|| {
        let first = plan(
            "net0",
            &["10.0.0.2/24", "192.0.2.9/32", "fd00::2/64"],
            &[("", "10.0.0.1"), ("10.7.0.0/16", ""), ("", "fd00::1")],
            |one| one.mtu = 1400,
        );
        let _ = apply(&first).unwrap();
        assert_eq!(addresses("net0"), ["10.0.0.2/24", "192.0.2.9/32", "fd00::2/64"]);
        assert_eq!(routes("net0"), ["10.7.0.0/16 -", "default 10.0.0.1", "default fd00::1"]);
        let link = &ip_json("addr show dev net0")[0];
        assert_eq!(link["mtu"], 1400);
        assert!(link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"));
        assert_eq!(link["addr_info"][0]["broadcast"], "10.0.0.255");
        assert!(
            link["addr_info"]
                .as_array()
                .unwrap()
                .iter()
                .all(|address| address["tentative"].is_null() || address["scope"] == "link")
        );

        // A clone finds the source's configuration and ends with its own alone.
        let clone = plan("net0", &["10.0.5.7/16", "fd05::7/64"], &[("", "10.0.0.1")], |one| {
            one.new_mac = "02:00:00:00:05:07".into();
        });
        let _ = apply(&clone).unwrap();
        assert_eq!(addresses("net0"), ["10.0.5.7/16", "fd05::7/64"]);
        assert_eq!(routes("net0"), ["default 10.0.0.1"]);
        assert_eq!(ip_json("link show dev net0")[0]["address"], "02:00:00:00:05:07");
    });
}

#[test]
fn an_interface_is_found_by_its_mac_and_changes_it_while_up() {
    in_namespace(|| {
        assert!(ip("link set veth0 up"));
        let mac = ip_json("link show dev veth0")[0]["address"].as_str().unwrap().to_owned();
        let wanted = plan("veth0", &["172.16.0.1/31"], &[("", "172.16.0.0")], |one| {
            one.interface = Some(interface::Interface::Mac(mac));
            one.new_mac = "02:11:22:33:44:55".into();
        });
        let _ = apply(&wanted).unwrap();
        assert_eq!(ip_json("link show dev veth0")[0]["address"], "02:11:22:33:44:55");
        assert_eq!(addresses("veth0"), ["172.16.0.1/31"]);
        assert_eq!(routes("veth0"), ["default 172.16.0.0"]);
    });
}

#[test]
fn what_fails_names_its_place_and_leaves_everything_as_it_was() {
    in_namespace(|| {
        assert!(ip("link set veth0 up"));
        let before = plan(
            "veth0",
            &["10.0.0.2/24", "fd00::2/64"],
            &[("", "10.0.0.1"), ("fd77::/64", "fd00::1")],
            |one| one.mtu = 1400,
        );
        let _ = apply(&before).unwrap();
        let state = || {
            let link = &ip_json("link show dev veth0")[0];
            (addresses("veth0"), routes("veth0"), link["mtu"].clone(), link["address"].clone())
        };
        let was = state();
        let bad = plan("veth0", &["10.9.0.2/24"], &[("", "10.0.0.1")], |one| {
            one.mtu = 1300;
            one.new_mac = "02:11:22:33:44:55".into();
        });
        let error = apply(&bad).unwrap_err().to_string();
        assert!(error.starts_with("interface veth0: route 0.0.0.0/0 via 10.0.0.1: "), "{error}");
        assert!(error.contains("gateway") || error.contains("unreachable"), "{error}");
        assert_eq!(state(), was);

        let missing = apply(&plan("eth9", &["10.9.0.2/24"], &[], |_| {})).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(
            missing.to_string().contains("eth9: the machine has no such interface, it has lo"),
            "{missing}"
        );

        let undo = apply(&plan("veth0", &["10.4.0.2/24"], &[], |_| {})).unwrap();
        assert_eq!(addresses("veth0"), ["10.4.0.2/24"]);
        undo.undo();
        assert_eq!(state(), was);
    });
}
