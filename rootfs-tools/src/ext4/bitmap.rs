//! Block and inode bitmaps.

use std::ops::Range;

use super::BLOCK_SIZE;

/// A bitmap of one block.
pub(super) struct Bitmap(Vec<u8>);

impl Bitmap {
    /// A bitmap with nothing in use.
    pub(super) fn new() -> Self {
        Self(vec![0; BLOCK_SIZE])
    }

    /// Marks `bits` as used.
    pub(super) fn mark(&mut self, bits: Range<usize>) {
        for bit in bits {
            self.0[bit / 8] |= 1 << (bit % 8);
        }
    }

    /// The block.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_little_endian() {
        let mut bitmap = Bitmap::new();
        bitmap.mark(3..10);
        bitmap.mark(32767..32768);
        assert_eq!(bitmap.bytes()[..2], [0b1111_1000, 0b11]);
        assert_eq!(bitmap.bytes()[4095], 0x80);
        assert_eq!(bitmap.bytes().iter().map(|byte| byte.count_ones()).sum::<u32>(), 8);
    }
}
