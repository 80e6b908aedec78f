//! The preamble of a mux session: 16 bytes, magic and generation.
//!
//! A serial port has no connections. Each side sends the preamble of its generation and discards what it reads until
//! the other side's; what comes before belongs to a session that no longer exists.

/// The size of a preamble.
pub const PREAMBLE_SIZE: usize = 16;

const MAGIC: [u8; 8] = *b"\x8aTFNMUX\n";

/// The preamble of a generation.
pub fn encode(generation: u64) -> [u8; PREAMBLE_SIZE] {
    let mut out = [0; PREAMBLE_SIZE];
    out[..8].copy_from_slice(&MAGIC);
    out[8..].copy_from_slice(&generation.to_be_bytes());
    out
}

/// Looks for the preamble of one generation, a byte at a time, so that nothing of the session behind it is consumed.
#[derive(Debug)]
pub struct Scanner {
    expected: [u8; PREAMBLE_SIZE],
    window: [u8; PREAMBLE_SIZE],
    seen: u64,
}

impl Scanner {
    /// A scanner for the preamble of `generation`.
    pub fn new(generation: u64) -> Self {
        Self { expected: encode(generation), window: [0; PREAMBLE_SIZE], seen: 0 }
    }

    /// Takes one byte; true when the preamble ends with it.
    pub fn push(&mut self, byte: u8) -> bool {
        self.window.rotate_left(1);
        self.window[PREAMBLE_SIZE - 1] = byte;
        self.seen += 1;
        self.window == self.expected
    }

    /// Bytes taken that were no part of the preamble, once it was found.
    pub fn discarded(&self) -> u64 {
        self.seen.saturating_sub(PREAMBLE_SIZE as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_bytes_and_older_generations_are_discarded() {
        let stream = [&b"half a fra"[..], &MAGIC[..5], &encode(1), &encode(2), b"session"].concat();
        let mut scanner = Scanner::new(2);
        let end = stream.iter().position(|&byte| scanner.push(byte)).unwrap();
        assert_eq!(&stream[end + 1..], b"session");
        assert_eq!(scanner.discarded(), 10 + 5 + 16);
    }
}
