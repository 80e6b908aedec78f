//! Any bytes in a tunnel: cut anywhere they mean the same, and nothing passes a bound: streams, windows, what comes for whom.
//!
//! Input: one byte for the size of the pieces, one whose bits say after which pieces what came is taken and what has ended
//! is released, then the messages' bytes.
#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use tiffin_gateway::tunnel::frame::{ACK, Header, Kind, RST};
use tiffin_gateway::tunnel::session::{MAX_STREAMS, Session, Streams, Violation, WINDOW};

fuzz_target!(|input: &[u8]| {
    let [step, acts, bytes @ ..] = input else { return };
    let whole = run(bytes, bytes.len().max(1), 0);
    assert_eq!(whole, run(bytes, usize::from(*step) + 1, 0));
    let _ = run(bytes, usize::from(*step) + 1, *acts);
});

/// What came, and whether it may.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Bytes that wait, and whether the end came, of each stream that is open.
    open: HashMap<u32, (u32, bool)>,
    credit: HashMap<u32, u32>,
    received: u64,
    granted: u64,
    resets: usize,
    sent: Vec<Header>,
}

impl Streams for Seen {
    fn open(&mut self, stream: u32) {
        assert_eq!(stream % 2, 1);
        assert_eq!(self.sent.last(), Some(&Header::window_update(stream, ACK, 0)));
        assert_eq!(self.open.insert(stream, (0, false)), None);
        self.credit.insert(stream, WINDOW);
        assert!(self.open.len() <= MAX_STREAMS);
    }

    fn data(&mut self, stream: u32, bytes: &[u8]) {
        let (held, ended) = self.open.get_mut(&stream).expect("data of a stream that is not open");
        assert!(!*ended && !bytes.is_empty());
        *held += u32::try_from(bytes.len()).unwrap();
        assert!(*held <= WINDOW);
        self.received += bytes.len() as u64;
    }

    fn end(&mut self, stream: u32) {
        let (_, ended) = self.open.get_mut(&stream).expect("the end of a stream that is not open");
        assert!(!std::mem::replace(ended, true));
    }

    fn reset(&mut self, stream: u32) {
        self.open.remove(&stream).expect("a reset of a stream that is not open");
        self.resets += 1;
    }

    fn credit(&mut self, stream: u32, bytes: u32) -> bool {
        let credit = self.credit.get_mut(&stream).expect("credit of a stream that never was");
        credit.checked_add(bytes).map(|grown| *credit = grown).is_some()
    }

    fn send(&mut self, header: Header) {
        let lawful = match header.kind {
            Kind::WindowUpdate if header.flags == 0 => header.length > 0 && header.length <= WINDOW,
            Kind::WindowUpdate => [ACK, RST].contains(&header.flags) && header.length == 0,
            Kind::Ping => header.flags == ACK && header.stream == 0,
            Kind::Data | Kind::GoAway => false,
        };
        assert!(lawful, "{header:?}");
        if header.kind == Kind::WindowUpdate {
            self.granted += u64::from(header.length);
        }
        self.sent.push(header);
    }
}

fn run(bytes: &[u8], step: usize, acts: u8) -> (Result<(), Violation>, Seen) {
    let (mut session, mut seen) = (Session::default(), Seen::default());
    for (at, piece) in bytes.chunks(step).enumerate() {
        if let Err(violation) = session.receive(piece, &mut seen) {
            return (Err(violation), seen);
        }
        if acts & (1 << (at % 8)) != 0 {
            for (stream, (held, ended)) in seen.open.clone() {
                session.taken(stream, held, &mut seen);
                if ended {
                    session.release(stream);
                    seen.open.remove(&stream);
                } else {
                    seen.open.insert(stream, (0, false));
                }
            }
        }
        assert_eq!(session.open_streams(), seen.open.len());
        assert!(seen.granted <= seen.received);
    }
    (Ok(()), seen)
}
