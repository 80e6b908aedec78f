//! A spawner that is in a tenant's hands: any datagrams at all while the agent waits for starts of its own.
//!
//! Input: one byte for how many descriptors come along, then datagrams, each behind a byte with its length.
#![no_main]

use std::cell::RefCell;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use envd::spawner::{Launch, Spawner};
use futures::future::join_all;
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::runtime::{Builder, Runtime};

/// Starts that wait; their ids are 1 to this.
const STARTS: usize = 3;

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(Builder::new_current_thread().enable_all().build().unwrap());
}

fuzz_target!(|input: &[u8]| {
    let Some((&descriptors, mut datagrams)) = input.split_first() else { return };
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            let (near, far) = Spawner::socketpair().unwrap();
            let spawner = Spawner::connect(near).unwrap();
            let starts = join_all((0..STARTS).map(|_| start(&spawner)));
            let hostile = async {
                for _ in 0..STARTS {
                    take_request(&far).await;
                }
                while let Some((&length, rest)) = datagrams.split_first() {
                    let (datagram, rest) = rest.split_at(usize::from(length).min(rest.len()));
                    datagrams = rest;
                    answer(&far, datagram, usize::from(descriptors % 4));
                    tokio::task::yield_now().await;
                }
                drop(far);
            };
            // Every start comes to an end, at the latest with the spawner's.
            let (ended, ()) = tokio::join!(starts, hostile);
            assert_eq!(ended.len(), STARTS);
            assert!(!start(&spawner).await, "it is gone");
        });
    });
});

async fn start(spawner: &Spawner) -> bool {
    let null = std::fs::File::open("/dev/null").unwrap();
    let launch = Launch {
        programs: vec![b"/bin/true".to_vec()],
        argv: vec![b"true".to_vec()],
        env: vec![],
        cwd: b"/".to_vec(),
        credentials: None,
        oom_score_adj: None,
        terminal: false,
        rlimits: vec![],
        nice: None,
        stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
        cgroup: None,
    };
    match spawner.launch(launch).await {
        Ok(launched) => launched.exit.await.is_ok(),
        Err(_) => false,
    }
}

async fn take_request(socket: &OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 64];
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::DONTWAIT) {
            Ok(_) => return,
            Err(rustix::io::Errno::AGAIN) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

fn answer(socket: &OwnedFd, datagram: &[u8], descriptors: usize) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // Readable only when the other side is: taken for a pidfd, it would be waited for without an end.
    let fds = vec![socket.as_fd(); descriptors];
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    // An agent that has given up on its spawner reads no more.
    let _ =
        sendmsg(socket, &[IoSlice::new(datagram)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}
