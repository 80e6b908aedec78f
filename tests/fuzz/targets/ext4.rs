//! A file system with anything written over it: read and verified to an end, within what the image has.
//!
//! Input: one byte that chooses the image and whether checksums count, then patches: three bytes of place, one of length,
//! and the bytes.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rootfs_tools::{
    Attributes, Content, DataSource, Ext4, FileData, FileSystem, Node, NodeId, Place, Tree, Xattr, write_tree,
};

/// With a few entries of each type, and with an indexed directory.
static IMAGES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [image(3), image(400)]);

fn image(files: usize) -> Vec<u8> {
    let mut tree = Tree::new();
    let mut add = |name: &str, content: Content| {
        let xattrs = [("user.large", 900), ("user.small", 1)];
        let xattrs = xattrs
            .map(|(name, length)| Xattr { name: name.as_bytes().into(), value: vec![7; length].into() });
        let attributes = Attributes { mode: 0o755, xattrs: xattrs.into(), ..Attributes::default() };
        let node = tree.add(Node { attributes, content });
        tree.link(NodeId::ROOT, name.as_bytes(), node, 0);
        node
    };
    let place = Place { source: 0, offset: 0 };
    add("file", Content::File { size: 9000, data: FileData::Whole(place) });
    add("fast", Content::Symlink(b"file"[..].into()));
    add("slow", Content::Symlink(vec![b'x'; 100].into()));
    add("null", Content::CharDevice { major: 1, minor: 3 });
    let directory = add("directory", Content::Directory(Default::default()));
    for number in 0..files {
        let node = tree.add(Node { attributes: Attributes::default(), content: Content::Fifo });
        tree.link(directory, format!("a-name-of-some-length-{number}").as_bytes(), node, 0);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let data = [b'd'; 9000];
    let mut source: &[&[u8]] = &[&data];
    write_tree(&mut tree, &Ext4::new(b"fuzz"), &mut source, &path).unwrap();
    std::fs::read(&path).unwrap()
}

fuzz_target!(|input: &[u8]| {
    let Some((&which, mut patches)) = input.split_first() else { return };
    let mut bytes = IMAGES[usize::from(which & 1)].clone();
    while let [a, b, c, length, rest @ ..] = patches {
        let at = u32::from_le_bytes([*a, *b, *c, 0]) as usize % bytes.len();
        let (patch, behind) = rest.split_at(usize::from(*length).min(rest.len()));
        let end = (at + patch.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&patch[..end - at]);
        patches = behind;
    }
    let opened =
        if which & 2 == 0 { FileSystem::open_unchecked(bytes) } else { FileSystem::open_bytes(bytes) };
    let Ok(fs) = opened else { return };
    let _ = fs.check_all();
    let Ok(contents) = fs.tree() else { return };
    let mut stack = vec![NodeId::ROOT];
    let mut buffer = [0; 4096];
    while let Some(id) = stack.pop() {
        if let Content::File { size, data } = &contents.tree.node(id).content {
            for run in data.runs(*size) {
                assert!(run.start + run.length <= *size);
                let first = run.length.min(buffer.len() as u64) as usize;
                fs.data().read(run.place, &mut buffer[..first]).unwrap();
            }
        }
        stack.extend(
            contents.tree.children(id).into_iter().flat_map(|names| names.values()).map(|name| name.node),
        );
    }
});
