//! rtnetlink: the few messages that a static configuration needs.
//!
//! ```text
//! u32 length  u16 type  u16 flags  u32 sequence  u32 port   nlmsghdr
//! a struct of the message's kind                            ifinfomsg, ifaddrmsg, rtmsg
//! { u16 length  u16 type  value, padded to 4 }*             attributes
//! ```
//!
//! Numbers are in the machine's own order. Source: rtnetlink(7), netlink(7), `linux/rtnetlink.h`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_GETLINK: u16 = 18;
pub(super) const RTM_NEWADDR: u16 = 20;
pub(super) const RTM_DELADDR: u16 = 21;
pub(super) const RTM_GETADDR: u16 = 22;
pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_GETROUTE: u16 = 26;

/// With [`NLM_F_REPLACE`] absent: what exists is an error.
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_REPLACE: u16 = 0x100;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSGERR_ATTR_MSG: u16 = 1;

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;

/// The kernel fills dumps up to 32 KiB when the reader has the room.
const BUFFER: usize = 32 << 10;

/// A dump of a machine with more than this is not of our making.
const MAX_DUMP: usize = 16 << 20;

/// A dump that changes under our eyes is taken again.
const DUMP_ATTEMPTS: usize = 5;

/// A socket to the kernel's routing of the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        // No protocol is NETLINK_ROUTE, which is 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        // An old kernel explains nothing, and works.
        let _ = envd_sys::explain_netlink_errors(socket.as_fd());
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a message and waits for the kernel's acknowledgement.
    pub(super) fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let sequence = self.send(kind, flags | NLM_F_ACK, body)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..count]) {
                if message.sequence == sequence && message.kind == NLMSG_ERROR {
                    return message.acknowledged();
                }
            }
        }
    }

    /// All objects of a kind, as bodies of messages that would make them again.
    pub(super) fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(objects) = self.dump_once(kind, body)? {
                return Ok(objects);
            }
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "the network changes faster than it can be read"))
    }

    fn dump_once(&mut self, kind: u16, body: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
        let sequence = self.send(kind, NLM_F_DUMP, body)?;
        let mut buffer = vec![0; BUFFER];
        let (mut objects, mut size, mut whole) = (Vec::new(), 0, true);
        loop {
            let count = self.receive(&mut buffer)?;
            for message in Messages(&buffer[..count]).filter(|message| message.sequence == sequence) {
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return Ok(whole.then_some(objects)),
                    NLMSG_ERROR => message.acknowledged()?,
                    _ => {
                        size += message.body.len();
                        if size > MAX_DUMP {
                            return Err(io::Error::new(
                                io::ErrorKind::FileTooLarge,
                                format!("the kernel's answer is longer than {MAX_DUMP} bytes"),
                            ));
                        }
                        objects.push(message.body.to_vec());
                    }
                }
            }
        }
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<u32> {
        self.sequence += 1;
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(body);
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(self.sequence)
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
                Ok((count, _)) => return Ok(count),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Appends an attribute to a message's body.
pub(super) fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Ours are addresses and numbers, far below u16.
    let length = (ATTRIBUTE_HEADER + value.len()) as u16;
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The value of an attribute behind a struct of `skip` bytes.
pub(super) fn find(body: &[u8], skip: usize, wanted: u16) -> Option<&[u8]> {
    let mut rest = body.get(skip..)?;
    while let Some(header) = rest.first_chunk::<ATTRIBUTE_HEADER>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & 0x3fff;
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// A number in a message.
pub(super) fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Message<'_> {
    /// What an NLMSG_ERROR says: nothing, or the error with the kernel's explanation.
    fn acknowledged(&self) -> io::Result<()> {
        let Some(code) = number(self.body, 0) else { return Err(io::ErrorKind::InvalidData.into()) };
        let errno = (code as i32).wrapping_neg();
        if errno == 0 {
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(errno);
        let explained = match self.flags & NLM_F_ACK_TLVS {
            0 => None,
            _ => find(self.body, size_of::<u32>() + HEADER, NLMSGERR_ATTR_MSG),
        };
        Err(match explained {
            Some(text) => {
                let text = String::from_utf8_lossy(text);
                io::Error::new(error.kind(), format!("{error}: {}", text.trim_end_matches('\0')))
            }
            None => error,
        })
    }
}

/// The messages of a datagram; ends at what is malformed.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = usize::try_from(number(self.0, 0)?).ok()?;
        let types = number(self.0, 4)?.to_ne_bytes();
        let body = self.0.get(HEADER..length)?;
        let message = Message {
            kind: u16::from_ne_bytes([types[0], types[1]]),
            flags: u16::from_ne_bytes([types[2], types[3]]),
            sequence: number(self.0, 8)?,
            body,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_are_found_behind_their_struct() {
        let mut body = vec![9; 8];
        attribute(&mut body, 3, b"eth0\0");
        attribute(&mut body, 4, &1500u32.to_ne_bytes());
        assert_eq!(find(&body, 8, 3), Some(&b"eth0\0"[..]));
        assert_eq!(find(&body, 8, 4).and_then(|value| number(value, 0)), Some(1500));
        assert_eq!(find(&body, 8, 5), None);
    }

    proptest! {
        #[test]
        fn malformed_answers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for message in Messages(&bytes) {
                let _ = message.acknowledged();
                let _ = find(message.body, 4, 1);
            }
        }
    }
}
