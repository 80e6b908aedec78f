//! Growing that is cut off after each of its writes in turn, as a crash would.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::grow::steps_to;
use super::steps::Step;
use super::superblock::PRIMARY_OFFSET;
use super::{Ext4, Journal, Size};
use crate::Error;
use crate::format::{DataSource, write_tree};
use crate::tree::{Attributes, Content, FileData, Node, NodeId, Place, Tree};

const MIB: u64 = 1 << 20;

/// Every byte follows from its offset.
struct Pattern;

impl DataSource for Pattern {
    fn read(&mut self, place: Place, buffer: &mut [u8]) -> Result<(), Error> {
        for (byte, offset) in buffer.iter_mut().zip(place.offset..) {
            *byte = (offset % 251) as u8;
        }
        Ok(())
    }
}

fn make(path: &Path, size: Size, journal: Journal) {
    let mut tree = Tree::new();
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    for directory in 0..3 {
        let content = Content::Directory(Default::default());
        let node = tree.add(Node { attributes: attributes.clone(), content });
        tree.link(NodeId::ROOT, format!("d{directory}").as_bytes(), node, 0);
        for number in 0..200 {
            let data = FileData::Whole(Place { source: 0, offset: number * 7 });
            let content = Content::File { size: number * 100, data };
            let file = tree.add(Node { attributes: attributes.clone(), content });
            tree.link(node, format!("{number:0>60}").as_bytes(), file, 0);
        }
    }
    let format = Ext4::new(b"cut").size(size).journal(journal).unwrap();
    write_tree(&mut tree, &format, &mut Pattern, path).unwrap();
}

/// What ext4-view, which is not ours, reads: every path with its contents.
fn contents(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let ext4 = ext4_view::Ext4::load_from_path(path).unwrap();
    let mut seen = BTreeMap::new();
    let mut stack = vec![b"/".to_vec()];
    while let Some(directory) = stack.pop() {
        for entry in ext4.read_dir(&directory[..]).unwrap() {
            let path: Vec<u8> = entry.unwrap().path().as_ref().to_vec();
            if path.ends_with(b"/.") || path.ends_with(b"/..") {
                continue;
            }
            let is_directory = ext4.symlink_metadata(&path[..]).unwrap().is_dir();
            let bytes = if is_directory { Vec::new() } else { ext4.read(&path[..]).unwrap() };
            if is_directory {
                stack.push(path.clone());
            }
            seen.insert(path, bytes);
        }
    }
    seen
}

/// e2fsck's exit code, and what it said.
fn e2fsck(path: &Path, options: &str) -> (Option<i32>, String) {
    let output = Command::new("e2fsck").arg(options).arg(path).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

fn block_count(path: &Path) -> u64 {
    let output = Command::new("dumpe2fs").arg("-h").arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Block count:"));
    line.unwrap_or_else(|| panic!("{text}")).trim().parse().unwrap()
}

fn is_behind(step: &Step, blocks: u64) -> bool {
    matches!(step, Step::Write(offset, _) if *offset >= blocks * 4096)
}

/// Grows `base` to `bytes`, cut off after every step; how many of the cuts needed a repair.
fn cut_everywhere(base: &Path, bytes: u64) -> usize {
    let before = contents(base);
    let old = block_count(base);
    let steps = steps_to(base, bytes).unwrap();
    // The first superblock is written once or twice: the last time makes the change, a first time announces it.
    let superblocks: Vec<usize> = (0..steps.len())
        .filter(|&index| matches!(steps[index], Step::Write(at, _) if at == PRIMARY_OFFSET as u64))
        .collect();
    let (announced, made) = (superblocks[0], superblocks[superblocks.len() - 1]);
    let cut = base.with_extension("cut");
    let mut repairs = 0;
    for done in 0..=steps.len() {
        if done > 0 && matches!(steps[done - 1], Step::Sync) {
            continue;
        }
        // Holes stay holes.
        let copied = Command::new("cp").arg("--sparse=always").args([base, &cut]).status().unwrap();
        assert!(copied.success());
        let file = File::options().write(true).open(&cut).unwrap();
        file.set_len(bytes).unwrap();
        for step in &steps[..done] {
            if let Step::Write(offset, bytes) = step {
                file.write_all_at(bytes, *offset).unwrap();
            }
        }
        drop(file);
        let (code, text) = e2fsck(&cut, "-fn");
        if done <= announced || done > made {
            assert_eq!(code, Some(0), "after {done} steps: {text}");
            assert_eq!(block_count(&cut) > old, done > made, "after {done} steps");
        } else {
            repairs += usize::from(code != Some(0));
            // Without -f: the mark alone makes it check.
            let (code, text) = e2fsck(&cut, "-y");
            assert!(
                matches!(code, Some(0 | 1)) && text.contains("Pass 5"),
                "after {done} steps: {code:?} {text}"
            );
            let (code, text) = e2fsck(&cut, "-fn");
            assert_eq!(code, Some(0), "after {done} steps and a repair: {text}");
        }
        let mut after = contents(&cut);
        after.retain(|path, _| !path.starts_with(b"/lost+found"));
        assert!(before.iter().all(|(path, bytes)| path == b"/lost+found" || after.get(path) == Some(bytes)));
        assert_eq!(after.len() + 1, before.len(), "after {done} steps");
        // And it grows from there on, once what the cut left behind its end is gone.
        if done <= made && steps[..done].iter().any(|step| is_behind(step, old)) {
            let error = super::grow(&cut, bytes).unwrap_err().to_string();
            let end = block_count(&cut) * 4096;
            assert!(error.ends_with(&format!("cut the file to {end} bytes")), "{error}");
            File::options().write(true).open(&cut).unwrap().set_len(end).unwrap();
        }
        super::grow(&cut, bytes).unwrap();
        let (code, text) = e2fsck(&cut, "-fn");
        assert_eq!(code, Some(0), "after {done} steps, grown again: {text}");
    }
    repairs
}

#[test]
fn a_cut_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.ext4");
    for journal in [Journal::None, Journal::Auto] {
        for (size, mib, most) in [
            // Inside the last group: its bitmap, its descriptor.
            (Size::Minimal, 100, 2),
            // A group with copies, so the resize inode changes too.
            (Size::Exact(100 * MIB), 300, 3),
            (Size::Exact(300 * MIB), 1000, 3),
            // More blocks of descriptors, taken from the resize inode.
            (Size::Exact(300 * MIB), 20_000, 4),
        ] {
            make(&base, size, journal);
            let repairs = cut_everywhere(&base, mib * MIB);
            assert!(repairs <= most, "{size:?} to {mib} MiB, {journal:?}: {repairs} cuts need a repair");
        }
    }
}

/// Whole groups behind whole groups: the superblock alone makes the change.
#[test]
fn whole_groups_are_added_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.ext4");
    make(&base, Size::Exact(256 * MIB), Journal::None);
    assert_eq!(cut_everywhere(&base, 384 * MIB), 0);
    make(&base, Size::Exact(1280 * MIB), Journal::None);
    assert_eq!(cut_everywhere(&base, 3072 * MIB), 0);
}

#[test]
fn so_with_what_mke2fs_makes() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.ext4");
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), vec![7; 100_000]).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-b", "4096", "-O", "metadata_csum,^orphan_file", "-d"])
        .args([&tree, &base])
        .arg("200M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    assert!(cut_everywhere(&base, 1000 * MIB) <= 4);
}
