//! The RAM of a VM that maps its base privately, as the kernel shows it in `/proc/PID`.
//!
//! ```text
//! base file    |  0  |  1  |  2  |  3  |  4  |  5  |        shared by all, in the page cache
//! VMM's view   |  0  |  1  |  2' |  3  |  4' |  5  |        2' and 4': the VMM's own, made by its first write
//! pagemap         61    61    -     61    -    (none)       bit 61 of a present page: it is the file's
//! ```
//!
//! Sources: Linux, Documentation/admin-guide/mm/pagemap.rst; proc_pid_maps(5). Opening another process's `mem` takes
//! the right to trace it: the same user, and with Yama's default an ancestor of it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use super::Error;

/// Bytes of a page, of the guest's RAM and of the host's page tables (x86).
pub const PAGE_SIZE: u64 = 4096;

/// Bytes that a page has in pagemap.
const PAGEMAP_ENTRY: u64 = 8;
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_SWAPPED: u64 = 1 << 62;
const PAGEMAP_FILE: u64 = 1 << 61;

/// Pagemap is read in pieces that stand for 128 MiB of RAM.
const PAGEMAP_PIECE: usize = 256 << 10;

/// Consecutive pages of the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// The first page.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
}

/// The private mapping of a base file in another process.
#[derive(Debug)]
pub struct GuestMemory {
    memory: File,
    pagemap: File,
    /// Without gaps from 0 to the end of the base.
    segments: Vec<Segment>,
    path: PathBuf,
}

/// A part of the RAM that is mapped in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// Where it begins in the RAM.
    offset: u64,
    /// Where it begins in the process.
    address: u64,
    length: u64,
}

impl GuestMemory {
    /// Finds the mapping of `base` in process `pid`; it must be private and cover the file exactly once.
    pub fn of(pid: u32, base: &File) -> Result<Self, Error> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let maps = folder.join("maps");
        let metadata = base.metadata().map_err(Error::io("read the base of", &maps))?;
        let wanted = Inode { devices: devices(base, metadata.dev()), number: metadata.ino() };
        let opened = File::open(&maps).map_err(Error::io("open", &maps))?;
        let segments = find(BufReader::new(opened), &wanted).map_err(Error::io("read", &maps))?;
        let segments = whole(segments, metadata.len()).map_err(|reason| Error::unsupported(&maps, reason))?;
        let path = folder.join("mem");
        let memory = File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        let pagemap = folder.join("pagemap");
        let pagemap = File::open(&pagemap).map_err(Error::io("open", &pagemap))?;
        Ok(Self { memory, pagemap, segments, path })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.segments.last().map_or(0, |last| last.offset + last.length)
    }

    /// The pages that the process has of its own, sorted: those that are not the base's any more.
    pub fn private_pages(&self) -> Result<Vec<PageRange>, Error> {
        let mut ranges: Vec<PageRange> = Vec::new();
        let mut buffer = vec![0; PAGEMAP_PIECE];
        for segment in &self.segments {
            let mut done = 0;
            while done < segment.length {
                let pages = ((segment.length - done) / PAGE_SIZE).min(PAGEMAP_PIECE as u64 / PAGEMAP_ENTRY);
                let entries = &mut buffer[..(pages * PAGEMAP_ENTRY) as usize];
                self.pagemap
                    .read_exact_at(entries, (segment.address + done) / PAGE_SIZE * PAGEMAP_ENTRY)
                    .map_err(Error::io("read", self.path.with_file_name("pagemap")))?;
                private(entries, (segment.offset + done) / PAGE_SIZE, &mut ranges);
                done += pages * PAGE_SIZE;
            }
        }
        Ok(ranges)
    }

    /// Names the process's memory in errors.
    pub(super) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Reads RAM at `offset`.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = bytes;
        let mut offset = offset;
        while !rest.is_empty() {
            let (address, length) = self.locate(offset, rest.len())?;
            let (now, later) = rest.split_at_mut(length);
            self.memory.read_exact_at(now, address)?;
            rest = later;
            offset += length as u64;
        }
        Ok(())
    }

    /// Writes RAM at `offset`: the pages become the process's own.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut rest = bytes;
        let mut offset = offset;
        while !rest.is_empty() {
            let (address, length) = self.locate(offset, rest.len())?;
            let (now, later) = rest.split_at(length);
            self.memory.write_all_at(now, address)?;
            rest = later;
            offset += length as u64;
        }
        Ok(())
    }

    /// The address of `offset`, and how many of `length` bytes follow it there.
    fn locate(&self, offset: u64, length: usize) -> io::Result<(u64, usize)> {
        let after = self.segments.partition_point(|segment| segment.offset <= offset);
        let found = after.checked_sub(1).map(|index| self.segments[index]);
        let within = found.filter(|segment| offset - segment.offset < segment.length);
        let Some(segment) = within else {
            let reason = format!("{offset} lies behind the RAM, which has {} bytes", self.size());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        };
        let inside = offset - segment.offset;
        let length = (length as u64).min(segment.length - inside);
        Ok((segment.address + inside, length as usize))
    }

    /// RAM that is a plain file, for tests of what is done with it.
    #[cfg(test)]
    pub(super) fn of_file(memory: File) -> Self {
        let length = memory.metadata().unwrap().len();
        let pagemap = memory.try_clone().unwrap();
        let segments = vec![Segment { offset: 0, address: 0, length }];
        Self { memory, pagemap, segments, path: "/test/mem".into() }
    }
}

/// Adds the private pages of a piece of pagemap that begins with page `first`.
fn private(entries: &[u8], first: u64, ranges: &mut Vec<PageRange>) {
    let (entries, _) = entries.as_chunks::<{ PAGEMAP_ENTRY as usize }>();
    for (page, entry) in (first..).zip(entries) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED) == 0 || entry & PAGEMAP_FILE != 0 {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => ranges.push(PageRange { first: page, count: 1 }),
        }
    }
}

struct Inode {
    devices: Vec<(u32, u32)>,
    number: u64,
}

/// The device numbers under which `/proc/PID/maps` can show a file: btrfs has one for each subvolume in stat(2), while
/// maps, like mountinfo, has the one of the whole file system.
fn devices(file: &File, stat: u64) -> Vec<(u32, u32)> {
    let mut devices = vec![(rustix::fs::major(stat), rustix::fs::minor(stat))];
    devices.extend(mount_device(file));
    devices
}

fn mount_device(file: &File) -> Option<(u32, u32)> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    // ID PARENT MAJOR:MINOR ... (proc_pid_mountinfo(5))
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount))?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A mapping of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    segment: Segment,
    private: bool,
}

/// The mappings of a file in the text of `/proc/PID/maps`:
/// `7f12a0000000-7f12b0000000 rw-p 00000000 fe:00 131 /path (deleted)`.
fn find(mut maps: impl BufRead, wanted: &Inode) -> io::Result<Vec<Mapping>> {
    let mut found = Vec::new();
    let mut line = Vec::new();
    // Paths are bytes, not text. The kernel bounds the lines (a path) and their number (vm.max_map_count).
    while maps.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        if let Some((inode, mapping)) = parse(&text)
            && inode.1 == wanted.number
            && wanted.devices.contains(&inode.0)
        {
            found.push(mapping);
        }
        line.clear();
    }
    Ok(found)
}

type Device = (u32, u32);

fn parse(line: &str) -> Option<((Device, u64), Mapping)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let private = fields.next()?.ends_with('p');
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = fields.next()?.parse().ok()?;
    let segment = Segment { offset, address: start, length: end.checked_sub(start)? };
    Some(((device, inode), Mapping { segment, private }))
}

/// The segments in order, if they are private and are together the whole file, once.
fn whole(mut mappings: Vec<Mapping>, size: u64) -> Result<Vec<Segment>, String> {
    if mappings.is_empty() {
        return Err("the process does not map the base; expected a VMM that was restored from it".to_owned());
    }
    if mappings.iter().any(|mapping| !mapping.private) {
        return Err("the base is mapped shared, expected private: the snapshot may be damaged".to_owned());
    }
    mappings.sort_by_key(|mapping| mapping.segment.offset);
    let mut end = 0;
    for Mapping { segment, .. } in &mappings {
        if segment.offset != end {
            return Err(format!("the base is mapped at byte {}, expected {end}", segment.offset));
        }
        end += segment.length;
    }
    if end != size || !size.is_multiple_of(PAGE_SIZE) {
        return Err(format!("{end} bytes of the base are mapped, expected {size}"));
    }
    Ok(mappings.into_iter().map(|mapping| mapping.segment).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::test_vmm::TestVmm;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let text = "55d0a0000000-55d0a0001000 r--p 00000000 fe:00 99                         /usr/bin/qemu\n\
                    7f0000000000-7f0000100000 rw-p 00000000 fe:00 131                        /s/ram (deleted)\n\
                    7f0000100000-7f0000300000 rw-p 00100000 fe:00 131                        /s/ram (deleted)\n\
                    7f0000300000-7f0000400000 rw-p 00000000 fe:01 131                        /other/device\n\
                    7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0                          [stack]\n";
        let wanted = Inode { devices: vec![(1, 1), (0xfe, 0)], number: 131 };
        let found = find(text.as_bytes(), &wanted).unwrap();
        assert_eq!(
            whole(found.clone(), 3 << 20).unwrap(),
            [
                Segment { offset: 0, address: 0x7f00_0000_0000, length: 1 << 20 },
                Segment { offset: 1 << 20, address: 0x7f00_0010_0000, length: 2 << 20 },
            ]
        );
        assert!(whole(found.clone(), 4 << 20).unwrap_err().contains("expected 4194304"));
        assert!(
            whole(found[1..].to_vec(), 3 << 20).unwrap_err().contains("mapped at byte 1048576, expected 0")
        );
        let twice = [found.clone(), found.clone()].concat();
        assert!(whole(twice, 3 << 20).unwrap_err().contains("mapped at byte 0, expected 1048576"));
        let shared = text.replace("rw-p 00100000", "rw-s 00100000");
        let shared = find(shared.as_bytes(), &wanted).unwrap();
        assert!(whole(shared, 3 << 20).unwrap_err().contains("mapped shared"));
        assert!(whole(Vec::new(), 3 << 20).unwrap_err().contains("does not map the base"));
    }

    #[test]
    fn pagemap_entries_are_told_apart() {
        let entries = [
            0,
            PAGEMAP_PRESENT | PAGEMAP_FILE,
            PAGEMAP_PRESENT,
            PAGEMAP_SWAPPED | 77,
            PAGEMAP_FILE,
            PAGEMAP_PRESENT | 1 << 55,
        ];
        let bytes: Vec<u8> = entries.iter().flat_map(|entry: &u64| entry.to_ne_bytes()).collect();
        let mut ranges = vec![range(3, 5)];
        private(&bytes, 6, &mut ranges);
        assert_eq!(ranges, [range(3, 7), range(11, 1)], "pages 8 and 9 go on where 7 ended");
    }

    #[test]
    fn the_private_pages_of_a_process_are_those_that_it_wrote() {
        let pages = 70_000; // More than one piece of pagemap.
        for deleted in [false, true] {
            let mut vmm = TestVmm::start(pages, &[(5, 0xaa), (pages - 1, 0xbb)]);
            if deleted {
                vmm.unlink_base();
            }
            let memory = GuestMemory::of(vmm.pid(), vmm.base()).unwrap();
            assert_eq!(memory.size(), pages * PAGE_SIZE);
            assert_eq!(memory.private_pages().unwrap(), [], "nothing was written yet");
            for page in [4, 5, 6, 40_000, pages - 1] {
                vmm.write_page(page, 0x11);
            }
            vmm.touch_page(9);
            let expected = [range(4, 3), range(40_000, 1), range(pages - 1, 1)];
            assert_eq!(memory.private_pages().unwrap(), expected);
            let mut bytes = vec![0; 3 * PAGE_SIZE as usize];
            memory.read(&mut bytes, 4 * PAGE_SIZE).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0x11));
            // Written from here, it is the process's own too, and the base stays.
            memory.write(&[0x22; 10], 100 * PAGE_SIZE + 7).unwrap();
            assert!(memory.private_pages().unwrap().contains(&range(100, 1)));
            assert_eq!(vmm.read_page(100)[7..17], [0x22; 10]);
            let mut byte = [0];
            vmm.base().read_exact_at(&mut byte, 100 * PAGE_SIZE + 7).unwrap();
            assert_eq!(byte, [0]);
            assert!(memory.write(&[1], pages * PAGE_SIZE).is_err(), "behind the RAM");
            // In several mappings, as after an mprotect of a part.
            vmm.split_at(1000);
            let split = GuestMemory::of(vmm.pid(), vmm.base()).unwrap();
            assert!(split.segments.len() > 1, "{:?}", split.segments);
            assert_eq!(split.private_pages().unwrap(), memory.private_pages().unwrap());
            split.write(&vec![0x33; 2 * PAGE_SIZE as usize], 999 * PAGE_SIZE).unwrap();
            assert_eq!((vmm.read_page(999)[0], vmm.read_page(1000)[0]), (0x33, 0x33));
        }
    }

    #[test]
    fn another_file_and_a_dead_process_are_refused() {
        let mut vmm = TestVmm::start(16, &[]);
        let other = tempfile::tempfile().unwrap();
        other.set_len(16 * PAGE_SIZE).unwrap();
        let error = GuestMemory::of(vmm.pid(), &other).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported { .. }) && error.to_string().contains("does not map"),
            "{error}"
        );
        let memory = GuestMemory::of(vmm.pid(), vmm.base()).unwrap();
        vmm.end();
        assert!(matches!(GuestMemory::of(vmm.pid(), vmm.base()), Err(Error::Io { .. })));
        assert!(memory.read(&mut [0], 0).is_err());
        assert!(memory.private_pages().is_err());
    }
}
