//! Everything that must agree with everything else: counts, bitmaps, links and copies against what the walk met.

use super::FileSystem;
use super::bytes::le32;
use super::fault::{Fault, Finding, Findings, damage};
use super::group::{Group, checksum_mask};
use super::inode::FileType;
use super::intervals::Intervals;
use super::superblock::{self, Checksums, HAS_JOURNAL, ORPHAN_FILE, RESIZE_INODE};
use super::walk::{Contents, Walk};
use crate::ext4::inode::MAX_LINKS;

const RESIZE_INODE_NUMBER: u32 = 7;
const JOURNAL_MAGIC: u32 = 0xc03b_3998;

/// Checks a file system; what can be read of it comes back.
pub(super) fn check(fs: &FileSystem, findings: &mut Findings) -> Result<Contents, Fault> {
    let superblock = &fs.superblock;
    if !superblock.clean {
        let got = format!("state {:#x}, first orphan {}", superblock.raw.state, superblock.raw.last_orphan);
        findings.report(Finding::new("superblock", "state", "unmounted cleanly, without errors", got))?;
    }
    let copies = check_copies(fs, findings);
    findings.tolerate(copies)?;
    let mut walk = Walk::new(fs, findings, true)?;
    let run = walk.run();
    walk.findings.tolerate(run)?;
    let mut special = Vec::new();
    for (number, name) in special_inodes(fs) {
        let checked = check_special(&mut walk, number, name).map_err(|fault| fault.locate(name));
        walk.findings.tolerate(checked)?;
        special.push(number);
    }
    check_links(&mut walk)?;
    let mut totals = Totals::default();
    for number in 0..superblock.groups() {
        let checked = check_group(&mut walk, number, &special, &mut totals);
        walk.findings.tolerate(checked)?;
    }
    walk.findings.expect("superblock", "free blocks", totals.free_blocks, superblock.free_blocks)?;
    walk.findings.expect("superblock", "free inodes", totals.free_inodes, superblock.free_inodes.into())?;
    Ok(walk.contents())
}

#[derive(Default)]
struct Totals {
    free_blocks: u64,
    free_inodes: u64,
}

fn check_copies(fs: &FileSystem, findings: &mut Findings) -> Result<(), Fault> {
    let superblock = &fs.superblock;
    let size = usize::from(superblock.descriptor_size);
    let mut table = vec![0; superblock.groups() as usize * size];
    fs.read("group descriptors", (superblock.raw.first_block + 1) * fs.block_size(), &mut table)?;
    for group in (1..superblock.groups()).filter(|&group| superblock.has_copies(group)) {
        let start = superblock.group_blocks(group).start * fs.block_size();
        let mut bytes = [0; superblock::SIZE];
        fs.read("superblock copy", start, &mut bytes)?;
        superblock.check_copy(&bytes, group, fs.check, findings)?;
        let mut copy = vec![0; table.len()];
        fs.read("copy of the descriptors", start + fs.block_size(), &mut copy)?;
        let differs = table
            .chunks_exact(size)
            .zip(copy.chunks_exact(size))
            .position(|(first, copy)| !Group::same_places(first, copy));
        if let Some(number) = differs {
            let place = format!("copy of the descriptors in group {group}");
            let what = format!("places of group {number}");
            findings.report(Finding::new(place, what, "those of the first descriptors", "others"))?;
        }
    }
    Ok(())
}

/// Inodes in use that no directory names.
fn special_inodes(fs: &FileSystem) -> Vec<(u32, &'static str)> {
    let raw = &fs.superblock.raw;
    let mut inodes = Vec::new();
    if raw.compatible & HAS_JOURNAL != 0 && raw.journal_inode != 0 {
        inodes.push((raw.journal_inode, "journal"));
    }
    if raw.compatible & RESIZE_INODE != 0 {
        inodes.push((RESIZE_INODE_NUMBER, "blocks reserved for growing"));
    }
    if raw.compatible & ORPHAN_FILE != 0 {
        inodes.push((raw.orphan_file_inode, "orphan file"));
    }
    inodes.extend(raw.quota_inodes.iter().filter(|&&number| number != 0).map(|&number| (number, "quota")));
    inodes
}

fn check_special(walk: &mut Walk<'_>, number: u32, name: &str) -> Result<(), Fault> {
    if let Some(met) = walk.met.get(&number) {
        let got = format!("{} names", met.counted);
        return Err(damage(format!("inode {number}"), "names", "none", got));
    }
    let inode = walk.fs.inode(number, walk.findings)?;
    if inode.file_type != FileType::File {
        return Err(damage(inode.place(), "type", "a file", format!("{:?}", inode.file_type)));
    }
    if number == RESIZE_INODE_NUMBER {
        // What its one double indirect block leads to are the reserved blocks behind the descriptors.
        let block = u64::from(le32(&inode.root(), 13 * 4));
        if block == 0 {
            return Ok(());
        }
        return walk.claim(block..block + 1, &inode.place());
    }
    let blocks = walk.claim_blocks_of(&inode)?;
    walk.check_allocation(&inode, blocks.count())?;
    if name == "journal" {
        let Some(first) = blocks.runs.first().filter(|run| run.logical == 0) else {
            return Err(damage(inode.place(), "blocks of the journal", "some", "none"));
        };
        let magic = le32(&walk.fs.block(name, first.start)?, 0).swap_bytes();
        if magic != JOURNAL_MAGIC {
            return Err(damage(
                inode.place(),
                "magic number",
                format!("{JOURNAL_MAGIC:#x}"),
                format!("{magic:#x}"),
            ));
        }
    }
    Ok(())
}

fn check_links(walk: &mut Walk<'_>) -> Result<(), Fault> {
    let mut wrong: Vec<(u32, u32, u16, bool)> = walk
        .met
        .iter()
        .filter(|(_, met)| u32::from(met.links) != met.counted)
        // 1 says that they are too many to be counted.
        .filter(|(_, met)| !(met.is_directory && met.links == 1 && met.counted >= MAX_LINKS))
        .map(|(number, met)| (*number, met.counted, met.links, met.is_directory))
        .collect();
    wrong.sort_unstable();
    for (number, counted, links, is_directory) in wrong {
        let place = match is_directory {
            true => format!("{} (inode {number})", walk.path_of(number)),
            false => format!("inode {number}"),
        };
        walk.findings.report(Finding::new(place, "link count", counted, links))?;
    }
    for (number, shared) in &walk.shared {
        let place = format!("attribute block {number}");
        walk.findings.expect(place, "inodes with it", shared.counted, shared.said)?;
    }
    Ok(())
}

fn check_group(walk: &mut Walk<'_>, number: u32, special: &[u32], totals: &mut Totals) -> Result<(), Fault> {
    let fs = walk.fs;
    let superblock = &fs.superblock;
    let group = fs.groups[number as usize];
    let place = format!("group {number}");
    let (block_bytes, inode_bytes) =
        (superblock.blocks_per_group as usize / 8, superblock.inodes_per_group as usize / 8);

    let blocks = superblock.group_blocks(number);
    let count = (blocks.end - blocks.start) as usize;
    let expected = bitmap(&walk.claimed, &blocks, block_bytes);
    let stored = if group.blocks_untouched {
        bitmap(&walk.system, &blocks, block_bytes)
    } else {
        let stored =
            read_bitmap(walk, group.block_bitmap, block_bytes, group.block_bitmap_checksum, "block", number)?;
        padding(walk, &stored, count, "block", number)?;
        stored
    };
    compare(walk, &expected, &stored, count, |bit| format!("block {}", blocks.start + bit as u64))?;
    let free = zeros(&stored, count);
    walk.findings.expect(&place, "free blocks", free, group.free_blocks.into())?;
    totals.free_blocks += free;

    let count = superblock.inodes_per_group as usize;
    let first = number * superblock.inodes_per_group + 1;
    let mut expected = vec![0u8; inode_bytes];
    let mut directories = 0;
    for index in 0..count {
        let inode = first + index as u32;
        let met = walk.met.get(&inode);
        directories += u64::from(met.is_some_and(|met| met.is_directory));
        if met.is_some() || inode < superblock.raw.first_inode || special.contains(&inode) {
            expected[index / 8] |= 1 << (index % 8);
        }
    }
    let stored = if group.inodes_untouched {
        vec![0; inode_bytes]
    } else {
        let stored =
            read_bitmap(walk, group.inode_bitmap, inode_bytes, group.inode_bitmap_checksum, "inode", number)?;
        padding(walk, &stored, count, "inode", number)?;
        stored
    };
    compare(walk, &expected, &stored, count, |bit| format!("inode {}", first + bit as u32))?;
    let free = zeros(&stored, count);
    walk.findings.expect(&place, "free inodes", free, group.free_inodes.into())?;
    totals.free_inodes += free;
    walk.findings.expect(&place, "directories", directories, group.used_directories.into())?;
    let last = (0..count).rev().find(|&index| is_set(&expected, index)).map_or(0, |index| index + 1);
    if !group.inodes_untouched && group.unused_inodes as usize > count - last {
        let expected = format!("at most {}", count - last);
        walk.findings.report(Finding::new(place, "inodes never used", expected, group.unused_inodes))?;
    }
    Ok(())
}

/// A bitmap as it is stored: all of its block.
fn read_bitmap(
    walk: &mut Walk<'_>,
    block: u64,
    covered: usize,
    checksum: u32,
    what: &str,
    group: u32,
) -> Result<Vec<u8>, Fault> {
    let place = format!("{what} bitmap of group {group}");
    let bytes = walk.fs.block(&place, block)?;
    if walk.fs.check && walk.fs.superblock.checksums == Checksums::Metadata {
        let mask = checksum_mask(&walk.fs.superblock);
        let expected = walk.fs.superblock.raw.seed.update(&bytes[..covered]).value();
        walk.findings.checksum(place, expected & mask, checksum & mask)?;
    }
    Ok(bytes)
}

/// What a bitmap has more bits for than there is must be marked.
fn padding(walk: &mut Walk<'_>, stored: &[u8], count: usize, what: &str, group: u32) -> Result<(), Fault> {
    match (count..stored.len() * 8).find(|&bit| !is_set(stored, bit)) {
        Some(bit) => {
            let place = format!("{what} bitmap of group {group}");
            let what = format!("bit {bit}, behind its end");
            walk.findings.report(Finding::new(place, what, "set", "clear"))
        }
        None => Ok(()),
    }
}

/// One finding for each kind of difference.
fn compare(
    walk: &mut Walk<'_>,
    expected: &[u8],
    stored: &[u8],
    count: usize,
    name: impl Fn(usize) -> String,
) -> Result<(), Fault> {
    if expected == &stored[..expected.len()] {
        return Ok(());
    }
    for (used, what, wanted, got) in [
        (true, "in use", "marked", "marked as free"),
        (false, "in use", "no, nothing has it", "marked as in use"),
    ] {
        let mut wrong =
            (0..count).filter(|&bit| is_set(expected, bit) == used && is_set(stored, bit) != used);
        if let Some(first) = wrong.next() {
            let more = wrong.count();
            let place = if more == 0 { name(first) } else { format!("{} and {more} more", name(first)) };
            walk.findings.report(Finding::new(place, what, wanted, got))?;
        }
    }
    Ok(())
}

fn bitmap(set: &Intervals, blocks: &std::ops::Range<u64>, length: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    for range in set.within(blocks.clone()) {
        for block in range {
            let bit = (block - blocks.start) as usize;
            bytes[bit / 8] |= 1 << (bit % 8);
        }
    }
    bytes
}

fn is_set(bytes: &[u8], bit: usize) -> bool {
    bytes.get(bit / 8).is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
}

fn zeros(bytes: &[u8], count: usize) -> u64 {
    let whole: u64 = bytes[..count / 8].iter().map(|byte| u64::from(byte.count_zeros())).sum();
    whole + (count / 8 * 8..count).filter(|&bit| !is_set(bytes, bit)).count() as u64
}
