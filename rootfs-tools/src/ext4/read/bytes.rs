//! Little-endian fields of on-disk structures. What lies behind the end of a structure reads as zero, as in a shorter
//! version of it.

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

/// A number whose halves are apart.
pub(super) fn split(bytes: &[u8], low: usize, high: usize) -> u64 {
    u64::from(le32(bytes, low)) | u64::from(le32(bytes, high)) << 32
}

/// A 32-bit number whose halves are apart.
pub(super) fn split32(bytes: &[u8], low: usize, high: usize) -> u32 {
    u32::from(le16(bytes, low)) | u32::from(le16(bytes, high)) << 16
}

/// Bytes of fixed length.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    field(bytes, at)
}
