//! The TCP ports where programs of the machine listen.
//!
//! The kernel has no event for listen(2), so whoever wants changes reads its table again and again. In the table the
//! listening sockets come first: reading ends at the first that is not one, however many connections there are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::events::Port;

/// The tables, one for each family, of the calling thread's network namespace.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];

/// Listening sockets that are told; a program with more has no use for the list.
const MAX_PORTS: usize = 1024;

/// `TCP_LISTEN` as the tables have it.
const LISTEN: &str = "0A";

/// A socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Listener {
    address: SocketAddr,
    inode: u64,
}

/// The ports where programs listen, without the agent's own. At most [`MAX_PORTS`].
pub(crate) fn ports() -> io::Result<BTreeSet<Port>> {
    let mut found = Vec::new();
    for path in TABLES {
        match File::open(path) {
            Ok(table) => read(BufReader::new(table), &mut found)?,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{path}: {error}"))),
        }
    }
    if !found.is_empty() {
        let own = own_sockets()?;
        found.retain(|listener| !own.contains(&listener.inode));
    }
    let port = |listener: Listener| Port { address: listener.address.ip(), port: listener.address.port() };
    Ok(found.into_iter().map(port).collect())
}

/// An address where a program listens on this port, for ports that no loopback address reaches.
pub(crate) fn address_of(port: u16) -> io::Result<Option<SocketAddr>> {
    let found = ports()?.into_iter().find(|found| found.port == port);
    Ok(found.map(|found| SocketAddr::new(found.address, port)))
}

fn read(table: impl BufRead, found: &mut Vec<Listener>) -> io::Result<()> {
    for line in table.lines().skip(1) {
        let line = line?;
        match parse(&line) {
            Some(listener) if found.len() < MAX_PORTS => found.push(listener),
            _ => break,
        }
    }
    Ok(())
}

/// `sl local_address rem_address st ... inode` (proc(5)), when it listens.
fn parse(line: &str) -> Option<Listener> {
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    if fields.nth(1)? != LISTEN {
        return None;
    }
    let inode = fields.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(Listener { address: SocketAddr::new(parse_address(address)?, port), inode })
}

/// Words of four bytes, each in the machine's own order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let mut bytes = [0; 16];
    let words = text.len() / 8;
    if !text.is_ascii() || !matches!(words, 1 | 4) || !text.len().is_multiple_of(8) {
        return None;
    }
    for (word, to) in bytes.chunks_exact_mut(4).take(words).enumerate() {
        let value = u32::from_str_radix(text.get(word * 8..word * 8 + 8)?, 16).ok()?;
        to.copy_from_slice(&value.to_ne_bytes());
    }
    Some(match words {
        1 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
        _ => IpAddr::V6(Ipv6Addr::from(bytes)),
    })
}

/// The inodes of the agent's own sockets.
fn own_sockets() -> io::Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        // A descriptor can be closed before it was read.
        let Ok(link) = fs::read_link(entry?.path()) else { continue };
        let inode: Option<u64> =
            link.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        found.extend(inode);
    }
    Ok(found)
}

/// What has changed between two looks: opened, closed.
pub(crate) fn changes(before: &BTreeSet<Port>, now: &BTreeSet<Port>) -> (Vec<Port>, Vec<Port>) {
    (now.difference(before).copied().collect(), before.difference(now).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    #[test]
    fn the_kernels_table_is_understood() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
           0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 20745 1 0 100 0 0 10 0\n\
           1: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 7 1 0\n\
           2: 0100007F:1F91 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 9 1 0 100 0 0 10 0\n\
           3: 0100007F:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 8 1 0 100 0 0 10 0\n";
        let mut found = Vec::new();
        read(table.as_bytes(), &mut found).unwrap();
        let found: Vec<_> = found.iter().map(|one| (one.address.to_string(), one.inode)).collect();
        assert_eq!(found, [("127.0.0.1:8080".to_owned(), 20745), ("[::1]:22".to_owned(), 7)]);
        for hostile in
            ["", "x", "0: 0100007:1 0 0A", "0: äääää:1F90 0 0A 0 0 0 0 0 1", "0: 0100007F:1F90 0 0A"]
        {
            assert_eq!(parse(hostile), None, "{hostile}");
        }
    }

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn programs_are_seen_and_the_agent_itself_is_not() {
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mine = Port { address: Ipv4Addr::LOCALHOST.into(), port: own.local_addr().unwrap().port() };
        assert!(!ports().unwrap().contains(&mine));
        // The same socket in a child's hands alone is a program's.
        let child =
            Command::new("sleep").arg("60").stdin(Stdio::from(std::os::fd::OwnedFd::from(own))).spawn();
        let _child = Killed(child.unwrap());
        let now = ports().unwrap();
        assert!(now.contains(&mine));
        assert_eq!(address_of(mine.port).unwrap(), Some(SocketAddr::new(mine.address, mine.port)));
        let mut before = now.clone();
        before.remove(&mine);
        assert_eq!(changes(&before, &now), (vec![mine], vec![]));
        assert_eq!(changes(&now, &before), (vec![], vec![mine]));
    }
}
