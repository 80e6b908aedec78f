//! The last builds: which steps were cached, by their keys. What [`crate::explain()`] reads.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use oci::{Digest, Hasher};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cache::read_bounded;
use crate::durable;
use crate::error::{Error, at};

/// Changes with the form of the file.
const VERSION: u32 = 1;
/// How many builds are remembered, each the last one of its context, Dockerfile and target; the oldest goes first.
const MAX_BUILDS: usize = 200;
/// The longest file that is read: a hundred stages with a hundred long steps each.
const MAX_BUILD: u64 = 16 << 20;

/// A build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BuildLog {
    version: u32,
    /// The folder, as an absolute path.
    pub(crate) context: PathBuf,
    /// The file, as an absolute path.
    pub(crate) dockerfile: PathBuf,
    pub(crate) target: Option<String>,
    /// Milliseconds since 1970.
    pub(crate) began: u64,
    pub(crate) names: Vec<String>,
    /// The image; none after an error.
    pub(crate) digest: Option<Digest>,
    pub(crate) error: Option<String>,
    /// By stage and number.
    pub(crate) steps: Vec<LoggedStep>,
}

/// A step of a build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LoggedStep {
    /// The place of its stage in the Dockerfile, from 0.
    pub(crate) stage: usize,
    /// Its number in the stage, from 2: the first is FROM.
    pub(crate) number: usize,
    /// Both, as the build shows them.
    pub(crate) mark: String,
    /// The instruction as written.
    pub(crate) text: String,
    pub(crate) outcome: StepOutcome,
    /// None for a step that changes the config alone.
    pub(crate) key: Option<Digest>,
    /// Which variables of its environment are build arguments.
    pub(crate) args: Vec<String>,
    /// It was run although the cache may have had its result: `--no-cache`.
    pub(crate) forced: bool,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It changed the config alone.
    Config,
    /// Its result was in the cache.
    Cached,
    /// Another stage of the build had the same step.
    Shared,
    /// It was carried out.
    Executed,
    /// It failed, or was stopped.
    Failed,
}

impl BuildLog {
    pub(crate) fn begin(context: &Path, dockerfile: &Path, target: Option<&str>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            version: VERSION,
            context: context.to_owned(),
            dockerfile: std::path::absolute(dockerfile).unwrap_or_else(|_| dockerfile.to_owned()),
            target: target.map(str::to_owned),
            began: u64::try_from(now.as_millis()).unwrap_or_default(),
            names: Vec::new(),
            digest: None,
            error: None,
            steps: Vec::new(),
        }
    }

    /// Keeps it as the last build of its context, Dockerfile and target.
    pub(crate) fn write(&self, folder: &Path) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        let Self { context, dockerfile, target, .. } = self;
        let name = Hasher::digest_of(json!([context, dockerfile, target]).to_string().as_bytes());
        let path = folder.join(format!("{}.json", name.digest()));
        let text = serde_json::to_vec(self).map_err(|error| at(&path)(std::io::Error::from(error)))?;
        durable::write_lazily(&path, &text)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(at(folder))? {
            let entry = entry.map_err(at(folder))?;
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            files.extend(written.ok().map(|written| (written, entry.path())));
        }
        files.sort();
        for (_, path) in files.iter().take(files.len().saturating_sub(MAX_BUILDS)) {
            // Another build may have taken it away.
            let _ = fs::remove_file(path);
        }
        Ok(())
    }
}

/// Every build that can be read, the newest first.
pub(crate) fn builds(folder: &Path) -> Result<Vec<BuildLog>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(folder)(error)),
    };
    let mut found: Vec<BuildLog> = Vec::new();
    for entry in entries {
        let path = entry.map_err(at(folder))?.path();
        let text = read_bounded(&path, MAX_BUILD).ok();
        let log = text.and_then(|text| serde_json::from_slice::<BuildLog>(&text).ok());
        found.extend(log.filter(|log| log.version == VERSION));
    }
    found.sort_by_key(|log| std::cmp::Reverse(log.began));
    Ok(found)
}
