//! What the host says of itself.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;

use crate::Error;
use crate::addresses::is_ours;
use crate::policy::{MAX_RESOLVERS, is_reachable_resolver};

/// Where a host that asks a resolver of its own on its loopback writes down whom that asks.
const RESOLV_CONF: [&str; 3] = [
    "/etc/resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    // NetworkManager's, where dnsmasq is what is asked.
    "/run/NetworkManager/no-stub-resolv.conf",
];

/// Where programs are that only an administrator has in PATH.
const ADMIN_PATH: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// All addresses of the host but its loopback's and its ends of uplinks, which are closed and come and go with sandboxes:
/// those of the calling thread's network namespace.
pub(crate) fn addresses() -> Result<Vec<IpAddr>, Error> {
    let mut found: Vec<IpAddr> = getifaddrs()
        .map_err(Error::io("list the host's addresses"))?
        .filter_map(|interface| {
            let address = interface.address?;
            let four = address.as_sockaddr_in().map(|address| address.ip().into());
            four.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
        })
        .filter(|&address: &IpAddr| !address.is_loopback() && !is_ours(address))
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The host's resolvers that a guest's questions can be sent to.
pub(crate) fn resolvers() -> Vec<IpAddr> {
    resolvers_of(&RESOLV_CONF.map(Path::new))
}

/// Those of the first file that has some.
fn resolvers_of(files: &[&Path]) -> Vec<IpAddr> {
    let texts = files.iter().filter_map(|path| std::fs::read_to_string(path).ok());
    texts.map(|text| nameservers(&text)).find(|found| !found.is_empty()).unwrap_or_default()
}

fn nameservers(resolv_conf: &str) -> Vec<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    });
    servers.filter(|&address| is_reachable_resolver(address)).take(MAX_RESOLVERS).collect()
}

/// A program in PATH, or where administrators have theirs.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(ADMIN_PATH.iter().map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_resolvers_that_others_can_ask_are_taken() {
        let text = "# nameserver 9.9.9.9\nsearch a\nnameserver 127.0.0.53\n nameserver  10.0.0.1 # x\nnameserver fe80::1%eth0\n\
                    nameserver\nnameserver 1.1.1.1\nnameserver 2001:db8::1\nnameserver 8.8.8.8\n";
        let found: Vec<_> = nameservers(text).iter().map(IpAddr::to_string).collect();
        assert_eq!(found, ["10.0.0.1", "1.1.1.1", "2001:db8::1"]);
        assert_eq!(nameservers("nameserver 127.0.0.53\n"), Vec::<IpAddr>::new());
    }

    #[test]
    fn a_resolver_on_the_hosts_loopback_is_passed_over_for_those_that_it_asks() {
        let folder = tempfile::tempdir().unwrap();
        let [stub, upstream, absent] = ["stub", "upstream", "absent"].map(|name| folder.path().join(name));
        std::fs::write(&stub, "nameserver 127.0.0.53\noptions edns0 trust-ad\n").unwrap();
        std::fs::write(&upstream, "nameserver 192.168.1.1\n").unwrap();
        let expected: IpAddr = "192.168.1.1".parse().unwrap();
        assert_eq!(resolvers_of(&[&absent, &stub, &upstream]), [expected]);
        assert_eq!(resolvers_of(&[&stub]), Vec::<IpAddr>::new());
    }
}
