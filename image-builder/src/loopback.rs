//! A new network namespace has a loopback interface that is down; this takes it up (rtnetlink(7)).

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};

/// From `linux/netlink.h` and `linux/rtnetlink.h`.
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;
/// The first interface of every namespace.
const LOOPBACK: i32 = 1;
/// `struct nlmsghdr` and `struct ifinfomsg`.
const HEADER: usize = 16;
const LENGTH: usize = HEADER + 16;

/// Takes the loopback interface of this thread's network namespace up.
pub(crate) fn up() -> Result<(), Errno> {
    let netlink = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&netlink, &request(), SendFlags::empty(), &kernel)?;
    let mut answer = [0u8; 256];
    let (length, _) = recv(&netlink, &mut answer[..], RecvFlags::empty())?;
    match answer[..length].get(..HEADER + 4) {
        Some(message) if message[4..6] == NLMSG_ERROR.to_ne_bytes() => {
            let error = i32::from_ne_bytes([message[16], message[17], message[18], message[19]]);
            if error == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-error)) }
        }
        _ => Err(Errno::PROTO),
    }
}

fn request() -> [u8; LENGTH] {
    let mut message = [0u8; LENGTH];
    let mut put = |offset: usize, bytes: &[u8]| message[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &(LENGTH as u32).to_ne_bytes());
    put(4, &RTM_NEWLINK.to_ne_bytes());
    put(6, &(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    put(HEADER + 4, &LOOPBACK.to_ne_bytes());
    put(HEADER + 8, &IFF_UP.to_ne_bytes());
    // Of all flags only this one is changed.
    put(HEADER + 12, &IFF_UP.to_ne_bytes());
    message
}
