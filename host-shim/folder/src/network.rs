//! The network of a sandbox: what a caller asks for, and what is told of it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The way out of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// There is none.
    #[default]
    None,
    /// The VMM makes the guest's connections its own (QEMU's user networking). The guest reaches all that the shim's user
    /// does, services on the host's loopback too, as 10.0.2.2: only for guests that keep their tenants from that. Such a
    /// sandbox is not paused or snapshotted.
    Slirp,
    /// A filtered network whose connections are made by pasta: for an ordinary user.
    User,
    /// A filtered network that the host's kernel routes: for root.
    Tap,
}

/// The network of a sandbox. Without rules the internet is open, and the host with all its addresses, other sandboxes and
/// every private, link-local and special range are closed. Of several ranges that have an address the longest prefix decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSpec {
    /// The way out.
    pub mode: NetworkMode,
    /// Addresses and ranges that are open although they would be closed: 10.1.0.0/16, 2001:db8::1. An address of the host
    /// is opened by itself only, not by a range.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Those that are closed although they would be open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// What the guest may send, in bytes per second; unlimited when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_bytes_per_s: Option<u64>,
    /// What the guest may be sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_bytes_per_s: Option<u64>,
    /// Resolvers, at most 3, which are asked whether they are open or closed; the host's when there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
}

impl NetworkSpec {
    /// Whether it asks for nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// `POST /network`: other rules for a sandbox that runs. What is absent stays; lists are replaced as a whole. Answered with
/// a [`NetworkReport`], as `GET /network` is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkRequest {
    /// As in the spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
    /// As in the spec. Connections to what is closed now are reset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deny: Option<Vec<String>>,
    /// As in the spec; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress_bytes_per_s: Option<u64>,
    /// As in the spec; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_bytes_per_s: Option<u64>,
    /// As in the spec; those that it has stay when the list is empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Vec<String>>,
}

impl NetworkRequest {
    /// What a network of these rules becomes.
    pub fn over(self, now: &NetworkSpec) -> NetworkSpec {
        let rate = |wish: Option<u64>, now| match wish {
            None => now,
            Some(0) => None,
            limit => limit,
        };
        NetworkSpec {
            mode: now.mode,
            allow: self.allow.unwrap_or_else(|| now.allow.clone()),
            deny: self.deny.unwrap_or_else(|| now.deny.clone()),
            egress_bytes_per_s: rate(self.egress_bytes_per_s, now.egress_bytes_per_s),
            ingress_bytes_per_s: rate(self.ingress_bytes_per_s, now.ingress_bytes_per_s),
            dns: self.dns.unwrap_or_else(|| now.dns.clone()),
        }
    }
}

/// What a sandbox's network does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// Its rules.
    pub network: NetworkSpec,
    /// Whether it has its way out.
    pub uplink_up: bool,
    /// What has become of packets since the sandbox was started or resumed.
    pub counters: Vec<NetworkCounter>,
}

/// Packets of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkCounter {
    /// The kind: passed were `sent`, `received` and `resolver`; refused were those to and from `reserved` and `denied`
    /// addresses, to `multicast` and broadcast ones, to the `gateway` itself, `spoofed`, `unsolicited`, `invalid` (of no
    /// connection, as those of an earlier life), and of a `crowded` sandbox.
    pub name: String,
    /// How many.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_changes_what_it_names() {
        let now = NetworkSpec {
            mode: NetworkMode::Tap,
            allow: vec!["10.0.0.0/8".into()],
            egress_bytes_per_s: Some(1),
            ingress_bytes_per_s: Some(2),
            ..NetworkSpec::default()
        };
        assert_eq!(NetworkRequest::default().over(&now), now);
        let wish: NetworkRequest =
            serde_json::from_str(r#"{"allow":[],"deny":["1.1.1.1"],"egress_bytes_per_s":0}"#).unwrap();
        let expected = NetworkSpec {
            allow: Vec::new(),
            deny: vec!["1.1.1.1".into()],
            egress_bytes_per_s: None,
            ..now.clone()
        };
        assert_eq!(wish.over(&now), expected);
    }
}
