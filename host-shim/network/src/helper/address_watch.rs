//! The host's addresses, and the moment at which they are others: a lease that is renewed, a temporary address of IPv6, the
//! bridge of a container engine. What is the host's now is closed to the guest from now on.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::{Error, host};

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` of linux/rtnetlink.h.
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// What is read of a notice: only that there is one counts.
const NOTICE: usize = 256;

/// The kernel's notices, of the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct AddressWatch(OwnedFd);

impl AddressWatch {
    pub(super) fn new() -> Result<Self, Error> {
        let subscribe = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // The protocol that is none is NETLINK_ROUTE, which is 0.
            let notices = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            bind(&notices, &SocketAddrNetlink::new(0, ADDRESS_GROUPS))?;
            Ok::<_, Errno>(notices)
        };
        subscribe().map(Self).map_err(Error::io("watch the host's addresses"))
    }

    /// The host's addresses, with which all notices so far are read.
    pub(super) fn addresses(&self) -> Result<Vec<IpAddr>, Error> {
        let mut notice = [0; NOTICE];
        loop {
            match recv(&self.0, &mut notice, RecvFlags::empty()) {
                // What had no room in the socket is news, too.
                Ok(_) | Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return host::addresses(),
                Err(error) => return Err(Error::io("hear of the host's addresses")(error)),
            }
        }
    }
}

impl AsFd for AddressWatch {
    /// Readable when there may be other addresses.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
