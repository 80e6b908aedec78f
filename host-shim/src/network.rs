//! A sandbox's network: from its spec to what the guest is told.

use std::os::fd::OwnedFd;
use std::process::Command;

use envd_proto::control::{self, Interface, Route, interface};
use sandbox_folder::network::{NetworkCounter, NetworkMode, NetworkReport, NetworkSpec};
use sandbox_network::{Missing, Network, Rate, Rules, Uplink, addresses};

use crate::Error;

/// The name of the hidden subcommand.
pub const HELPER: &str = "network-helper";

/// The guest's hardware address, with a network and without.
pub const GUEST_MAC: &str = addresses::GUEST_MAC;

/// A network that was asked for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// None.
    None,
    /// The VMM's own.
    Slirp,
    /// A namespace with rules.
    Filtered(Uplink, Rules),
}

impl Plan {
    /// Checks what a spec says.
    pub fn of(spec: &NetworkSpec) -> Result<Self, Error> {
        let uplink = match spec.mode {
            NetworkMode::User => Uplink::Pasta,
            NetworkMode::Tap => Uplink::Veth,
            NetworkMode::None | NetworkMode::Slirp => {
                if (NetworkSpec { mode: NetworkMode::None, ..spec.clone() }) != NetworkSpec::default() {
                    let reason = "there are rules, which only the modes `user` and `tap` have";
                    return Err(Error::invalid("network", reason));
                }
                return Ok(if spec.mode == NetworkMode::Slirp { Self::Slirp } else { Self::None });
            }
        };
        let rate = |wish: Option<u64>| wish.map(Rate::new).transpose();
        let rules = Rules::parse(&spec.allow, &spec.deny)?.with_resolvers(&spec.dns)?;
        let (egress, ingress) = (rate(spec.egress_bytes_per_s)?, rate(spec.ingress_bytes_per_s)?);
        Ok(Self::Filtered(uplink, Rules { egress, ingress, ..rules }))
    }

    /// Whether this host can do it. Nothing is started for it.
    pub fn check(&self) -> Result<(), Error> {
        match self {
            Self::None | Self::Slirp => Ok(()),
            Self::Filtered(uplink, _) => Ok(sandbox_network::check(*uplink)?),
        }
    }

    /// Makes the network and its TAP, where it is one of ours.
    pub(crate) async fn start(&self) -> Result<Option<(Network, OwnedFd)>, Error> {
        let Self::Filtered(uplink, rules) = self.clone() else { return Ok(None) };
        blocking(move || Ok(Some(Network::start(helper(), uplink, &rules)?))).await
    }
}

/// Ends a network, and with it every connection that it has.
pub(crate) async fn end(network: Network) -> Result<(), Error> {
    let work = move || {
        drop(network);
        Ok(())
    };
    blocking(work).await
}

/// Waits for the helper, beside the runtime's only thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, sandbox_network::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(sandbox_network::Error::Ended.into()),
    }
}

/// The command that leads to [`sandbox_network::helper::main`].
pub fn helper() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(HELPER);
    command
}

/// What this host misses for each kind of network.
pub(crate) fn missing() -> [(&'static str, Result<(), Missing>); 2] {
    let user = sandbox_network::check(Uplink::Pasta).and_then(|()| sandbox_network::try_namespaces(helper()));
    [("network user", user), ("network tap", sandbox_network::check(Uplink::Veth))]
}

/// What the guest's agent configures: the same for every sandbox, so that a resumed one has it already.
pub(crate) fn of_guest(network: &Network) -> control::Network {
    let route = |gateway: String| Route { gateway, ..Route::default() };
    control::Network {
        interfaces: vec![Interface {
            interface: Some(interface::Interface::Mac(GUEST_MAC.to_owned())),
            addresses: vec![
                format!("{}/{}", addresses::GUEST4, addresses::PREFIX_LENGTH4),
                format!("{}/{}", addresses::GUEST6, addresses::PREFIX_LENGTH6),
            ],
            routes: vec![route(addresses::GATEWAY4.to_string()), route(addresses::GATEWAY6.to_string())],
            ..Interface::default()
        }],
        dns_servers: network.guest_resolvers().iter().map(ToString::to_string).collect(),
        ..control::Network::default()
    }
}

/// What is told of a network.
pub(crate) fn report(network: NetworkSpec, report: sandbox_network::Report) -> NetworkReport {
    let counter = |counter: sandbox_network::Counter| NetworkCounter {
        name: counter.name,
        packets: counter.packets,
        bytes: counter.bytes,
    };
    let counters = report.counters.into_iter().map(counter).collect();
    NetworkReport { network, uplink_up: report.uplink_up, counters }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_checked_before_anything_starts() {
        let plan = |text: &str| Plan::of(&serde_json::from_str(text).unwrap());
        assert_eq!(plan("{}").unwrap(), Plan::None);
        assert_eq!(plan(r#"{"mode":"slirp"}"#).unwrap(), Plan::Slirp);
        let Plan::Filtered(Uplink::Pasta, rules) = plan(
            r#"{"mode":"user","allow":["10.0.0.0/8"],"ingress_bytes_per_s":1000000,"dns":["10.0.0.1"]}"#,
        )
        .unwrap() else {
            panic!("it is filtered")
        };
        assert_eq!((rules.allow.len(), rules.resolvers.len(), rules.egress), (1, 1, None));
        for (text, expected) in [
            (r#"{"allow":["10.0.0.0/8"]}"#, "only the modes `user` and `tap`"),
            (r#"{"mode":"slirp","egress_bytes_per_s":100000}"#, "only the modes"),
            (r#"{"mode":"tap","deny":["x"]}"#, "invalid denied range: expected an address"),
            (r#"{"mode":"tap","egress_bytes_per_s":0}"#, "invalid network rate"),
            (r#"{"mode":"user","dns":["127.0.0.53"]}"#, "invalid DNS server"),
        ] {
            let error = plan(text).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().contains(expected), "{text}: {error}");
        }
    }
}
