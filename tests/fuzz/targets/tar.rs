//! Any bytes as the tar stream of a layer: changes with checked paths, or an error; and never more data than there is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oci::layer::{Change, Kind, LayerReader};

fuzz_target!(|input: &[u8]| {
    let mut reader = LayerReader::new(input);
    while let Ok(Some(change)) = reader.next_change() {
        let path = match &change {
            Change::Whiteout(path) | Change::Opaque(path) => path,
            Change::Node(node) => &node.path,
        };
        let mut names = path.as_bytes().split(|&byte| byte == b'/');
        assert!(path.as_bytes().is_empty() || names.all(|name| !matches!(name, b"" | b"." | b"..")));
        if let Change::Node(node) = &change
            && let Kind::File { size, offset } = node.kind
        {
            assert!(size == 0 || offset <= input.len() as u64, "{offset} of {}", input.len());
        }
    }
});
