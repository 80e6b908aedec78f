//! What has become of a sandbox's packets.

use serde::{Deserialize, Serialize};

use crate::Error;

/// What is counted, in the order in which it is told. A packet counts once.
pub(crate) const COUNTERS: [&str; 11] = [
    "sent",
    "received",
    "resolver",
    "reserved",
    "denied",
    "multicast",
    "gateway",
    "spoofed",
    "unsolicited",
    "invalid",
    "crowded",
];

/// One count since the namespace was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// What is counted: passed were `sent`, `received` and `resolver` (questions and answers); refused were those to and from
    /// `reserved` and `denied` addresses, to `multicast` and broadcast ones, to the namespace's own `gateway`, with a `spoofed`
    /// source, `unsolicited` from outside, `invalid` ones of no connection, and new connections of a `crowded` sandbox.
    pub name: String,
    /// Packets.
    pub packets: u64,
    /// Their bytes, with the headers of IP.
    pub bytes: u64,
}

/// What a network does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether there is an uplink: pasta may have died.
    pub uplink_up: bool,
    /// The counters.
    pub counters: Vec<Counter>,
}

/// Reads `nft -j list counters`.
pub(crate) fn counters(json: &str) -> Result<Vec<Counter>, Error> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Object>,
    }
    #[derive(Deserialize)]
    struct Object {
        counter: Option<Counter>,
    }
    let strange = |error: serde_json::Error| Error::Step(format!("nft said {json:?}: {error}"));
    let listing: Listing = serde_json::from_str(json).map_err(strange)?;
    let found: Vec<Counter> = listing.nftables.into_iter().filter_map(|object| object.counter).collect();
    let named = |name: &str| {
        let counter = found.iter().find(|counter| counter.name == name).cloned();
        counter.ok_or_else(|| Error::Step(format!("nft lists no counter {name}")))
    };
    COUNTERS.iter().map(|name| named(name)).collect()
}
