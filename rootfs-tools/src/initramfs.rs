//! The guest image: an initramfs that holds one static binary.
//!
//! It is not compressed unless asked for: unpacking costs more at each boot than reading does, but less travels and lies on a
//! disk.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use oci::Digest;
use serde::Serialize;

use crate::Error;
use crate::cpio::Cpio;
use crate::error::at;
use crate::format::{Format, Sink, write_tree};
use crate::output::Output;
use crate::tree::{Attributes, Content, Directory, FileData, Node, NodeId, Place, Tree};

/// The largest binary that is taken; the agent has a few MiB, and all of it sits in the guest's RAM at boot.
const MAX_BINARY: u64 = 512 << 20;

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
    let mut tree = guest_tree(binary.len() as u64);
    let mut source: &[&[u8]] = &[&binary];
    let level = match compression {
        GuestImageCompression::None => {
            let report = write_tree(&mut tree, &Cpio, &mut source, output)?;
            return Ok(GuestImageReport { digest: report.digest, size: report.size });
        }
        GuestImageCompression::Zstd(ZstdLevel(level)) => level,
    };
    let mut file = Output::create_hashed(output)?;
    let mut archive = Memory { bytes: Vec::new(), filled: 0 };
    Cpio.prepare(&mut tree)?.write(&mut source, &mut archive, &mut |_| {})?;
    file.write(&zstd_frame(archive.written(), level).map_err(at(output))?)?;
    let size = file.position();
    let digest = file.publish_hashed()?;
    Ok(GuestImageReport { digest, size })
}

/// An archive that is compressed as a whole.
struct Memory {
    bytes: Vec<u8>,
    filled: usize,
}

impl Memory {
    fn written(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }
}

impl Sink for Memory {
    fn position(&self) -> u64 {
        self.filled as u64
    }

    fn room(&mut self, wanted: u64) -> Result<&mut [u8], Error> {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(MAX_BINARY as usize);
        self.bytes.resize(self.filled + wanted, 0);
        Ok(&mut self.bytes[self.filled..])
    }

    fn advance(&mut self, count: usize) {
        self.filled += count;
    }

    fn zeros_to(&mut self, position: u64) -> Result<(), Error> {
        // Only what aligns the entries, and the end.
        let end = self.filled.max(position as usize);
        self.bytes.truncate(self.filled);
        self.bytes.resize(end, 0);
        self.filled = end;
        Ok(())
    }
}

/// What is in the guest image: an agent of `size` bytes, which are those of source 0, and where it mounts.
pub(crate) fn guest_tree(size: u64) -> Tree {
    let mut tree = Tree::new();
    let mut add = |parent, name: &[u8], mode, content| {
        let node = tree.add(Node { attributes: Attributes { mode, ..Attributes::default() }, content });
        tree.link(parent, name, node, 0);
        node
    };
    let directory = || Content::Directory(Directory::default());
    let dev = add(NodeId::ROOT, b"dev", 0o755, directory());
    // The kernel opens it as init's stdin, stdout and stderr before anything is mounted.
    add(dev, b"console", 0o600, Content::CharDevice { major: 5, minor: 1 });
    add(NodeId::ROOT, b"proc", 0o755, directory());
    add(NodeId::ROOT, b"sys", 0o755, directory());
    let data = FileData::Whole(Place { source: 0, offset: 0 });
    add(NodeId::ROOT, b"init", 0o755, Content::File { size, data });
    tree
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
