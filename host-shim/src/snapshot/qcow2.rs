//! An empty qcow2 overlay, without qemu-img.
//!
//! ```text
//! cluster 0            header (version 3), the backing file's format and name
//! cluster 1            refcount table: one entry, cluster 2
//! cluster 2            refcount block: 1 for each cluster of this file
//! cluster 3..          L1 table: all zero, so every cluster is read from the backing file
//! ```
//!
//! Source of the format: QEMU, docs/interop/qcow2.txt. All numbers are big-endian.

/// log2 of the cluster size.
const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster, QEMU's default.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes that an L1 entry stands for: one cluster of 8-byte entries, each a cluster.
const L1_REACH: u64 = CLUSTER / 8 * CLUSTER;
/// 16-bit counters that one refcount block has.
const REFCOUNTS: u64 = CLUSTER / 2;
/// log2 of the bits of a counter.
const REFCOUNT_ORDER: u32 = 4;

const MAGIC: &[u8; 4] = b"QFI\xfb";
const VERSION: u32 = 3;
/// Length of a version 3 header without optional fields.
const HEADER: u32 = 104;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_END: u32 = 0;

/// Clusters before the L1 table.
const FIXED_CLUSTERS: u64 = 3;

/// The largest disk for which the L1 table's counters fit into one block.
pub(super) const MAX_SIZE: u64 = (REFCOUNTS - FIXED_CLUSTERS) * (CLUSTER / 8) * L1_REACH;

/// The clusters of an empty overlay of `size` bytes over the raw file `backing`, and the length of the whole file: what
/// is behind these clusters is zero. `size` is at most [`MAX_SIZE`].
pub(super) fn empty_overlay(size: u64, backing: &str) -> (Vec<u8>, u64) {
    let l1_entries = size.div_ceil(L1_REACH);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    let clusters = FIXED_CLUSTERS + l1_clusters;

    let format = b"raw\0\0\0\0\0"; // Padded to a multiple of 8; 3 of it count.
    let name_at = u64::from(HEADER) + 8 + format.len() as u64 + 8;

    let mut image = Vec::with_capacity((FIXED_CLUSTERS * CLUSTER) as usize);
    let word = |image: &mut Vec<u8>, value: u32| image.extend(value.to_be_bytes());
    let long = |image: &mut Vec<u8>, value: u64| image.extend(value.to_be_bytes());
    image.extend(MAGIC);
    word(&mut image, VERSION);
    long(&mut image, name_at);
    word(&mut image, backing.len() as u32);
    word(&mut image, CLUSTER_BITS);
    long(&mut image, size);
    word(&mut image, 0); // crypt_method
    word(&mut image, l1_entries as u32);
    long(&mut image, FIXED_CLUSTERS * CLUSTER); // l1_table_offset
    long(&mut image, CLUSTER); // refcount_table_offset
    word(&mut image, 1); // refcount_table_clusters
    word(&mut image, 0); // nb_snapshots
    long(&mut image, 0); // snapshots_offset
    long(&mut image, 0); // incompatible_features
    long(&mut image, 0); // compatible_features
    long(&mut image, 0); // autoclear_features
    word(&mut image, REFCOUNT_ORDER);
    word(&mut image, HEADER);
    debug_assert_eq!(image.len(), HEADER as usize);
    word(&mut image, EXTENSION_BACKING_FORMAT);
    word(&mut image, 3);
    image.extend(format);
    word(&mut image, EXTENSION_END);
    word(&mut image, 0);
    debug_assert_eq!(image.len() as u64, name_at);
    image.extend(backing.as_bytes());

    image.resize(CLUSTER as usize, 0);
    long(&mut image, 2 * CLUSTER);
    image.resize(2 * CLUSTER as usize, 0);
    for _ in 0..clusters {
        image.extend(1_u16.to_be_bytes());
    }
    (image, clusters * CLUSTER)
}
