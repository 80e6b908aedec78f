//! Frames that no kernel would send: a guest with a kernel of its own sends what it likes.

use std::net::IpAddr;

use sandbox_network::addresses::{GATEWAY_MAC, GUEST_MAC, GUEST4, GUEST6};
use serde::Deserialize;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a segment of TCP says of its connection, by its flag (RFC 9293).
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
enum Segment {
    /// It begins one.
    Syn = 0x02,
    /// It goes on with one.
    Ack = 0x10,
}

/// A packet to one port.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Packet {
    /// The guest's own address when absent.
    from: Option<IpAddr>,
    to: IpAddr,
    port: u16,
    /// A segment of TCP; else a datagram of UDP.
    tcp: Option<Segment>,
}

impl Packet {
    /// As many, each to the next port.
    pub(crate) fn of_ports(self, count: u16) -> impl Iterator<Item = Self> {
        (0..count).filter_map(move |index| Some(Self { port: self.port.checked_add(index)?, ..self.clone() }))
    }

    /// The frame from the guest to its gateway.
    pub(crate) fn frame(&self) -> Option<Vec<u8>> {
        let own = if self.to.is_ipv4() { GUEST4.into() } else { GUEST6.into() };
        let (from, to) = (octets(self.from.unwrap_or(own)), octets(self.to));
        let (protocol, mut payload) = match self.tcp {
            Some(segment) => (TCP, self.segment(segment)),
            None => (UDP, self.datagram()),
        };
        let length = u16::try_from(payload.len()).ok()?.to_be_bytes();
        let pseudo = [from.as_slice(), &to, &[0, protocol], &length, &payload].concat();
        let checksum = checksum(&pseudo).to_be_bytes();
        payload.get_mut(if self.tcp.is_some() { 16..18 } else { 6..8 })?.copy_from_slice(&checksum);
        let header = match self.to {
            IpAddr::V4(_) => {
                let total = (20 + u16::try_from(payload.len()).ok()?).to_be_bytes();
                let mut header =
                    [&[0x45, 0], total.as_slice(), &[0, 1, 0, 0, 64, protocol, 0, 0], &from, &to].concat();
                let checksum = self::checksum(&header).to_be_bytes();
                header.get_mut(10..12)?.copy_from_slice(&checksum);
                [&[0x08, 0x00], header.as_slice()].concat()
            }
            IpAddr::V6(_) => {
                [&[0x86, 0xdd, 0x60, 0, 0, 0], length.as_slice(), &[protocol, 64], &from, &to].concat()
            }
        };
        Some([hardware(GATEWAY_MAC)?.as_slice(), &hardware(GUEST_MAC)?, &header, &payload].concat())
    }

    fn segment(&self, says: Segment) -> Vec<u8> {
        let mut segment = [40_000u16.to_be_bytes(), self.port.to_be_bytes()].concat();
        segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, says as u8, 0xff, 0xff, 0, 0, 0, 0]);
        segment
    }

    fn datagram(&self) -> Vec<u8> {
        [40_000u16, self.port, 8, 0].map(u16::to_be_bytes).concat()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn hardware(text: &str) -> Option<Vec<u8>> {
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}
