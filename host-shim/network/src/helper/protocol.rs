//! What owner and helper say to each other: a message of JSON at a time over a socket that keeps their borders.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Report, Rules};

/// The longest message: two full lists of the longest ranges take 100 KiB, and the kernel's default buffer has 200.
const MAX_MESSAGE: usize = 160 << 10;

/// How long an answer may take. Making a network was seen to take a tenth of a second on a busy machine.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// What the owner wants.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// A network, once. Its answer has the TAP.
    Make(Rules),
    /// Other rules.
    Change(Rules),
    /// The counters.
    Report,
}

/// What became of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Report(Report),
    Failed(String),
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

/// The owner's end, and the one that becomes the helper's standard input.
pub(crate) fn pair() -> Result<(Channel, OwnedFd), Error> {
    let make = || {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&near, Timeout::Recv, Some(ANSWER_DEADLINE))?;
        Ok::<_, rustix::io::Errno>((near, far))
    };
    let (near, far) = make().map_err(Error::io("make a socket"))?;
    Ok((Channel(near), far))
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// The helper's end.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(crate) fn send<T: Serialize>(&self, message: &T, fd: Option<&OwnedFd>) -> Result<(), Error> {
        let text = serde_json::to_vec(message).map_err(|error| Error::Step(error.to_string()))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(AsFd::as_fd);
        if fds.is_some() && !ancillary.push(SendAncillaryMessage::ScmRights(fds.as_slice())) {
            return Err(Error::Step("a descriptor has no room in its message".to_owned()));
        }
        match sendmsg(&self.0, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(Error::Ended),
            Err(error) => Err(Error::io("send a message")(error)),
        }
    }

    /// The next message, and the descriptor with it; `None` at the end.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Option<OwnedFd>)>, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = vec![0; MAX_MESSAGE];
        let received = loop {
            let mut into = [IoSliceMut::new(&mut buffer)];
            match recvmsg(&self.0, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                received => break received.map_err(Error::io("receive a message"))?,
            }
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let message = buffer.get(..received.bytes).unwrap_or_default();
        let message = serde_json::from_slice(message).map_err(|error| Error::Step(error.to_string()))?;
        Ok(Some((message, fd)))
    }
}
