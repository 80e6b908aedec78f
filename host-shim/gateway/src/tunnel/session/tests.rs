use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::frame;
use super::*;

/// What came, as it came.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    events: Vec<String>,
    bytes: BTreeMap<u32, Vec<u8>>,
    credit: u64,
    sent: Vec<Header>,
}

impl Streams for Seen {
    fn open(&mut self, stream: u32) {
        self.events.push(format!("open {stream}"));
    }

    fn data(&mut self, stream: u32, bytes: &[u8]) {
        self.bytes.entry(stream).or_default().extend_from_slice(bytes);
    }

    fn end(&mut self, stream: u32) {
        self.events.push(format!("end {stream}"));
    }

    fn reset(&mut self, stream: u32) {
        self.events.push(format!("reset {stream}"));
    }

    fn credit(&mut self, _: u32, bytes: u32) -> bool {
        self.credit += u64::from(bytes);
        self.credit <= u64::from(u32::MAX)
    }

    fn send(&mut self, header: Header) {
        self.sent.push(header);
    }
}

fn update(stream: u32, flags: u16, credit: u32) -> Vec<u8> {
    Header::window_update(stream, flags, credit).encode().to_vec()
}

fn data(stream: u32, flags: u16, body: &[u8]) -> Vec<u8> {
    frame::data(stream, flags, body).to_vec()
}

fn after(frames: &[Vec<u8>]) -> Result<(Session, Seen), Violation> {
    let (mut session, mut seen) = (Session::default(), Seen::default());
    session.receive(&frames.concat(), &mut seen)?;
    Ok((session, seen))
}

#[test]
fn a_stream_opens_carries_and_ends_in_either_order() {
    let (mut session, seen) = after(&[
        update(1, SYN, 9),
        data(1, 0, b"CONNECT 7\n"),
        data(1, FIN, b"bye"),
        data(3, SYN | FIN, b"all"),
    ])
    .unwrap();
    assert_eq!(seen.events, ["open 1", "end 1", "open 3", "end 3"]);
    assert_eq!(seen.bytes, [(1, b"CONNECT 7\nbye".to_vec()), (3, b"all".to_vec())].into());
    assert_eq!(seen.credit, 9);
    assert_eq!(seen.sent, [Header::window_update(1, ACK, 0), Header::window_update(3, ACK, 0)]);
    assert_eq!(session.open_streams(), 2);
    let mut seen = Seen::default();
    session.release(1);
    session.release(3);
    assert_eq!(session.open_streams(), 0);
    session.receive(&[update(5, SYN, 0), update(5, FIN, 0), update(5, FIN, 0)].concat(), &mut seen).unwrap();
    assert_eq!(seen.events, ["open 5", "end 5"]);
    session.release(5);
    // Whatever was still under way.
    session.receive(&[data(5, 0, b"late"), update(5, 0, 1), update(5, RST, 0)].concat(), &mut seen).unwrap();
    assert_eq!((seen.bytes.len(), seen.events.len()), (0, 2));
    // And the same id once more.
    session.receive(&data(5, SYN, b"anew"), &mut seen).unwrap();
    assert_eq!(seen.bytes[&5], b"anew");
}

#[test]
fn a_reset_is_no_end() {
    let frames = [
        update(1, SYN, 0),
        update(3, SYN, 0),
        data(1, RST, b"lost"),
        update(3, RST | FIN, 9),
        update(5, RST, 0),
    ];
    let (session, seen) = after(&frames).unwrap();
    assert_eq!(seen.events, ["open 1", "open 3", "reset 1", "reset 3"]);
    assert_eq!((session.open_streams(), seen.bytes.len()), (0, 0));
}

#[test]
fn credit_is_given_back_for_what_was_taken() {
    let full = vec![0; WINDOW as usize];
    let (mut session, mut seen) = after(&[update(1, SYN, 0), data(1, 0, &full)]).unwrap();
    assert_eq!(
        session.receive(&data(1, 0, b"x"), &mut seen),
        Err(Violation::Window { stream: 1, length: 1, window: 0 })
    );
    let (mut session, mut seen) = after(&[update(1, SYN, 0), data(1, 0, &full)]).unwrap();
    session.taken(1, CREDIT_STEP - 1, &mut seen);
    assert_eq!(seen.sent.len(), 1);
    session.taken(1, 1, &mut seen);
    assert_eq!(seen.sent[1], Header::window_update(1, 0, CREDIT_STEP));
    session.receive(&data(1, FIN, &full[..CREDIT_STEP as usize]), &mut seen).unwrap();
    // Nobody needs it any more.
    session.taken(1, WINDOW, &mut seen);
    assert_eq!(seen.sent.len(), 2);
}

#[test]
fn one_stream_too_many_is_refused_alone() {
    let opens: Vec<_> = (0..MAX_STREAMS as u32 + 3).map(|n| update(2 * n + 1, SYN, 0)).collect();
    let (mut session, mut seen) = after(&opens).unwrap();
    assert_eq!(session.open_streams(), MAX_STREAMS);
    let refused: Vec<_> = seen.sent.iter().filter(|header| header.flags == RST).map(|h| h.stream).collect();
    assert_eq!(refused, [257, 259, 261]);
    session.receive(&data(257, 0, b"CONNECT 1\n"), &mut seen).unwrap();
    assert!(seen.bytes.is_empty());
    session.release(1);
    session.receive(&update(263, SYN, 0), &mut seen).unwrap();
    assert_eq!(seen.events.last().unwrap(), "open 263");
}

#[test]
fn pings_are_answered_and_a_client_may_leave() {
    let ping = |flags, length| Header { kind: Kind::Ping, flags, stream: 0, length }.encode().to_vec();
    let leave = Header { kind: Kind::GoAway, flags: 0, stream: 0, length: 0 }.encode().to_vec();
    let (mut session, mut seen) = after(&[ping(SYN, 7), ping(ACK, 9), update(1, SYN, 0), leave]).unwrap();
    assert_eq!(seen.sent[0], Header { kind: Kind::Ping, flags: ACK, stream: 0, length: 7 });
    assert_eq!(seen.sent.len(), 2);
    assert!(!session.is_over());
    session.receive(&update(3, SYN, 0), &mut seen).unwrap();
    assert_eq!(seen.sent[2], Header::window_update(3, RST, 0));
    session.release(1);
    assert!(session.is_over());
}

#[test]
fn what_a_client_must_not_send_ends_the_session() {
    let open = update(1, SYN, 0);
    for (frames, expected) in [
        (vec![update(2, SYN, 0)], Violation::Id { stream: 2 }),
        (vec![data(0, 0, b"")], Violation::Id { stream: 0 }),
        (vec![open.clone(), open.clone()], Violation::Twice { stream: 1 }),
        (vec![open.clone(), data(1, FIN, b""), data(1, 0, b"x")], Violation::Ended { stream: 1 }),
        (
            vec![open.clone(), data(1, 0, b"")[..8].to_vec(), vec![0xff; 4]],
            Violation::Window { stream: 1, length: u32::MAX, window: WINDOW },
        ),
        (
            vec![data(9, 0, b"")[..8].to_vec(), vec![0xff; 4]],
            Violation::Window { stream: 9, length: u32::MAX, window: WINDOW },
        ),
        (vec![open.clone(), update(1, 0, u32::MAX), update(1, 0, 1)], Violation::Credit { stream: 1 }),
        (vec![b"GET / HTTP/1.1\r\n".to_vec()], Violation::Version { version: b'G' }),
    ] {
        assert_eq!(after(&frames).err(), Some(expected));
    }
}

proptest! {
    #[test]
    fn how_the_bytes_are_cut_does_not_matter(
        bodies in prop::collection::vec((0u32..4, 0u16..16, prop::collection::vec(any::<u8>(), 0..40)), 0..30),
        step in 1usize..50,
    ) {
        let bytes: Vec<u8> = bodies.iter().flat_map(|(n, flags, body)| data(2 * n + 1, *flags, body)).collect();
        let (mut whole, mut pieces) = (Seen::default(), Seen::default());
        let mut session = Session::default();
        let at_once = session.receive(&bytes, &mut whole);
        let mut session = Session::default();
        let cut = bytes.chunks(step).try_for_each(|chunk| session.receive(chunk, &mut pieces));
        prop_assert_eq!(at_once, cut);
        prop_assert_eq!(whole, pieces);
    }

    #[test]
    fn hostile_bytes_never_panic_or_pass_a_bound(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (mut session, mut seen) = (Session::default(), Seen::default());
        // Most random headers are no frames: these are.
        let frames: Vec<u8> = bytes.chunks(8).flat_map(|part| {
            let at = |n: usize| part.get(n).copied().unwrap_or_default();
            [0, at(0) % 4, 0, at(1) % 16, 0, 0, 0, at(2), 0, at(3) % 8, at(4), at(5)]
        }).collect();
        let _ = Session::default().receive(&bytes, &mut Seen::default());
        let _ = session.receive(&frames, &mut seen);
        prop_assert!(session.open_streams() <= MAX_STREAMS);
        prop_assert!(seen.bytes.values().all(|bytes| !bytes.is_empty()));
    }
}
