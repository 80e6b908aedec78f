//! What describes an image, as a registry or an archive gives it: config, manifest and index become an image with as many
//! layers as it says, or an error.
//!
//! The input is the three texts behind each other with a NUL between them. `@0` in one of them stands for the digest of the
//! first text and `#0` for its length, because no fuzzer finds a SHA-256.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use oci::{Descriptor, Hasher, Image, MAX_LAYERS, MediaType, Store};

static STORE: LazyLock<(tempfile::TempDir, Store)> = LazyLock::new(|| {
    // Files in memory, where there are any.
    let memory = Path::new("/dev/shm");
    let folder = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()).expect("a temporary folder");
    let store = Store::open_or_create(folder.path()).expect("a store in an empty folder");
    (folder, store)
});

fuzz_target!(|input: &[u8]| {
    let store = &STORE.1;
    let mut known: Vec<(String, usize)> = Vec::new();
    let mut blobs: Vec<Descriptor> = Vec::new();
    for text in input.splitn(3, |byte| *byte == 0) {
        let mut text = String::from_utf8_lossy(text).into_owned();
        for (index, (digest, length)) in known.iter().enumerate() {
            text =
                text.replace(&format!("@{index}"), digest).replace(&format!("#{index}"), &length.to_string());
        }
        let digest = Hasher::digest_of(text.as_bytes());
        known.push((digest.to_string(), text.len()));
        std::fs::write(store.blob_path(&digest).expect("a SHA-256"), &text).expect("room for a blob");
        let media_type = oci::media_type_of(text.as_bytes()).unwrap_or(MediaType::ImageManifest);
        blobs.push(Descriptor::new(media_type, text.len() as u64, digest));
    }
    for blob in &blobs {
        if let Ok(image) = Image::open(store, blob) {
            assert!(image.layers.len() <= MAX_LAYERS);
            assert_eq!(image.layers.len(), image.config.rootfs().diff_ids().len());
            let named = oci::blobs_of(store, &image.descriptor).expect("an image that was opened");
            assert_eq!(named.len(), image.layers.len() + 1);
            // Its layers are nowhere, or texts that are no layers: an error each.
            image.layers.iter().for_each(|layer| {
                if let Ok(mut stream) = layer.open() {
                    let _ = std::io::copy(&mut stream, &mut std::io::sink());
                }
            });
        }
        for entry in oci::manifests_of(store, blob).unwrap_or_default() {
            if let Some(platform) = entry.platform()
                && let Ok(again) = oci::parse_platform(&oci::platform_text(platform))
                && let Ok(found) = oci::select_manifest_for(store, blob, &again)
            {
                assert_eq!(oci::oci_media_type(found.media_type()), MediaType::ImageManifest);
            }
        }
    }
    for blob in &blobs {
        let _ = std::fs::remove_file(store.blob_path(blob.digest()).expect("a SHA-256"));
    }
});
