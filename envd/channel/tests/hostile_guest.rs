//! The host's end of a mux session whose other end is in a tenant's hands: what it says costs bounded memory, and what no
//! agent says ends the session, and nothing else.

use std::io;
use std::time::Duration;

use envd_channel::mux::{MAX_OPEN_STREAMS, MAX_UNREAD_FRAMES, Mux, MuxStream};
use envd_channel::preamble::{self, PREAMBLE_SIZE};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const GENERATION: u64 = 7;

/// Only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a stream may be sent before anything of it is read (yamux, `DEFAULT_CREDIT`).
const WINDOW: usize = 256 << 10;

const DATA: u8 = 0;
const WINDOW_UPDATE: u8 = 1;
const PING: u8 = 2;
const GO_AWAY: u8 = 3;
const SYN: u16 = 1;
const ACK: u16 = 2;
const RST: u16 = 8;

fn header(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let mut out = vec![0, kind];
    out.extend(flags.to_be_bytes());
    out.extend(stream.to_be_bytes());
    out.extend(length.to_be_bytes());
    out
}

fn data(stream: u32, body: &[u8]) -> Vec<u8> {
    [&header(DATA, 0, stream, body.len() as u32), body].concat()
}

/// A session whose guest says what it is told to. What the host says is thrown away.
struct Session {
    mux: Mux,
    guest: tokio::io::WriteHalf<DuplexStream>,
    host_says: tokio::task::JoinHandle<u64>,
}

async fn session() -> Session {
    let (host, mut guest) = tokio::io::duplex(64 << 10);
    guest.write_all(&preamble::encode(GENERATION)).await.unwrap();
    let mux = Mux::connect(host, GENERATION).await.unwrap();
    let (mut read, write) = tokio::io::split(guest);
    let host_says =
        tokio::spawn(
            async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await.unwrap_or_default() },
        );
    Session { mux, guest: write, host_says }
}

impl Session {
    /// Opens a number of streams; the guest acknowledges each.
    async fn open(&mut self, count: u32) -> Vec<MuxStream> {
        let mut streams = Vec::new();
        for n in 0..count {
            streams.push(self.mux.open(49_983).await.unwrap());
            self.guest.write_all(&header(WINDOW_UPDATE, ACK, 2 * n + 1, 0)).await.unwrap();
        }
        streams
    }

    /// Why it ended.
    async fn reason(&self) -> String {
        let mut broken = self.mux.broken();
        let broken = tokio::time::timeout(PATIENCE, broken.wait_for(Option::is_some)).await;
        broken.expect("the session ends").unwrap().clone().unwrap()
    }
}

/// Sends what a guest says on a session with two streams; gives why it ended.
async fn end_of(says: &[u8]) -> String {
    let mut session = session().await;
    let mut streams = session.open(2).await;
    // It may end before all is said.
    let _ = session.guest.write_all(says).await;
    let reason = session.reason().await;
    for stream in &mut streams {
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "its streams end with it");
    }
    assert!(session.mux.open(49_983).await.is_err() && session.mux.is_ended());
    reason
}

#[tokio::test]
async fn what_no_agent_says_ends_the_session_with_a_reason() {
    for (says, expected) in [
        (header(DATA, SYN, 2, 0), "the guest opened the stream 2"),
        (header(WINDOW_UPDATE, SYN, 4, 0), "the guest opened the stream 4"),
        (header(DATA, SYN, 1, 0), "the guest opened the stream 1"),
        (data(5, b"x"), "on the stream 5, which was never opened"),
        (data(2, b"x"), "on the stream 2, which was never opened"),
        (data(0, b"x"), "on the stream 0, which was never opened"),
        (header(WINDOW_UPDATE, RST, u32::MAX, 0), "on the stream 4294967295, which was never opened"),
        (header(DATA, 0, 1, u32::MAX), "too large"),
        (header(DATA, 0, 1, (1 << 20) + 1), "too large"),
        (header(7, 0, 1, 0), "unknown"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "unknown"),
        (header(GO_AWAY, 0, 0, 0), "closed"),
        (header(PING, ACK, 0, 77), "broke the rules of yamux"),
    ] {
        let reason = end_of(&says).await;
        assert!(reason.contains(expected), "{says:?}: {reason}");
    }
}

#[tokio::test]
async fn a_hundred_thousand_opens_end_at_the_first() {
    let flood: Vec<u8> = (1..=100_000u32).flat_map(|n| header(WINDOW_UPDATE, SYN, 2 * n, 0)).collect();
    assert!(end_of(&flood).await.contains("the guest opened the stream 2"));
}

#[tokio::test]
async fn more_than_a_window_ends_the_session() {
    let flood = [data(1, &vec![0; WINDOW]), data(1, b"x")].concat();
    assert!(end_of(&flood).await.contains("broke the rules of yamux"));
    // And credit beyond what there can be.
    let credit = header(WINDOW_UPDATE, 0, 1, u32::MAX);
    assert!(end_of(&credit).await.contains("broke the rules of yamux"));
}

#[tokio::test]
async fn a_cut_inside_of_a_frame_ends_the_session() {
    for cut in [1, 11, 12, 15] {
        let mut session = session().await;
        let _streams = session.open(1).await;
        session.guest.write_all(&data(1, b"body")[..cut]).await.unwrap();
        session.guest.shutdown().await.unwrap();
        let reason = session.reason().await;
        assert!(reason.contains("unexpected end of file"), "{cut}: {reason}");
    }
}

/// A stream whose reader waits for something else holds no more than its window however small its frames are, and what is
/// cut when they are too many is the stream that has the most.
#[tokio::test(flavor = "multi_thread")]
async fn frames_of_single_bytes_cut_the_worst_stream_and_no_other() {
    let mut session = session().await;
    let mut streams = session.open(3).await;
    let before = resident();
    let said = async {
        for (stream, frames) in [(1, WINDOW), (3, WINDOW - 1), (5, 10)] {
            let frames: Vec<u8> = data(stream, b"x").repeat(frames);
            session.guest.write_all(&frames).await.unwrap();
        }
        // Together these are too many. On what is cut by then more can be said, which nobody keeps.
        session.guest.write_all(&data(1, &[b'y'; 1000]).repeat(2000)).await.unwrap();
        session.guest.write_all(&data(5, b"the end")).await.unwrap();
    };
    tokio::time::timeout(PATIENCE, said).await.expect("the host reads on");
    const { assert!(2 * WINDOW - 1 + 10 > MAX_UNREAD_FRAMES) };
    let mut last = [0; 17];
    tokio::time::timeout(PATIENCE, streams[2].read_exact(&mut last)).await.unwrap().unwrap();
    assert_eq!(&last, b"xxxxxxxxxxthe end");
    let grown = resident().saturating_sub(before);
    assert!(grown < 128 << 20, "{} MiB", grown >> 20);
    let error = streams[0].read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(streams[0].write(b"x").await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let mut rest = vec![0; WINDOW - 1];
    streams[1].read_exact(&mut rest).await.unwrap();
    assert!(rest.iter().all(|&byte| byte == b'x'), "nothing of another stream was lost");
    assert!(!session.mux.is_ended());
}

/// What is read makes room: a stream of small frames whose reader keeps up is never cut.
#[tokio::test]
async fn small_frames_that_are_read_cut_nothing() {
    let mut session = session().await;
    let mut stream = session.open(1).await.remove(0);
    let chunk = data(1, b"x").repeat(WINDOW / 4);
    let mut buffer = vec![0; WINDOW / 4];
    for _ in 0..12 {
        let (said, read) = tokio::join!(session.guest.write_all(&chunk), stream.read_exact(&mut buffer));
        said.unwrap();
        read.unwrap();
    }
    const { assert!(12 * (WINDOW / 4) > MAX_UNREAD_FRAMES) };
    assert!(!session.mux.is_ended());
}

/// Streams that the host has dropped cost nothing, also when the guest reads nothing, so that no reset can be sent.
#[tokio::test]
async fn a_guest_that_never_reads_fills_nothing() {
    let (read, mut guest) = tokio::io::duplex(64 << 10);
    let (write, _unread) = tokio::io::duplex(PREAMBLE_SIZE);
    guest.write_all(&preamble::encode(GENERATION)).await.unwrap();
    let mux = Mux::connect(tokio::io::join(read, write), GENERATION).await.unwrap();
    let short = Duration::from_millis(50);
    for _ in 0..4 {
        // Whoever waits for a stream can give up.
        let _ = tokio::time::timeout(short, mux.open(1)).await;
    }
    let before = resident();
    for n in 0..100 * (WINDOW / 1000) {
        // Of those that were opened, the first surely was.
        guest.write_all(&data(1, &[n as u8; 1000])).await.unwrap();
    }
    assert!(!mux.is_ended(), "{:?}", mux.broken().borrow());
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 << 20, "{} MiB", grown >> 20);
}

#[tokio::test]
async fn a_preamble_that_never_ends_keeps_nothing() {
    let (host, mut guest) = tokio::io::duplex(64 << 10);
    let connecting = tokio::spawn(Mux::connect(host, GENERATION));
    let before = resident();
    let garbage = [preamble::encode(GENERATION - 1), preamble::encode(GENERATION + 1)].concat().repeat(1024);
    for _ in 0..64 {
        guest.write_all(&garbage).await.unwrap();
    }
    assert!(!connecting.is_finished(), "it waits for its own");
    let grown = resident().saturating_sub(before);
    assert!(grown < 1 << 20, "{} MiB", grown >> 20);
    guest.write_all(&preamble::encode(GENERATION)).await.unwrap();
    tokio::time::timeout(PATIENCE, connecting).await.unwrap().unwrap().unwrap();
}

/// Every stream has its whole window unread: the most that a session holds.
#[tokio::test]
async fn all_windows_full_are_what_the_limits_say() {
    let mut session = session().await;
    let streams = session.open(MAX_OPEN_STREAMS as u32).await;
    let before = resident();
    for n in 0..MAX_OPEN_STREAMS as u32 {
        for _ in 0..WINDOW / (16 << 10) {
            session.guest.write_all(&data(2 * n + 1, &[0; 16 << 10])).await.unwrap();
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < MAX_OPEN_STREAMS * WINDOW + (32 << 20), "{} MiB", grown >> 20);
    assert!(!session.mux.is_ended(), "{:?}", session.mux.broken().borrow());
    drop(streams);
    drop(session.guest);
    drop(session.mux);
    session.host_says.await.unwrap();
}

/// Resident bytes of this process; a test is one.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// A frame that is near to what an agent says.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let body = prop::collection::vec(any::<u8>(), 0..40);
    let stream = prop_oneof![8 => 1u32..8, 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(0u16), 3 => Just(ACK), 2 => 4u16..16, 1 => any::<u16>()];
    let length = prop_oneof![4 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (0u8..5, flags, stream, length, body).prop_map(|(kind, flags, stream, length, body)| {
        let length = length.unwrap_or(if kind == DATA { body.len() as u32 } else { 1 });
        [header(kind, flags, stream, length), if kind == DATA { body } else { Vec::new() }].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a guest says, in whatever pieces: its streams come to an end, and the session with them.
    #[test]
    fn any_frames_come_to_an_end(
        frames in prop::collection::vec(frame(), 0..40),
        step in 1usize..200,
        drop_one in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut session = session().await;
            let mut streams = session.open(3).await;
            if drop_one {
                streams.remove(0);
            }
            let reading: Vec<_> = streams
                .into_iter()
                .map(|mut stream| {
                    tokio::spawn(async move {
                        let _ = stream.write_all(b"a request").await;
                        let mut all = Vec::new();
                        let _ = stream.read_to_end(&mut all).await;
                        all.len()
                    })
                })
                .collect();
            let said = frames.concat();
            for piece in said.chunks(step) {
                if session.guest.write_all(piece).await.is_err() {
                    break;
                }
            }
            let _ = session.guest.shutdown().await;
            session.reason().await;
            for reader in reading {
                let read = tokio::time::timeout(PATIENCE, reader).await.expect("an end").unwrap();
                assert!(read <= said.len());
            }
        });
    }
}
