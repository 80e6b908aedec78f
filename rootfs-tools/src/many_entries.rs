//! A layer of ten million entries, made on the way: the largest that is taken, and what happens beyond.

use std::fs;
use std::io::{self, Read};

use oci::layer::{LayerReader, MAX_ENTRIES};

use crate::Error;
use crate::apply::Applier;

/// What the layer would have.
const ENTRIES: u64 = 10_000_000;

/// Entries in each of its directories.
const IN_DIRECTORY: u64 = 1000;

/// The bound for a build, as the README states it.
const MEMORY: u64 = (64 << 20) + 256 * MAX_ENTRIES;

const HEADER: usize = 512;

/// Headers of empty files, with nothing between them: the least that a layer says about an entry. It is seen at once whether
/// somebody reads on behind an error.
struct Headers {
    header: [u8; HEADER],
    next: u64,
    left: usize,
}

impl Headers {
    fn new() -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_path("00000/00000000").unwrap();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(0);
        header.set_cksum();
        Self { header: *header.as_bytes(), next: 0, left: 0 }
    }

    /// The name of the next entry, and the checksum that follows from it.
    fn advance(&mut self) {
        let name = format!("{:05}/{:08}", self.next / IN_DIRECTORY, self.next);
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let old = sum(&self.header[..name.len()]);
        self.header[..name.len()].copy_from_slice(name.as_bytes());
        let text = String::from_utf8_lossy(&self.header[148..155]).into_owned();
        let checksum = u32::from_str_radix(text.trim(), 8).unwrap() + sum(name.as_bytes()) - old;
        self.header[148..155].copy_from_slice(format!("{checksum:07o}").as_bytes());
        self.next += 1;
        self.left = HEADER;
    }
}

impl Read for Headers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            if self.next == ENTRIES {
                return Ok(0);
            }
            self.advance();
        }
        let count = buffer.len().min(self.left);
        let from = HEADER - self.left;
        buffer[..count].copy_from_slice(&self.header[from..from + count]);
        self.left -= count;
        Ok(count)
    }
}

/// What this process had in memory at the most.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "two thousand million bytes of headers take 40 s unoptimised: run it with --release"
)]
fn ten_million_entries_end_at_the_limit() {
    let mut headers = Headers::new();
    let mut applier = Applier::new();
    let error = applier.apply("sha256:many", &mut LayerReader::new(&mut headers)).unwrap_err();
    assert!(matches!(&error, Error::Image(oci::Error::Corrupt { .. })), "{error:?}");
    assert!(error.to_string().contains(&format!("more than {MAX_ENTRIES} entries")), "{error}");
    assert_eq!(headers.next, MAX_ENTRIES + 1, "nothing is read behind the limit");
    let (tree, _) = applier.finish();
    assert!(tree.len() as u64 > MAX_ENTRIES, "all entries up to it were there");
    let peak = peak();
    assert!(peak < MEMORY, "{} MiB, expected less than {}", peak >> 20, MEMORY >> 20);
    eprintln!("{} MiB for {MAX_ENTRIES} entries; the bound is {} MiB", peak >> 20, MEMORY >> 20);
}

/// What a global header gives to every entry counts for each of them, so that few entries reach the limit, and the memory
/// is bounded all the same.
#[test]
fn what_all_entries_inherit_counts_for_each() {
    const VALUE: usize = 64 << 10;
    let key = format!("SCHILY.xattr.user.note={}\n", "v".repeat(VALUE));
    let digits = (key.len() + 1 + 5).to_string();
    assert_eq!(digits.len(), 5);
    let record = format!("{digits} {key}");
    let mut header = tar::Header::new_ustar();
    header.set_path("pax_global_header").unwrap();
    header.set_entry_type(tar::EntryType::XGlobalHeader);
    header.set_size(record.len() as u64);
    header.set_cksum();
    let mut global = header.as_bytes().to_vec();
    global.extend_from_slice(record.as_bytes());
    global.resize(global.len().next_multiple_of(HEADER), 0);
    let mut headers = Headers::new();
    let stream = (&global[..]).chain(&mut headers);
    let error = Applier::new().apply("sha256:many", &mut LayerReader::new(stream)).unwrap_err();
    assert!(error.to_string().contains(&format!("more than {MAX_ENTRIES} entries")), "{error}");
    // An entry of 128 bytes for each 128 that are inherited.
    let weight = 1 + VALUE as u64 / 128;
    assert!(headers.next <= MAX_ENTRIES / weight + 2, "{} entries were read", headers.next);
    assert!(peak() < MEMORY, "{} MiB", peak() >> 20);
}
