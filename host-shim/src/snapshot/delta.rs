//! `ram.delta`: the pages of a VM's RAM that differ from its base.
//!
//! ```text
//! header   4096 bytes   magic "TIFDELTA", version (u32), bytes of a page (u32), bytes of RAM (u64), zeros
//! pages    4096 each    the contents of the runs of kind 0
//! runs     24 each      first page (u64), which of the contents is its first (u64), pages (u32),
//!                       kind (u32): 0 has contents, 1 is all zero (and its second number is 0)
//! trailer  24 bytes     number of runs (u64), number of pages with contents (u64), magic "ATLEDFIT"
//! ```
//!
//! Integers are little-endian; runs are sorted and do not overlap, their contents are in any order. It is no sparse file on purpose: tools that copy turn
//! blocks of zeros into holes and holes into blocks, and here neither would mean anything. The runs come last so that
//! it is written in one pass, by several threads, while the vCPUs stand still.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::{GuestMemory, PAGE_SIZE, PageRange};
use super::{Error, parallel, sparse};

const MAGIC: &[u8; 8] = b"TIFDELTA";
const END_MAGIC: &[u8; 8] = b"ATLEDFIT";
const VERSION: u32 = 1;
const HEADER: u64 = PAGE_SIZE;
const RUN: u64 = 24;
const TRAILER: u64 = 24;

/// Pages that are moved at once.
const PIECE: u64 = sparse::CHUNK / PAGE_SIZE;

/// Runs that are read at once.
const RUNS_PIECE: u64 = 4096;

/// What [`save_delta`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaSaved {
    /// Pages that the VMM had of its own.
    pub private_pages: u64,
    /// Pages of which the file has the contents; the others were zero.
    pub data_pages: u64,
    /// Length of the file.
    pub size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
}

/// Consecutive pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u64,
    /// The first of its pages among all pages with contents; 0 where it has none.
    at: u64,
    count: u32,
    kind: Kind,
}

impl Run {
    fn end(&self) -> u64 {
        self.first.saturating_add(u64::from(self.count))
    }

    fn encode(&self) -> [u8; RUN as usize] {
        let mut bytes = [0; RUN as usize];
        bytes[..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.at.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20] = match self.kind {
            Kind::Data => 0,
            Kind::Zero => 1,
        };
        bytes
    }

    fn decode(bytes: &[u8; RUN as usize]) -> Result<Self, String> {
        let (words, _) = bytes.as_chunks::<8>();
        let [first, at, rest] = [0, 1, 2].map(|index| u64::from_le_bytes(words[index]));
        // The lower half of a little-endian word comes first.
        let kind = match rest >> 32 {
            0 => Kind::Data,
            1 => Kind::Zero,
            other => return Err(format!("a run of kind {other}, expected 0 or 1")),
        };
        Ok(Self { first, at, count: rest as u32, kind })
    }
}

/// Writes the private pages of `memory` to the empty file `out`; `path` names it in errors.
///
/// Pages that equal the base's are not looked for: reading the base takes as long as reading the VMM, and of 3343 pages
/// that a guest had written 45 were as they had been.
pub fn save_delta(memory: &GuestMemory, out: &File, path: &Path) -> Result<DeltaSaved, Error> {
    save_pages(memory, &memory.private_pages()?, out, path)
}

fn save_pages(
    memory: &GuestMemory,
    private: &[PageRange],
    out: &File,
    path: &Path,
) -> Result<DeltaSaved, Error> {
    let private_pages = private.iter().map(|range| range.count).sum();
    let needed = Some(private_pages * PAGE_SIZE);
    let write = |bytes: &[u8], at: u64| out.write_all_at(bytes, at).map_err(Error::write(path, needed));

    write(&header(memory.size()), 0)?;
    let pieces = pieces(private);
    let data_pages = AtomicU64::new(0);
    let runs = parallel::for_each(pieces.len(), Vec::new, |data, index| {
        let mut runs = read_piece(memory, &pieces[index], data).map_err(Error::io("read", memory.path()))?;
        let first = data_pages.fetch_add(data.len() as u64 / PAGE_SIZE, Ordering::Relaxed);
        for run in runs.iter_mut().filter(|run| run.kind == Kind::Data) {
            run.at += first;
        }
        write(data, HEADER + first * PAGE_SIZE)?;
        Ok(runs)
    })?;
    let data_pages = data_pages.into_inner();
    let mut table: Vec<u8> = runs.into_iter().flatten().flat_map(|run| run.encode()).collect();
    let runs = table.len() as u64 / RUN;
    table.extend(trailer(runs, data_pages));
    write(&table, HEADER + data_pages * PAGE_SIZE)?;
    let size = HEADER + data_pages * PAGE_SIZE + table.len() as u64;
    Ok(DeltaSaved { private_pages, data_pages, size })
}

/// The same pages, in pieces of at most [`PIECE`].
fn pieces(ranges: &[PageRange]) -> Vec<Vec<PageRange>> {
    let mut pieces: Vec<Vec<PageRange>> = Vec::new();
    let mut room = 0;
    for range in ranges {
        let (mut first, mut count) = (range.first, range.count);
        while count > 0 {
            if room == 0 {
                pieces.push(Vec::new());
                room = PIECE;
            }
            let taken = count.min(room);
            if let Some(piece) = pieces.last_mut() {
                piece.push(PageRange { first, count: taken });
            }
            first += taken;
            count -= taken;
            room -= taken;
        }
    }
    pieces
}

/// Reads a piece; leaves the contents of its runs in `bytes`. Where they are is counted from there.
fn read_piece(memory: &GuestMemory, piece: &[PageRange], bytes: &mut Vec<u8>) -> io::Result<Vec<Run>> {
    const PAGE: usize = PAGE_SIZE as usize;
    let pages: u64 = piece.iter().map(|range| range.count).sum();
    bytes.resize(pages as usize * PAGE, 0);
    let (mut runs, mut read, mut kept) = (Vec::<Run>::new(), 0, 0);
    for range in piece {
        let end = read + range.count as usize * PAGE;
        memory.read(&mut bytes[read..end], range.first * PAGE_SIZE)?;
        for (page, at) in (range.first..).zip((read..end).step_by(PAGE)) {
            let (kind, contents) = match sparse::is_zero(&bytes[at..at + PAGE]) {
                true => (Kind::Zero, 0),
                false => (Kind::Data, kept / PAGE),
            };
            if kind == Kind::Data {
                bytes.copy_within(at..at + PAGE, kept);
                kept += PAGE;
            }
            match runs.last_mut() {
                Some(last) if last.end() == page && last.kind == kind => last.count += 1,
                _ => runs.push(Run { first: page, at: contents as u64, count: 1, kind }),
            }
        }
        read = end;
    }
    bytes.truncate(kept);
    Ok(runs)
}

/// Writes the pages of `delta` into the private mapping of a stopped VMM; a file that is not sound is refused before the
/// first write. Returns the number of pages. After an error of the system the VMM's RAM is useless.
pub fn apply_delta(delta: &File, path: &Path, memory: &GuestMemory) -> Result<u64, Error> {
    let corrupt = |reason: String| Error::corrupt(path, reason);
    let layout = Layout::read(delta, memory.size()).map_err(Fault::at(path))?;
    let mut checked = Reader::new(delta, layout);
    while checked.next().map_err(Fault::at(path))?.is_some() {}

    // Checked once more on the way, so that not even a file that changes meanwhile writes elsewhere.
    let mut runs = Reader::new(delta, layout);
    let mut buffer = vec![0; sparse::CHUNK as usize];
    let mut pages = 0;
    while let Some(run) = runs.next().map_err(Fault::at(path))? {
        let (mut page, mut position) = (run.first, HEADER + run.at * PAGE_SIZE);
        while page < run.end() {
            let bytes = &mut buffer[..((run.end() - page).min(PIECE) * PAGE_SIZE) as usize];
            match run.kind {
                Kind::Zero => bytes.fill(0),
                Kind::Data => {
                    delta.read_exact_at(bytes, position).map_err(|error| match error.kind() {
                        io::ErrorKind::UnexpectedEof => {
                            corrupt("it was truncated while it was read".to_owned())
                        }
                        _ => Error::io("read", path)(error),
                    })?;
                    position += bytes.len() as u64;
                }
            }
            memory.write(bytes, page * PAGE_SIZE).map_err(Error::io("write", memory.path()))?;
            page += bytes.len() as u64 / PAGE_SIZE;
        }
        pages += u64::from(run.count);
    }
    Ok(pages)
}

fn header(ram: u64) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&ram.to_le_bytes());
    bytes
}

fn trailer(runs: u64, data_pages: u64) -> [u8; TRAILER as usize] {
    let mut bytes = [0; TRAILER as usize];
    bytes[..8].copy_from_slice(&runs.to_le_bytes());
    bytes[8..16].copy_from_slice(&data_pages.to_le_bytes());
    bytes[16..].copy_from_slice(END_MAGIC);
    bytes
}

/// What is wrong with a delta.
enum Fault {
    Corrupt(String),
    Version(u32),
    Io(io::Error),
}

impl Fault {
    fn at(path: &Path) -> impl Fn(Self) -> Error {
        let path = path.to_owned();
        move |fault| match fault {
            Self::Corrupt(reason) => Error::corrupt(&path, reason),
            Self::Version(found) => {
                let reason = format!(
                    "it has version {found}, this program reads {VERSION}: use the host-shim of that version"
                );
                Error::unsupported(&path, reason)
            }
            Self::Io(error) => Error::io("read", &path)(error),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Where the parts of a delta are.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ram_pages: u64,
    runs: u64,
    runs_at: u64,
    data_pages: u64,
}

impl Layout {
    /// Checks all but the runs.
    fn read(delta: &File, ram: u64) -> Result<Self, Fault> {
        let length = delta.metadata()?.len();
        if length < HEADER + TRAILER {
            let reason = format!("{length} bytes, expected at least {}: it was truncated", HEADER + TRAILER);
            return Err(Fault::Corrupt(reason));
        }
        let mut found = [0; HEADER as usize];
        delta.read_exact_at(&mut found, 0)?;
        if found[..8] != *MAGIC {
            return Err(Fault::Corrupt("expected a delta of RAM, got a file of another kind".to_owned()));
        }
        let [.., v0, v1, v2, v3] = found[..12] else { unreachable!("12 bytes have a last four") };
        match u32::from_le_bytes([v0, v1, v2, v3]) {
            VERSION => {}
            other => return Err(Fault::Version(other)),
        }
        if found != header(ram) {
            let reason = format!("its header does not say pages of {PAGE_SIZE} bytes and {ram} bytes of RAM");
            return Err(Fault::Corrupt(reason));
        }
        let mut end = [0; TRAILER as usize];
        delta.read_exact_at(&mut end, length - TRAILER)?;
        let (numbers, _) = end.as_chunks::<8>();
        let (runs, data_pages) = (u64::from_le_bytes(numbers[0]), u64::from_le_bytes(numbers[1]));
        if numbers[2] != *END_MAGIC {
            return Err(Fault::Corrupt("its end is missing: it was truncated".to_owned()));
        }
        let pages = data_pages.checked_mul(PAGE_SIZE);
        let table = runs.checked_mul(RUN);
        let expected = pages
            .zip(table)
            .and_then(|(pages, table)| HEADER.checked_add(pages)?.checked_add(table)?.checked_add(TRAILER));
        if expected != Some(length) {
            let reason = format!("{length} bytes do not hold {runs} runs and {data_pages} pages");
            return Err(Fault::Corrupt(reason));
        }
        let runs_at = length - TRAILER - runs * RUN;
        Ok(Self { ram_pages: ram / PAGE_SIZE, runs, runs_at, data_pages })
    }
}

/// The runs of a delta, each checked against the one before.
struct Reader<'a> {
    delta: &'a File,
    layout: Layout,
    piece: Vec<u8>,
    next: u64,
    end: u64,
    data_pages: u64,
}

impl<'a> Reader<'a> {
    fn new(delta: &'a File, layout: Layout) -> Self {
        Self { delta, layout, piece: Vec::new(), next: 0, end: 0, data_pages: 0 }
    }

    fn next(&mut self) -> Result<Option<Run>, Fault> {
        let Layout { ram_pages, runs, runs_at, data_pages } = self.layout;
        if self.next == runs {
            if self.data_pages != data_pages {
                let reason = format!("its runs have {} pages, expected {data_pages}", self.data_pages);
                return Err(Fault::Corrupt(reason));
            }
            return Ok(None);
        }
        let inside = self.next % RUNS_PIECE;
        if inside == 0 {
            self.piece.resize(((runs - self.next).min(RUNS_PIECE) * RUN) as usize, 0);
            self.delta.read_exact_at(&mut self.piece, runs_at + self.next * RUN)?;
        }
        let (entries, _) = self.piece.as_chunks::<{ RUN as usize }>();
        let run = Run::decode(&entries[inside as usize]).map_err(Fault::Corrupt)?;
        let contents = match run.kind {
            Kind::Data => run.at.checked_add(u64::from(run.count)).is_some_and(|end| end <= data_pages),
            Kind::Zero => run.at == 0,
        };
        if !contents {
            let reason = format!("run {} has its contents at {} of {data_pages} pages", self.next, run.at);
            return Err(Fault::Corrupt(reason));
        }
        if run.count == 0 || run.first < self.end || run.end() > ram_pages {
            let reason = format!(
                "run {} is of {} pages from {}, expected one or more in {} to {ram_pages}",
                self.next, run.count, run.first, self.end
            );
            return Err(Fault::Corrupt(reason));
        }
        self.next += 1;
        self.end = run.end();
        if run.kind == Kind::Data {
            self.data_pages += u64::from(run.count);
        }
        Ok(Some(run))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::test_vmm::TestVmm;

    const RAM_PAGES: u64 = 700;

    fn file_of(pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(RAM_PAGES * PAGE_SIZE).unwrap();
        for (page, byte) in pages {
            // Not all of a page, so that it is told apart by its last byte too.
            file.write_all_at(&[*byte], page * PAGE_SIZE + u64::from(*byte)).unwrap();
            file.write_all_at(&[*byte], (page + 1) * PAGE_SIZE - 1).unwrap();
        }
        file
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    fn save(ram: &File, private: &[PageRange]) -> (File, DeltaSaved) {
        let out = tempfile::tempfile().unwrap();
        let memory = GuestMemory::of_file(ram.try_clone().unwrap());
        let saved = save_pages(&memory, private, &out, Path::new("/s/ram.delta")).unwrap();
        assert_eq!(out.metadata().unwrap().len(), saved.size);
        (out, saved)
    }

    /// A VM that was restored from the base only.
    fn restored(base: &File) -> GuestMemory {
        let ram = tempfile::tempfile().unwrap();
        ram.write_all_at(&contents(base), 0).unwrap();
        GuestMemory::of_file(ram)
    }

    fn ram_of(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; memory.size() as usize];
        memory.read(&mut bytes, 0).unwrap();
        bytes
    }

    fn apply(delta: &File, memory: &GuestMemory) -> Result<u64, Error> {
        apply_delta(delta, Path::new("/s/ram.delta"), memory)
    }

    #[test]
    fn the_format_changes_only_on_purpose() {
        let base = file_of(&[(3, 1), (4, 1), (600, 9)]);
        let ram = file_of(&[(3, 1), (5, 2), (6, 2), (600, 9)]);
        let (delta, saved) = save(&ram, &[range(4, 3), range(9, 1)]);
        assert_eq!(saved, DeltaSaved { private_pages: 4, data_pages: 2, size: 4096 * 3 + 3 * 24 + 24 });
        let bytes = contents(&delta);
        assert_eq!(&bytes[..24], b"TIFDELTA\x01\0\0\0\0\x10\0\0\0\xc0\x2b\0\0\0\0\0");
        assert!(bytes[4096..3 * 4096] == contents(&ram)[5 * 4096..7 * 4096]);
        let runs = &bytes[3 * 4096..];
        assert_eq!(&runs[..24], b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x01\0\0\0", "4, zero");
        assert_eq!(&runs[24..48], b"\x05\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0", "5 and 6");
        assert_eq!(&runs[48..72], b"\x09\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x01\0\0\0", "9, zero");
        assert_eq!(&runs[72..], b"\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0ATLEDFIT");
        let memory = restored(&base);
        assert_eq!(apply(&delta, &memory).unwrap(), 4);
        assert!(ram_of(&memory) == contents(&ram));
    }

    #[test]
    fn a_real_process_becomes_another_ones_copy() {
        let filled = [(2, 0x77), (3, 0x77), (900, 0x77)];
        let mut source = TestVmm::start(1000, &filled);
        for (page, byte) in [(0, 1), (2, 0), (500, 3), (501, 4), (999, 5), (900, 0x77)] {
            source.write_page(page, byte);
        }
        let memory = GuestMemory::of(source.pid(), source.base()).unwrap();
        let out = tempfile::NamedTempFile::new().unwrap();
        let saved = save_delta(&memory, out.as_file(), out.path()).unwrap();
        assert_eq!((saved.private_pages, saved.data_pages), (6, 5));

        let mut clone = TestVmm::start(1000, &filled);
        let clones = GuestMemory::of(clone.pid(), clone.base()).unwrap();
        assert_eq!(apply_delta(out.as_file(), out.path(), &clones).unwrap(), 6);
        for page in [0, 1, 2, 3, 500, 501, 502, 900, 999] {
            assert!(clone.read_page(page) == source.read_page(page), "page {page}");
        }
        // What was applied is the clone's own, so that its next delta has it again, relative to the same base.
        clone.write_page(7, 9);
        let again = tempfile::NamedTempFile::new().unwrap();
        let saved = save_delta(&clones, again.as_file(), again.path()).unwrap();
        assert_eq!(saved.data_pages, 6);
        let private: Vec<_> =
            clones.private_pages().unwrap().into_iter().flat_map(|r| r.first..r.first + r.count).collect();
        assert_eq!(private, [0, 2, 7, 500, 501, 900, 999]);
    }

    fn assert_refused(delta: &File, what: &str) {
        let base = file_of(&[]);
        let memory = restored(&base);
        let error = apply(delta, &memory).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. }), "{what}: {error}");
        assert!(error.to_string().contains("/s/ram.delta"), "{error}");
        assert!(ram_of(&memory).iter().all(|&byte| byte == 0), "{what}: nothing was written");
    }

    fn altered(delta: &File, at: u64, bytes: &[u8]) -> File {
        let copy = tempfile::tempfile().unwrap();
        copy.write_all_at(&contents(delta), 0).unwrap();
        copy.write_all_at(bytes, at).unwrap();
        copy
    }

    #[test]
    fn unsound_deltas_are_refused_before_the_first_write() {
        let base = file_of(&[]);
        let (delta, saved) = save(&file_of(&[(5, 1), (6, 2), (9, 3)]), &[range(5, 2), range(9, 1)]);
        let runs = saved.size - TRAILER - 2 * RUN;
        for (what, at, bytes) in [
            ("another magic", 0, b"X".as_slice()),
            ("another version", 8, &[2]),
            ("another size of pages", 13, &[0x20]),
            ("another RAM", 18, &[1]),
            ("a reserved byte", 4000, &[1]),
            ("no such page", runs + 4, &[1]),
            ("the last page is behind the RAM", runs + RUN, &(RAM_PAGES).to_le_bytes()),
            ("overflow", runs + RUN, &u64::MAX.to_le_bytes()),
            ("overlap", runs + RUN, &[6]),
            ("not sorted", runs + RUN, &[1]),
            ("contents behind the pages", runs + RUN + 8, &[3]),
            ("contents that overflow", runs + 8, &u64::MAX.to_le_bytes()),
            ("an empty run", runs + 16, &[0]),
            ("too many pages", runs + 16, &[3]),
            ("another kind", runs + 20, &[2]),
            ("another kind, large", runs + 23, &[1]),
            ("zero instead of data", runs + 20, &[1]),
            ("more runs", saved.size - TRAILER, &[3]),
            ("runs that overflow", saved.size - TRAILER, &u64::MAX.to_le_bytes()),
            ("pages that overflow", saved.size - TRAILER + 8, &u64::MAX.to_le_bytes()),
            ("no end", saved.size - 1, b"X"),
        ] {
            assert_refused(&altered(&delta, at, bytes), what);
        }
        for length in [0, 8, HEADER, HEADER + TRAILER - 1, runs, saved.size - TRAILER, saved.size - 1] {
            let copy = altered(&delta, 0, b"T");
            copy.set_len(length).unwrap();
            assert_refused(&copy, "truncated");
        }
        assert_refused(&altered(&delta, saved.size, b"more"), "longer");
        let error = apply(&altered(&delta, 8, &[2]), &restored(&base)).unwrap_err().to_string();
        assert!(error.contains("it has version 2, this program reads 1"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn base_and_delta_are_the_ram(
            base in prop::collection::vec((0..RAM_PAGES, 1_u8..), 0..40),
            changes in prop::collection::btree_map(0..RAM_PAGES, any::<u8>(), 0..300),
        ) {
            let base = file_of(&base);
            let ram = tempfile::tempfile().unwrap();
            ram.write_all_at(&contents(&base), 0).unwrap();
            let mut private: Vec<PageRange> = Vec::new();
            for (&page, &byte) in &changes {
                ram.write_all_at(&[byte; PAGE_SIZE as usize], page * PAGE_SIZE).unwrap();
                match private.last_mut() {
                    Some(last) if last.first + last.count == page => last.count += 1,
                    _ => private.push(range(page, 1)),
                }
            }
            let (delta, saved) = save(&ram, &private);
            prop_assert_eq!(saved.private_pages, changes.len() as u64);
            prop_assert_eq!(saved.data_pages, changes.values().filter(|&&byte| byte != 0).count() as u64);
            let memory = restored(&base);
            apply(&delta, &memory).unwrap();
            prop_assert!(ram_of(&memory) == contents(&ram));
        }

        /// Whatever is in the file: an error, or writes inside the RAM. Never a panic, a hang or much memory.
        #[test]
        fn damaged_deltas_do_no_harm(
            changes in prop::collection::vec((0..RAM_PAGES, 1_u8..), 1..20),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let (delta, saved) = save(&file_of(&changes), &[range(0, RAM_PAGES)]);
            let mut bytes = contents(&delta);
            let table = HEADER as usize + saved.data_pages as usize * PAGE_SIZE as usize;
            for (index, byte, anywhere) in damage {
                // Most of the file is contents, where every byte is right: half of the damage goes behind them.
                let (from, length) = if anywhere { (0, bytes.len()) } else { (table, bytes.len() - table) };
                bytes[from + index.index(length)] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            let damaged = tempfile::tempfile().unwrap();
            damaged.write_all_at(&bytes, 0).unwrap();
            let memory = restored(&file_of(&[]));
            if let Err(error) = apply(&damaged, &memory) {
                prop_assert!(matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. }), "{}", error);
                prop_assert!(ram_of(&memory).iter().all(|&byte| byte == 0));
            }
        }
    }
}
