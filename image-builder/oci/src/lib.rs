//! OCI images on disk: names, the local store, layers.
//!
//! ```text
//! ImageReference ---resolve---> Store (an OCI image layout) ---> Image { manifest, config, layers }
//!                                                                        |
//!   LayerWriter <--- entries, overlay upper directory                    | Layer::open: verified, decompressed
//!       |                                                                v
//!       +---> blob + Descriptor + diff_id                 LayerReader ---> Change (node, whiteout, opaque)
//! ```
//!
//! Everything that is read here may be hostile: digests and sizes are checked while the bytes pass, every length that an
//! image can choose has a named bound, and a path that leads out of the image is [`Error::Corrupt`]. The formats are those
//! of the OCI image-spec 1.1 (`manifest.md`, `config.md`, `layer.md`, `image-layout.md`) and Docker's schema 2.

mod archive;
mod digest;
mod docker_archive;
mod error;
mod image;
mod json;
pub mod layer;
mod platform;
mod reference;
mod sessions;
mod skopeo;
mod store;

pub use archive::{Archive, write_archive, write_layout_archive};
pub use digest::{DigestMismatch, Hasher, VerifyingReader};
pub use docker_archive::{open_docker_archive, write_docker_archive};
pub use error::Error;
pub use image::{
    Image, Layer, MAX_LAYERS, MAX_MANIFEST, MAX_UNCOMPRESSED_LAYER, blobs_of, host_platform, manifests_of,
    media_type_of, oci_media_type, select_manifest, select_manifest_for,
};
pub use json::canonical_json;
pub use oci_spec::image::{
    Arch, Config, Descriptor, Digest, History, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os,
    Platform,
};
pub use platform::{parse_platform, platform_fits, platform_text};
pub use reference::{ImageName, ImageReference, InvalidReference};
pub use sessions::{Removal, StoredBlob, Using};
pub use skopeo::SkopeoReference;
pub use store::{BlobWriter, Scratch, Store, Tagged, copy_image};
