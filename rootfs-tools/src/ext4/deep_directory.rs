//! Directories with two and three levels of index, as e2fsck, debugfs and the kernel see them. A real one with three has
//! half a million leaves at the least; here index nodes hold few records, so that a thousand names are enough.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::directory::FanOut;
use super::{Ext4, Size};
use crate::format::{NoData, write_tree};
use crate::tree::{Attributes, Content, Node, NodeId, Tree};

/// So long that a leaf holds 19 of them.
fn name(number: usize) -> String {
    format!("{number:0>200}")
}

/// `count` names in `directory`, all of one pipe.
fn make(path: &Path, count: usize, fan_out: FanOut) {
    let mut tree = Tree::new();
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    let directory =
        tree.add(Node { attributes: attributes.clone(), content: Content::Directory(Default::default()) });
    tree.link(NodeId::ROOT, b"directory", directory, 0);
    let node = tree.add(Node { attributes, content: Content::Fifo });
    for number in 0..count {
        tree.link(directory, name(number).as_bytes(), node, 0);
    }
    let format = Ext4::new(b"deep").size(Size::Exact(64 << 20)).fan_out(fan_out);
    write_tree(&mut tree, &format, &mut NoData, path).unwrap();
}

fn run(program: &str, args: &[&OsStr]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn check(path: &Path) {
    run("e2fsck", &["-fn".as_ref(), path.as_os_str()]);
}

/// A mount that ends with the test.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(path: &Path, options: &str) -> Self {
        let point = tempfile::tempdir().unwrap();
        let args = ["-t", "ext4", "-o", options].map(OsStr::new);
        run("mount", &[&args[..], &[path.as_os_str(), point.path().as_os_str()]].concat());
        Self(point)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// `levels` of index nodes below the root.
fn deep(count: usize, fan_out: usize, levels: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.ext4");
    make(&path, count, FanOut::at_most(fan_out));
    check(&path);
    let htree = run("debugfs", &["-R".as_ref(), "htree /directory".as_ref(), path.as_os_str()]);
    assert!(htree.contains(&format!("Indirect levels: {levels}")), "{htree}");
    assert!(htree.contains("Number of entries (limit): 507"), "{htree}");
    let stats = run("dumpe2fs", &["-h".as_ref(), path.as_os_str()]);
    assert_eq!(stats.contains("large_dir"), levels > 1, "{stats}");

    // ext4-view 1.0 does not know large_dir.
    if levels < 2 {
        let ext4 = ext4_view::Ext4::load_from_path(&path).unwrap();
        assert_eq!(ext4.read_dir("/directory").unwrap().count(), count + 2);
        for number in 0..count {
            assert!(ext4.exists(format!("/directory/{}", name(number)).as_str()).unwrap(), "{number}");
        }
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a kernel mount needs root, and this is not root");
        return;
    }
    let mut expected: BTreeSet<String> = (0..count).map(name).collect();
    let look_up = |directory: &Path, expected: &BTreeSet<String>| {
        assert!(names_in(directory) == *expected);
        // Each by its hash, which reading the directory does not try.
        for name in expected {
            fs::symlink_metadata(directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    };
    {
        let mount = Mounted::new(&path, "loop,ro");
        look_up(&mount.0.path().join("directory"), &expected);
    }
    {
        let mount = Mounted::new(&path, "loop,rw");
        let directory = mount.0.path().join("directory");
        // Enough to split every leaf, and so to add to nodes of every level.
        for number in count..count * 3 {
            fs::File::create(directory.join(name(number))).unwrap();
            expected.insert(name(number));
        }
        for number in (0..count).step_by(3) {
            fs::remove_file(directory.join(name(number))).unwrap();
            expected.remove(&name(number));
        }
        look_up(&directory, &expected);
    }
    check(&path);
    {
        // Read from the disk again, not from the cache.
        let mount = Mounted::new(&path, "loop,ro");
        look_up(&mount.0.path().join("directory"), &expected);
    }
}

#[test]
fn one_level() {
    deep(1000, 507, 0);
}

#[test]
fn two_levels() {
    deep(1000, 10, 1);
}

#[test]
fn three_levels() {
    deep(1000, 5, 2);
}

/// The last node of each level has a single record.
#[test]
fn three_levels_with_nodes_of_one_record() {
    // 4 * 4 leaves and one more.
    deep(19 * 16 + 1, 4, 2);
}

#[test]
fn more_levels_than_three_are_refused() {
    use super::checksum::Identity;
    use super::directory::Packing;
    let names: Vec<String> = (0..1000).map(name).collect();
    let pack = |fan_out| {
        let names = names.iter().map(String::as_bytes);
        Packing::new(names, &Identity::derive(b"deep"), FanOut::at_most(fan_out)).is_some()
    };
    // 53 leaves.
    assert!(pack(4));
    assert!(!pack(3));
}
