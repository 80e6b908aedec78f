//! JSON whose bytes depend on its contents alone.

use serde::Serialize;

/// Serialises with sorted keys: the maps of `oci_spec` iterate in random order, and a digest must not.
pub fn canonical_json(value: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut value = serde_json::to_value(value)?;
    value.sort_all_objects();
    serde_json::to_vec(&value)
}
