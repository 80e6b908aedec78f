//! Random trees through a layer, our writer, and an independent reader.

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use rootfs_tools::{BuildOptions, Size, build};

use crate::image::{Entry, TestImage, layer};
use crate::oracle::{Viewed, assert_clean, view};

#[derive(Clone, Debug)]
enum Kind {
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Fifo,
    Directory(BTreeMap<Vec<u8>, Node>),
}

#[derive(Clone, Debug)]
struct Node {
    mode: u16,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanoseconds: u32,
    xattr: Option<Vec<u8>>,
    kind: Kind,
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![Just(b'a'), 1u8..=255], 1..=255).prop_filter("no name", |name| {
        !name.contains(&b'/') && !name.starts_with(b".") && name != b"lost+found"
    })
}

fn kind() -> impl Strategy<Value = Kind> {
    let leaf = prop_oneof![
        4 => vec(any::<u8>(), 0..20_000).prop_map(Kind::File),
        1 => (0usize..3, any::<u8>()).prop_map(|(blocks, byte)| Kind::File(vec![byte; blocks * 4096])),
        // ext4-view refuses targets with a component of more than 255 bytes; longer ones are in umoci.rs.
        2 => vec(1u8..=255, 1..=255).prop_map(Kind::Symlink),
        1 => Just(Kind::Fifo),
    ];
    leaf.prop_recursive(4, 60, 12, |inner| btree_map(name(), node(inner), 0..40).prop_map(Kind::Directory))
}

fn node(kind: impl Strategy<Value = Kind>) -> impl Strategy<Value = Node> {
    // ext4-view 1.0 refuses inodes whose low word of seconds is negative (1901 to 1970, 2038 to 2106, ..). Those times
    // are held against the kernel in umoci.rs.
    let seconds = (0i64..4, 0i64..1 << 31).prop_map(|(epoch, low)| epoch << 32 | low);
    let time = (seconds, 0u32..1_000_000_000);
    let xattr = proptest::option::of(vec(any::<u8>(), 0..3000));
    (0u16..=0o7777, any::<u32>(), any::<u32>(), time, xattr, kind).prop_map(
        |(mode, uid, gid, (seconds, nanoseconds), xattr, kind)| Node {
            mode,
            uid,
            gid,
            seconds,
            nanoseconds,
            xattr,
            kind,
        },
    )
}

fn flatten(path: &[u8], node: &Node, entries: &mut Vec<Entry>, expected: &mut BTreeMap<Vec<u8>, Viewed>) {
    let (mut entry, kind, contents) = match &node.kind {
        Kind::File(data) => (Entry::file(path, data.clone()), '-', data.clone()),
        Kind::Symlink(target) => (Entry::symlink(path, target), 'l', target.clone()),
        Kind::Fifo => (Entry::fifo(path), 'p', Vec::new()),
        Kind::Directory(_) => (Entry::directory(path), 'd', Vec::new()),
    };
    let time = format!("{}.{:09}", node.seconds, node.nanoseconds);
    entry = entry.mode(node.mode.into()).owner(node.uid.into(), node.gid.into()).mtime(time);
    if let Some(value) = &node.xattr {
        entry = entry.xattr("trusted.random", value.clone());
    }
    entries.push(entry);
    let viewed = Viewed {
        kind,
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        mtime: (node.seconds, node.nanoseconds),
        contents,
    };
    expected.insert(path.to_vec(), viewed);
    if let Kind::Directory(children) = &node.kind {
        for (name, child) in children {
            flatten(&[path, b"/", name].concat(), child, entries, expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_read_back(children in btree_map(name(), node(kind()), 0..20), free in 0u64..4 << 20) {
        let (mut entries, mut expected) = (Vec::new(), BTreeMap::new());
        for (name, child) in &children {
            flatten(name, child, &mut entries, &mut expected);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rootfs.ext4");
        let image = TestImage::plain(&[layer(&entries)]);
        build(&image.open(), &BuildOptions { size: Size::Free(free), ..Default::default() }, &path, &mut |_| {}).unwrap();
        assert_clean(&path);
        let mut seen = view(&path);
        seen.remove(&b""[..]);
        prop_assert_eq!(seen, expected);
    }
}
