//! Any layers on top of each other, and what comes out as an ext4: a plan, or an error.
//!
//! Input: layers, the length of each in two bytes before it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rootfs_tools::{Ext4, Format, NodeId, tree_of_layers};

fuzz_target!(|input: &[u8]| {
    let mut layers = Vec::new();
    let mut rest = input;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (layer, behind) = after.split_at(usize::from(u16::from_le_bytes(*length)).min(after.len()));
        layers.push(layer);
        rest = behind;
    }
    let Ok(mut tree) = tree_of_layers(layers) else { return };
    // A tree has no loops, and no directory two names.
    let mut seen = vec![false; tree.len()];
    let mut stack = vec![NodeId::ROOT];
    while let Some(directory) = stack.pop() {
        assert!(!std::mem::replace(&mut seen[directory.index()], true), "{}", tree.path_of(directory));
        let children = tree.children(directory).into_iter().flat_map(|names| names.values());
        stack.extend(children.map(|name| name.node).filter(|&node| tree.is_directory(node)));
    }
    if let Ok(prepared) = Ext4::new(b"fuzz").prepare(&mut tree) {
        assert!(prepared.length().is_multiple_of(4096));
    }
});
