//! The network against real kernels and real programs: every accept and every drop by a connection and by a counter.
//!
//! Nothing here touches the machine's own network: what plays the host, and what plays the internet, are network namespaces.

mod host;
mod packets;
mod world;

use serde_json::{Value, json};
use world::{Driver, World};

/// Makes the same checks with both uplinks, the one as root and the other as an ordinary user.
macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod as_root {
            $(#[test] fn $name() { super::$name("tap"); })*
        }
        mod as_a_user {
            $(#[test] fn $name() { super::$name("user"); })*
        }
    };
}
use both;

both!(
    the_internet_is_open_and_the_rest_is_closed,
    rules_change_while_connections_are_used,
    rates_are_limited_in_each_direction,
    nothing_is_left_of_a_killed_owner,
    nothing_is_left_of_a_network_that_ended,
);

fn rules(fields: Value) -> Value {
    let mut rules =
        json!({"allow": [], "deny": [], "egress": null, "ingress": null, "resolvers": ["10.255.255.53"]});
    for (name, value) in fields.as_object().unwrap() {
        rules[name] = value.clone();
    }
    rules
}

fn the_internet_is_open_and_the_rest_is_closed(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({"deny": ["1.1.1.1/32", "2001:db8:bad::/48"]})));

    for open in ["8.8.8.8:7", "[2606:4700::1111]:7"] {
        let before = driver.counters();
        let connection = driver.ok(json!({"connect": open}));
        assert_eq!(driver.ok(json!({"ask": [connection, "hello"]})), "hello", "{open}");
        let after = driver.counters();
        assert!(
            after["sent"] > before["sent"] && after["received"] > before["received"],
            "{open}: {after:?}"
        );
        assert_eq!(after["reserved"], before["reserved"]);
    }
    for (closed, counter) in [
        ("10.1.2.3:7", "reserved"),
        ("172.16.0.1:7", "reserved"),
        ("192.168.1.1:7", "reserved"),
        ("100.64.0.1:7", "reserved"),
        ("169.254.169.254:7", "reserved"),
        ("[fd00::1]:7", "reserved"),
        // The host by its own addresses.
        ("203.0.113.2:7", "reserved"),
        ("[2001:db8:1::2]:7", "reserved"),
        ("192.168.77.1:7", "reserved"),
        // Another sandbox's end of its uplink, and this one's.
        ("198.18.0.0:7", "reserved"),
        ("1.1.1.1:7", "denied"),
        ("[2001:db8:bad::1]:7", "denied"),
    ] {
        let before = driver.counters();
        assert_eq!(driver.error(json!({"connect": closed})), "ConnectionRefused", "{closed}");
        let after = driver.counters();
        assert_eq!(after[counter], before[counter] + 1, "{closed}: {after:?}");
        assert_eq!(after["sent"], before["sent"], "{closed}: {after:?}");
    }

    // The resolver is private, and reached by the gateway's name only.
    let before = driver.counters();
    assert_eq!(driver.ok(json!({"ask_udp": ["198.19.0.1:53", "who?"]})), "who?");
    let connection = driver.ok(json!({"connect": "198.19.0.1:53"}));
    assert_eq!(driver.ok(json!({"ask": [connection, "by TCP"]})), "by TCP");
    let after = driver.counters();
    assert!(after["resolver"] >= before["resolver"] + 4, "{after:?}");
    driver.error(json!({"ask_udp": ["10.255.255.53:53", "who?"]}));
    assert_eq!(driver.counters()["reserved"], after["reserved"] + 1);

    // The gateway has nothing else, and says nothing.
    let before = driver.counters();
    assert_eq!(driver.error(json!({"connect": "198.19.0.1:7"})), "TimedOut");
    assert_eq!(driver.error(json!({"connect": "[fd74:6966:6669:ffff::1]:7"})), "TimedOut");
    assert!(driver.counters()["gateway"] >= before["gateway"] + 2);

    if mode == "tap" {
        // A host that sends packets into the namespace.
        let link = world.links().pop().expect("the uplink");
        world.host(&format!("ip route add 198.19.0.2 dev {link} via {}", world.inside_of(&link)));
        assert!(world.connect_from_host("198.19.0.2:22").is_err());
        assert!(driver.counters()["unsolicited"] > 0);
    }

    driver.ok(json!({"address": "203.0.113.77"}));
    let before = driver.counters();
    assert_eq!(driver.error(json!({"connect": "8.8.8.8:7"})), "TimedOut");
    let after = driver.counters();
    assert!(after["spoofed"] > before["spoofed"], "{after:?}");
    assert_eq!(after["sent"], before["sent"]);
}

fn rules_change_while_connections_are_used(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    let [stays, goes] = ["8.8.8.8:7", "1.1.1.1:7"].map(|to| driver.ok(json!({"connect": to})));
    let goes6 = driver.ok(json!({"connect": "[2606:4700::1111]:7"}));
    for connection in [&stays, &goes, &goes6] {
        assert_eq!(driver.ok(json!({"ask": [connection, "1"]})), "1");
    }
    let before = driver.counters();

    driver.ok(json!({"change": rules(json!({"deny": ["1.1.1.0/24", "2606:4700::/32"]}))}));
    for connection in [&goes, &goes6] {
        assert_eq!(driver.error(json!({"ask": [connection, "2"]})), "ConnectionReset");
    }
    assert_eq!(driver.error(json!({"connect": "1.1.1.1:7"})), "ConnectionRefused");
    assert_eq!(driver.ok(json!({"ask": [stays, "2"]})), "2");
    let after = driver.counters();
    assert!(after["denied"] >= 3, "{after:?}");
    assert!(after["sent"] > before["sent"], "counters go on");

    // A private network is opened but for one address, and the host by its own.
    assert_eq!(driver.error(json!({"connect": "10.1.2.3:7"})), "ConnectionRefused");
    driver.ok(json!({"change": rules(json!({
        "allow": ["10.1.0.0/16", "203.0.113.2/32", "2001:db8:1::2/128"], "deny": ["10.1.2.4/32"]
    }))}));
    for open in ["10.1.2.3:7", "203.0.113.2:7", "[2001:db8:1::2]:7", "1.1.1.1:7"] {
        let connection = driver.ok(json!({"connect": open}));
        assert_eq!(driver.ok(json!({"ask": [connection, "3"]})), "3", "{open}");
    }
    for closed in ["10.1.2.4:7", "10.2.0.1:7", "192.168.77.1:7"] {
        assert_eq!(driver.error(json!({"connect": closed})), "ConnectionRefused", "{closed}");
    }
    // All of IPv4 does not open the host nor a private network.
    driver.ok(json!({"change": rules(json!({"allow": ["0.0.0.0/0", "::/0"]}))}));
    for closed in ["203.0.113.2:7", "10.1.2.3:7", "[fd00::1]:7"] {
        assert_eq!(driver.error(json!({"connect": closed})), "ConnectionRefused", "{closed}");
    }

    // Another resolver.
    driver.ok(json!({"change": rules(json!({"resolvers": ["8.8.8.8", "10.255.255.53"]}))}));
    for _ in 0..8 {
        assert_eq!(driver.ok(json!({"ask_udp": ["198.19.0.1:53", "who?"]})), "who?");
    }
    assert_eq!(driver.ok(json!({"ask": [stays, "4"]})), "4");
}

fn rates_are_limited_in_each_direction(mode: &str) {
    const BYTES: u64 = 1 << 20;
    const RATE: u64 = 512 << 10;
    // The bucket's bytes pass at once; what a timer rounds is left for it.
    const LEAST_MS: u64 = 1000 * (BYTES - (128 << 10)) / RATE * 9 / 10;
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({"ingress": RATE})));
    let took = |answer: Value| answer.as_u64().unwrap();
    let down = took(driver.ok(json!({"download": ["8.8.8.8:7", BYTES]})));
    assert!(down >= LEAST_MS, "{BYTES} bytes came in {down} ms");
    driver.ok(json!({"change": rules(json!({"egress": RATE}))}));
    let up = took(driver.ok(json!({"upload": ["8.8.8.8:9", BYTES]})));
    assert!(up >= LEAST_MS, "{BYTES} bytes went in {up} ms");
    // Without limits 16 times as much is not that slow anywhere.
    driver.ok(json!({"change": rules(json!({}))}));
    let free = took(driver.ok(json!({"download": ["8.8.8.8:7", 16 * BYTES]})));
    assert!(free < 16 * LEAST_MS, "{} bytes came in {free} ms", 16 * BYTES);
}

fn nothing_is_left_of_a_killed_owner(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    driver.ok(json!({"connect": "8.8.8.8:7"}));
    let holders = something_is_there(&world, &driver, mode);
    driver.kill();
    world.becomes_clean(&holders);
}

fn nothing_is_left_of_a_network_that_ended(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    let holders = something_is_there(&world, &driver, mode);
    driver.ok(json!("end"));
    world.becomes_clean(&holders);
    assert_eq!(
        driver.error(json!({"connect": "8.8.8.8:7"})),
        "NetworkUnreachable",
        "the guest is still there"
    );
}

/// The processes of a network. It has left its traces: those that are to be gone.
fn something_is_there(world: &World, driver: &Driver, mode: &str) -> Vec<i32> {
    let holders = world.processes_under(driver.pid());
    let programs: Vec<_> = holders.iter().filter_map(|pid| World::program(*pid)).collect();
    // pasta is passt by another name, and picks a build of itself for the CPU.
    let uplink = if mode == "tap" { "nft" } else { "pass" };
    assert!(programs.iter().any(|program| program.starts_with(uplink)), "{programs:?}");
    assert_eq!((world.links().len(), world.tables().len()), if mode == "tap" { (1, 1) } else { (0, 0) });
    holders
}
