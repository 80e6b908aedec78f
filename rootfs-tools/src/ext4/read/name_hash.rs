//! The hashes of names in indexed directories, all that Linux knows (fs/ext4/hash.c).

use crate::ext4::hash::{END_OF_DIRECTORY, transform};

/// A kind of hash, as the root of an index names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NameHash {
    kind: Kind,
    /// Whether the characters of names have a sign.
    signed: bool,
    seed: [u32; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Legacy,
    HalfMd4,
    Tea,
}

impl NameHash {
    /// The hash of `version`; `unsigned` is the superblock's flag, which the versions without a say follow.
    pub(super) fn new(version: u8, unsigned: bool, seed: [u32; 4]) -> Option<Self> {
        let kind = match version % 3 {
            0 => Kind::Legacy,
            1 => Kind::HalfMd4,
            _ => Kind::Tea,
        };
        let seed = if seed == [0; 4] { [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476] } else { seed };
        (version < 6).then_some(Self { kind, signed: version < 3 && !unsigned, seed })
    }

    /// The name's hash. Bit 0 is always clear.
    pub(super) fn of(&self, name: &[u8]) -> u32 {
        let mut state = self.seed;
        let hash = match self.kind {
            Kind::Legacy => self.legacy(name),
            Kind::HalfMd4 => {
                let mut rest = name;
                while !rest.is_empty() {
                    transform(&mut state, &self.words::<8>(rest));
                    rest = rest.get(32..).unwrap_or_default();
                }
                state[1]
            }
            Kind::Tea => {
                let mut rest = name;
                while !rest.is_empty() {
                    tea(&mut state, self.words::<4>(rest));
                    rest = rest.get(16..).unwrap_or_default();
                }
                state[0]
            }
        };
        let hash = hash & !1;
        if hash == END_OF_DIRECTORY { END_OF_DIRECTORY - 2 } else { hash }
    }

    fn widen(&self, byte: u8) -> u32 {
        if self.signed { byte as i8 as u32 } else { byte.into() }
    }

    fn words<const N: usize>(&self, rest: &[u8]) -> [u32; N] {
        let pad = (rest.len() as u32 & 0xff) * 0x0101_0101;
        let mut words = [pad; N];
        for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
            *word = bytes.iter().fold(pad, |word, &byte| (word << 8).wrapping_add(self.widen(byte)));
        }
        words
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut before, mut last) = (0x37ab_e8f9u32, 0x12a3_fe2du32);
        for &byte in name {
            let mut hash = before.wrapping_add(last ^ self.widen(byte).wrapping_mul(7_152_373));
            if hash & 0x8000_0000 != 0 {
                hash = hash.wrapping_sub(0x7fff_ffff);
            }
            (before, last) = (last, hash);
        }
        last << 1
    }
}

fn tea(state: &mut [u32; 4], [a, b, c, d]: [u32; 4]) {
    let (mut low, mut high, mut sum) = (state[0], state[1], 0u32);
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        low = low
            .wrapping_add((high << 4).wrapping_add(a) ^ high.wrapping_add(sum) ^ (high >> 5).wrapping_add(b));
        high = high
            .wrapping_add((low << 4).wrapping_add(c) ^ low.wrapping_add(sum) ^ (low >> 5).wrapping_add(d));
    }
    state[0] = state[0].wrapping_add(low);
    state[1] = state[1].wrapping_add(high);
}
