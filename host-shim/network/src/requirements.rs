//! Whether a host can do it, found out before anything is started.

use std::fs::File;
use std::process::{Command, Stdio};

use crate::host;
use crate::policy::Uplink;

/// What a host misses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} is missing: {remedy}")]
pub struct Missing {
    /// What is not there.
    pub what: String,
    /// How to get it.
    pub remedy: String,
}

fn missing(what: &str, remedy: impl Into<String>) -> Missing {
    Missing { what: what.to_owned(), remedy: remedy.into() }
}

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Where interfaces for guests are made.
const TUN: &str = "/dev/net/tun";

/// Says what this host misses for networks with such an uplink. Nothing is started for it.
pub fn check(uplink: Uplink) -> Result<(), Missing> {
    let programs: &[(&str, &str)] = match uplink {
        Uplink::Veth => &[("nft", "nftables"), ("ip", "iproute2"), ("tc", "iproute2")],
        Uplink::Pasta => &[("nft", "nftables"), ("ip", "iproute2"), ("tc", "iproute2"), ("pasta", "passt")],
    };
    for (program, package) in programs {
        if host::program(program).is_none() {
            let remedy =
                format!("not found in PATH; install it with `apt-get install {package}` (Debian, Ubuntu)");
            return Err(missing(program, remedy));
        }
    }
    if let Err(error) = File::options().read(true).write(true).open(TUN) {
        let remedy = format!(
            "it cannot be opened ({error}): `modprobe tun`, and `chmod 666 {TUN}` for ordinary users, as udev does it"
        );
        return Err(missing(TUN, remedy));
    }
    match uplink {
        Uplink::Veth => {
            if ![CAP_NET_ADMIN, CAP_SYS_ADMIN].into_iter().all(has_capability) {
                let remedy =
                    "a network with --network tap is made by root; an ordinary user has --network user";
                return Err(missing("CAP_NET_ADMIN with CAP_SYS_ADMIN", remedy));
            }
            if !is_on("/proc/sys/net/ipv4/ip_forward") {
                let remedy = "the host does not forward packets: `sysctl -w net.ipv4.ip_forward=1`";
                return Err(missing("net.ipv4.ip_forward", remedy));
            }
            Ok(())
        }
        Uplink::Pasta => {
            let off = |file: &str| std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "0");
            for (file, name) in [
                ("/proc/sys/user/max_user_namespaces", "user.max_user_namespaces=10000"),
                ("/proc/sys/kernel/unprivileged_userns_clone", "kernel.unprivileged_userns_clone=1"),
            ] {
                if off(file) {
                    return Err(missing("user namespaces", format!("switched off: `sysctl -w {name}`")));
                }
            }
            Ok(())
        }
    }
}

/// Whether an ordinary user may make the namespaces of [`Uplink::Pasta`]: some systems have a policy against it. `helper` is
/// as in [`crate::Network::start`].
pub fn try_namespaces(mut helper: Command) -> Result<(), Missing> {
    let tried = helper.arg(crate::helper::PROBE).stdin(Stdio::null()).stdout(Stdio::null()).output();
    let reason = match tried {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    let remedy = format!(
        "they cannot be made ({reason}): see kernel.apparmor_restrict_unprivileged_userns and the seccomp profile that \
         this runs under"
    );
    Err(missing("user namespaces", remedy))
}

pub(crate) fn is_on(file: &str) -> bool {
    std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
}

fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    u64::from_str_radix(effective.trim(), 16).is_ok_and(|set| set >> number & 1 == 1)
}
