//! Waiting for the end of a process that is not a child.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits until the process behind a pidfd has ended; its status is its parent's.
pub(crate) async fn ended(pidfd: OwnedFd) -> io::Result<()> {
    #[expect(
        deprecated,
        reason = "unsound only for types that lend out other descriptors: an OwnedFd is its own"
    )]
    let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    pidfd.readable().await.map(drop)
}
