//! The guest image: an initramfs that holds one static binary.
//!
//! The format is the kernel's Documentation/driver-api/early-userspace/buffer-format.rst ("newc" cpio). It is not compressed unless
//! asked for: unpacking costs more at each boot than reading does, but less travels and lies on a disk.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use oci::Digest;
use serde::Serialize;

use crate::Error;
use crate::error::at;
use crate::output::Output;

/// The largest binary that is taken; the agent has a few MiB, and all of it sits in the guest's RAM at boot.
const MAX_BINARY: u64 = 512 << 20;

/// The archive ends at a multiple of this, as GNU cpio's does.
const ARCHIVE_BLOCK: usize = 512;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_CHAR_DEVICE: u32 = 0o020_000;
const TYPE_FILE: u32 = 0o100_000;

/// How a guest image is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestImageCompression {
    /// Not at all.
    #[default]
    None,
    /// One zstd frame, for kernels with `CONFIG_RD_ZSTD`.
    Zstd(ZstdLevel),
}

/// A level of zstd, from 1 to 19: those above want a window that not every kernel unpacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZstdLevel(i32);

impl ZstdLevel {
    /// Of 1 to 19.
    pub fn new(level: u8) -> Option<Self> {
        (1..=19).contains(&level).then(|| Self(level.into()))
    }
}

impl Default for ZstdLevel {
    /// The highest: it is packed once and unpacked at each boot, which takes the same time at every level.
    fn default() -> Self {
        Self(19)
    }
}

/// What [`guest_image()`] made.
#[derive(Clone, Debug, Serialize)]
pub struct GuestImageReport {
    /// Digest of the file.
    pub digest: Digest,
    /// Length of the file in bytes.
    pub size: u64,
}

/// Writes an initramfs with the binary `envd` as `/init`, not compressed. The same binary gives the same bytes.
///
/// The binary must be a statically linked ELF file: the guest image has no loader and no libraries.
pub fn guest_image(envd: &Path, output: &Path) -> Result<GuestImageReport, Error> {
    guest_image_compressed(envd, GuestImageCompression::None, output)
}

/// As [`guest_image()`]. The same binary and compression give the same bytes (of one version of zstd).
pub fn guest_image_compressed(
    envd: &Path,
    compression: GuestImageCompression,
    output: &Path,
) -> Result<GuestImageReport, Error> {
    let binary = read_static_binary(envd)?;
    let mut file = Output::create_hashed(output)?;
    let archive = archive_of(&binary);
    match compression {
        GuestImageCompression::None => file.write(&archive)?,
        GuestImageCompression::Zstd(ZstdLevel(level)) => {
            file.write(&zstd_frame(&archive, level).map_err(at(output))?)?;
        }
    }
    let size = file.position();
    let digest = file.publish_hashed()?;
    Ok(GuestImageReport { digest, size })
}

fn archive_of(binary: &[u8]) -> Vec<u8> {
    let mut archive = Archive { bytes: Vec::new(), inode: 0 };
    archive.entry("dev", TYPE_DIRECTORY | 0o755, 2, (0, 0), &[]);
    // The kernel opens it as init's stdin, stdout and stderr before anything is mounted.
    archive.entry("dev/console", TYPE_CHAR_DEVICE | 0o600, 1, (5, 1), &[]);
    archive.entry("init", TYPE_FILE | 0o755, 1, (0, 0), binary);
    archive.entry("proc", TYPE_DIRECTORY | 0o755, 2, (0, 0), &[]);
    archive.entry("sys", TYPE_DIRECTORY | 0o755, 2, (0, 0), &[]);
    archive.inode = 0;
    archive.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
    archive.align(ARCHIVE_BLOCK);
    archive.bytes
}

/// One frame with its length and a checksum, made by one thread: more would cut it elsewhere on another machine.
fn zstd_frame(bytes: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    compressor.include_checksum(true)?;
    compressor.compress(bytes)
}

/// The agent's binary, checked: it runs where there is no loader.
pub(crate) fn read_static_binary(envd: &Path) -> Result<Vec<u8>, Error> {
    let mut binary = Vec::new();
    let file = File::open(envd).map_err(at(envd))?;
    file.take(MAX_BINARY + 1).read_to_end(&mut binary).map_err(at(envd))?;
    let refuse = |reason: String| Error::Invalid { what: envd.display().to_string(), reason };
    if binary.len() as u64 > MAX_BINARY {
        return Err(refuse(format!("the binary has more than {MAX_BINARY} bytes")));
    }
    check_static_elf(&binary).map_err(|reason| refuse(reason.to_owned()))?;
    Ok(binary)
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, links: u32, device: (u32, u32), data: &[u8]) {
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            // MAX_BINARY fits the format's 32 bits.
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.inode += 1;
        let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        self.bytes.extend_from_slice(format!("070701{header}{name}\0").as_bytes());
        self.align(4);
        self.bytes.extend_from_slice(data);
        self.align(4);
    }

    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

/// Checks that `binary` is an ELF file that needs no loader (ELF-64, System V ABI).
fn check_static_elf(binary: &[u8]) -> Result<(), &'static str> {
    const PT_INTERP: u32 = 3;
    const NOT_ELF: &str = "not a 64-bit little-endian ELF program (expected the envd binary for the guest)";
    let word = |at: usize| binary.get(at..)?.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    let half = |at: usize| binary.get(at..)?.first_chunk::<2>().map(|bytes| u16::from_le_bytes(*bytes));
    if binary.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(NOT_ELF);
    }
    let (Some(table), Some(size), Some(count)) = (word(0x20), half(0x36), half(0x38)) else {
        return Err(NOT_ELF);
    };
    for index in 0..u64::from(count) {
        let at = table.checked_add(index * u64::from(size)).and_then(|at| usize::try_from(at).ok());
        let Some(kind) = at.and_then(|at| binary.get(at..)?.first_chunk::<4>()) else { return Err(NOT_ELF) };
        if u32::from_le_bytes(*kind) == PT_INTERP {
            return Err(
                "dynamically linked, but the guest image has no loader and no libraries: build it with \
                 RUSTFLAGS=\"-C target-feature=+crt-static\" and an explicit --target",
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_are_taken() {
        let mut elf = vec![0u8; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x20] = 64;
        elf[0x36] = 56;
        elf[0x38] = 1;
        elf[64] = 1;
        assert_eq!(check_static_elf(&elf), Ok(()));
        elf[64] = 3;
        assert!(check_static_elf(&elf).unwrap_err().contains("crt-static"));
        elf[0x20..0x28].fill(0xff);
        assert!(check_static_elf(&elf).is_err(), "a table beyond the end");
        for bad in [&b""[..], b"#!/bin/sh", b"\x7fELF\x02\x01"] {
            assert!(check_static_elf(bad).is_err());
        }
    }
}
