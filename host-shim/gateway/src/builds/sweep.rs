//! What nobody needs any more: templates and images of builds without a tag, folders of builds without a record.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use sandbox_folder::SPEC;
use serde_json::Value;
use template::TemplateFolder;

use super::name::{base_image, folder, image, of_folder};
use super::{BuildId, Shared, TemplateId, runner};
use crate::store::{BuildRecord, StoreError};

/// The longest spec of a sandbox that is read: its environment is the most of it.
const MAX_SPEC: u64 = 16 << 20;

impl Shared {
    /// Removes what nobody needs any more. What cannot be removed now is tried again by the next.
    pub(super) async fn sweep(&self) {
        let _one = self.sweeping.lock().await;
        if let Err(error) = self.try_sweep().await {
            tracing::error!(%error, "what builds have left cannot be removed; it is tried again");
        }
    }

    async fn try_sweep(&self) -> Result<(), SweepError> {
        // Folders first: one that is made after this look is not looked at.
        let (builds, sandboxes) = (self.folders.builds.clone(), self.config.data.sandboxes());
        let look = move || Ok::<_, io::Error>((names(&builds)?, in_use(&sandboxes)?));
        let (folders, used) = tokio::task::spawn_blocking(look).await.map_err(io::Error::other)??;
        let records: BTreeMap<BuildId, BuildRecord> =
            self.store.builds().await?.into_iter().map(|record| (record.id.clone(), record)).collect();
        let tagged: BTreeSet<BuildId> = self.store.tagged_builds().await?.into_iter().collect();
        for (template, build) in folders {
            let record = records.get(&build);
            let needed = tagged.contains(&build)
                || record.is_some_and(|record| record.stage.is_active())
                || self.state().knows(&build)
                || used.contains(&folder(&template, &build));
            if !needed {
                self.discard(&template, &build, record.is_none()).await?;
            }
        }
        Ok(())
    }

    /// Removes a build's template and images, and where nobody knows it any more its log.
    async fn discard(
        &self,
        template: &TemplateId,
        build: &BuildId,
        forgotten: bool,
    ) -> Result<(), SweepError> {
        let dir = self.folders.builds.join(folder(template, build));
        let marker = dir.join(DISCARDED);
        if !marker.exists() {
            let path = self.config.data.templates().join(folder(template, build));
            let delete = move || match TemplateFolder::open(&path) {
                Ok(folder) => folder.delete().map_err(io::Error::other),
                Err(template::Error::Missing { .. }) => Ok(()),
                Err(_) => fs::remove_dir_all(&path),
            };
            tokio::task::spawn_blocking(delete).await.map_err(io::Error::other)??;
            for name in [image(template, build), base_image(template, build)] {
                let mut command = runner::command(&self.config);
                // A build that failed early has none of them, which is no error here.
                let _ = command.args(["rm", &name]).stdin(std::process::Stdio::null()).output().await;
            }
            fs::write(&marker, b"")?;
            tracing::info!(%build, %template, "removed what a build has left");
        }
        if forgotten {
            fs::remove_dir_all(&dir)?;
        }
        Ok(())
    }
}

/// In a build's folder: its template and its images are gone.
const DISCARDED: &str = "discarded";

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn names(folder: &Path) -> io::Result<Vec<(TemplateId, BuildId)>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_str().and_then(of_folder)));
    names.filter_map(Result::transpose).collect()
}

/// The templates of builds that sandboxes have: those that are paused need them to go on.
fn in_use(sandboxes: &Path) -> io::Result<BTreeSet<String>> {
    let mut used = BTreeSet::new();
    let entries = match fs::read_dir(sandboxes) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(used),
        Err(error) => return Err(error),
    };
    for sandbox in entries {
        let Ok(file) = fs::File::open(sandbox?.path().join(SPEC)) else { continue };
        let spec: Option<Value> = serde_json::from_reader(io::Read::take(file, MAX_SPEC)).ok();
        let template = spec.as_ref().and_then(|spec| spec["template"].as_str());
        if let Some(name) = template.and_then(|path| Path::new(path).file_name()?.to_str()) {
            used.insert(name.to_owned());
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sandboxes_have_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        assert!(in_use(&dir.path().join("none")).unwrap().is_empty());
        for (id, spec) in [("a", r#"{"template":"/data/templates/x.y"}"#), ("b", "{"), ("c", "{}")] {
            fs::create_dir(dir.path().join(id)).unwrap();
            fs::write(dir.path().join(id).join(SPEC), spec).unwrap();
        }
        assert_eq!(in_use(dir.path()).unwrap(), BTreeSet::from(["x.y".to_owned()]));
    }
}
