//! `image-builder images`.

use oci::Store;

use super::{line, print};

/// Lists what the local store has.
pub(super) fn images(store: &Store, json: bool) -> anyhow::Result<()> {
    let images = image_builder::images(store)?;
    if json {
        return print(true, &images, "");
    }
    let width = images.iter().map(|image| image.name.len()).max().unwrap_or(0).max(4);
    line(&format!("{:width$}  {:19}  {:>6}  {:>10}  CREATED", "NAME", "DIGEST", "LAYERS", "SIZE"))?;
    for image in images {
        let size =
            image.size.map_or("damaged".to_owned(), |size| format!("{:.1} MiB", size as f64 / 1_048_576.0));
        let layers = image.layers.map_or("-".to_owned(), |layers| layers.to_string());
        let digest: String = image.digest.as_ref().chars().take(19).collect();
        let created = image.created.unwrap_or_default();
        line(&format!("{:width$}  {digest}  {layers:>6}  {size:>10}  {created}", image.name))?;
    }
    Ok(())
}
