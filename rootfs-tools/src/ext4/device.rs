//! Device numbers as inodes hold them.

/// The largest major number that fits (12 bits).
const MAX_MAJOR: u32 = 0xfff;

/// The largest minor number that fits (20 bits).
const MAX_MINOR: u32 = 0xf_ffff;

/// The first two words of `i_block` for a device, or `None` when the number is one that Linux cannot hold.
pub(super) fn encode(major: u32, minor: u32) -> Option<[u32; 2]> {
    if major > MAX_MAJOR || minor > MAX_MINOR {
        None
    } else if major < 256 && minor < 256 {
        // include/linux/kdev_t.h, old_encode_dev: such numbers live in the first word.
        Some([major << 8 | minor, 0])
    } else {
        // new_encode_dev, in the second word.
        Some([0, minor & 0xff | major << 8 | (minor & !0xff) << 12])
    }
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn numbers_of_every_size() {
        assert_eq!(encode(1, 3), Some([0x0103, 0]));
        assert_eq!(encode(255, 255), Some([0xffff, 0]));
        assert_eq!(encode(8, 256), Some([0, 0x0010_0800]));
        assert_eq!(encode(0xfff, 0xf_ffff), Some([0, 0xffff_ffff]));
        assert_eq!(encode(0x1000, 0), None);
        assert_eq!(encode(0, 0x10_0000), None);
    }
}
