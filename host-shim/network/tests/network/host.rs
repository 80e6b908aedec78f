//! What belongs to the host: its programs, its addresses, and the other sandboxes on it.

use serde_json::json;

use super::{both, rules};
use crate::world::{Driver, World};

/// Sandboxes that are made at one moment.
const MANY: usize = 12;

both!(many_at_once_have_nothing_in_common, an_address_that_the_host_gets_later_is_closed);

fn many_at_once_have_nothing_in_common(mode: &str) {
    let Some(world) = World::make() else { return };
    let start = || {
        let mut driver = world.drive(mode, &rules(json!({"ingress": 10 << 20})));
        let connection = driver.ok(json!({"connect": "8.8.8.8:7"}));
        assert_eq!(driver.ok(json!({"ask": [connection, "hello"]})), "hello");
        driver
    };
    let mut drivers: Vec<Driver> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..MANY).map(|_| scope.spawn(start)).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    if mode == "tap" {
        let mut ends: Vec<_> = world.links().iter().map(|link| world.inside_of(link)).collect();
        ends.sort();
        ends.dedup();
        assert_eq!((ends.len(), world.tables().len()), (MANY, MANY));
    }
    // A change of one is a change of that one, whatever the others do to the host's tables meanwhile.
    let denied = rules(json!({"deny": ["8.8.8.8/32"]}));
    std::thread::scope(|scope| {
        for (index, driver) in drivers.iter_mut().enumerate() {
            let denied = &denied;
            scope.spawn(move || {
                if index % 2 == 0 {
                    driver.ok(json!({"change": denied}));
                }
            });
        }
    });
    for (index, driver) in drivers.iter_mut().enumerate() {
        if index % 2 == 0 {
            assert_eq!(driver.error(json!({"ask": [0, "2"]})), "ConnectionReset", "{index}");
        } else {
            assert_eq!(driver.ok(json!({"ask": [0, "2"]})), "2", "{index}");
        }
    }
    let holders: Vec<_> = drivers.iter().flat_map(|driver| world.processes_under(driver.pid())).collect();
    std::thread::scope(|scope| {
        for driver in &mut drivers {
            scope.spawn(|| driver.kill());
        }
    });
    world.becomes_clean(&holders);
}

fn an_address_that_the_host_gets_later_is_closed(mode: &str) {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive(mode, &rules(json!({})));
    let connect = json!({"connect": "203.0.113.44:7"});
    world.host("ip addr add 203.0.113.44/32 dev wan; ip addr add 2001:db8:1::44/64 dev wan nodad");
    for closed in ["203.0.113.44:7", "[2001:db8:1::44]:7"] {
        // The helper hears of it in its own time.
        world.until(|| driver.call(json!({"connect": closed})).get("error").is_some());
    }
    let before = driver.counters();
    assert_eq!(driver.error(connect), "ConnectionRefused");
    assert_eq!(driver.counters()["reserved"], before["reserved"] + 1);
    // And a change of the rules keeps it so.
    driver.ok(json!({"change": rules(json!({"deny": ["1.1.1.1/32"]}))}));
    assert_eq!(driver.error(json!({"connect": "203.0.113.44:7"})), "ConnectionRefused");
}

/// The host's own resolver is asked and nothing else of the host.
#[test]
fn a_resolver_that_is_the_host_itself_is_asked_and_the_host_is_closed() {
    let Some(world) = World::make() else { return };
    for mode in ["tap", "user"] {
        let mut driver = world.drive(mode, &rules(json!({"resolvers": ["203.0.113.2"]})));
        assert_eq!(driver.ok(json!({"ask_udp": ["198.19.0.1:53", "who?"]})), "who?", "{mode}");
        for closed in ["203.0.113.2:7", "203.0.113.2:53"] {
            assert_eq!(driver.error(json!({"connect": closed})), "ConnectionRefused", "{mode}: {closed}");
        }
    }
}

#[test]
fn a_network_whose_pasta_has_died_says_so() {
    let Some(world) = World::make() else { return };
    let mut driver = world.drive("user", &rules(json!({})));
    assert_eq!(driver.ok(json!("report"))["uplink_up"], true);
    let pasta = world.processes_under(driver.pid()).into_iter();
    let pasta = pasta.filter(|&pid| World::program(pid).is_some_and(|program| program.starts_with("pass")));
    for pid in pasta {
        World::kill(pid);
    }
    world.until(|| driver.ok(json!("report"))["uplink_up"] == false);
}

#[test]
fn sandboxes_do_not_reach_each_other() {
    let Some(world) = World::make() else { return };
    let mut one = world.drive("tap", &rules(json!({"allow": ["198.18.0.0/15", "10.0.0.0/8"]})));
    let mut two = world.drive("tap", &rules(json!({})));
    assert_eq!(world.links().len(), 2);
    for link in world.links() {
        let inside = format!("{}:7", world.inside_of(&link));
        // Its own end is nobody's gateway; the other's is behind a table of the host.
        let error = one.error(json!({"connect": inside}));
        assert!(error == "TimedOut" || error == "ConnectionRefused", "{inside}: {error}");
    }
    assert_eq!(two.counters()["unsolicited"], 0, "it did not even get there");
    for driver in [&mut one, &mut two] {
        let connection = driver.ok(json!({"connect": "8.8.8.8:7"}));
        assert_eq!(driver.ok(json!({"ask": [connection, "both work"]})), "both work");
    }
}

#[test]
fn a_host_that_cannot_do_it_says_so() {
    let Some(world) = World::make() else { return };
    world.host("sysctl -q -w net.ipv4.ip_forward=0");
    let said = world.refused("tap", &rules(json!({})));
    assert!(said.contains("net.ipv4.ip_forward is missing") && said.contains("sysctl -w"), "{said}");
    world.host("ip route del default; ip -6 route del default");
    let said = world.refused("user", &rules(json!({})));
    assert!(said.contains("no default route"), "{said}");
    assert_eq!((world.links().len(), world.tables().len()), (0, 0));
}

/// What is not there is named, with the package that it comes with, and nothing was begun.
#[test]
fn a_host_without_the_programs_says_what_to_install() {
    let Some(world) = World::make() else { return };
    for (mode, program, package) in [
        ("tap", "nft", "nftables"),
        ("tap", "ip", "iproute2"),
        ("tap", "tc", "iproute2"),
        ("user", "nft", "nftables"),
        ("user", "pasta", "passt"),
    ] {
        let said = world.refused_without(program, mode);
        let expected =
            format!("{program} is missing: not found in PATH; install it with `apt-get install {package}`");
        assert!(said.contains(&expected), "{mode} without {program}: {said}");
    }
    let said = world.refused_without("/dev/net/tun", "user");
    assert!(said.contains("/dev/net/tun is missing") && said.contains("modprobe tun"), "{said}");
    assert_eq!((world.links().len(), world.tables().len()), (0, 0));
}
