//! `image-builder fsck`: is everything in the store and the cache what it says it is?
//!
//! Builds check what they read; this reads everything. What a killed program leaves half made is no damage: the next build
//! sweeps it. Unpacked layers have no digests of their own; `prune --all` and the next build make them anew.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use oci::{Descriptor, Digest, Hasher, Store, StoredBlob, blobs_of, select_manifest};
use serde::Serialize;
use template::DataDir;

use crate::cache;
use crate::console::{Console, Work};
use crate::durable;
use crate::error::{Error, at};
use crate::prune;

/// More threads than this wait for the same disk.
const MAX_THREADS: usize = 8;
const READ_BUFFER: usize = 256 << 10;

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FsckReport {
    /// Blobs that were read.
    pub blobs: usize,
    /// Results of steps that were looked at.
    pub steps: usize,
    /// Images that were looked at.
    pub images: usize,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Something that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub kind: FindingKind,
    /// Where it is; of an image its name.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
    /// Whether it was removed.
    pub removed: bool,
}

/// What something is that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// The list of images.
    Index,
    /// A blob.
    Blob,
    /// An image with a name.
    Image,
    /// The result of a step.
    Step,
    /// A file that belongs to nothing.
    Stray,
    /// What a killed program left, or a running one is writing: no damage.
    HalfMade,
}

impl FsckReport {
    /// Whether damage is left.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|finding| !finding.removed && finding.kind != FindingKind::HalfMade)
    }

    fn add(
        &mut self,
        kind: FindingKind,
        place: impl Into<String>,
        problem: impl Into<String>,
        removed: bool,
    ) {
        self.findings.push(Finding { kind, place: place.into(), problem: problem.into(), removed });
    }
}

/// Looks at everything, and removes damage if `repair` says so.
pub fn fsck(data: &DataDir, repair: bool, console: &Console) -> Result<FsckReport, Error> {
    let mut report = FsckReport::default();
    let folder = data.images();
    if folder.join("oci-layout").exists() {
        index(&folder, repair, &mut report)?;
        let store = Store::open(&folder)?;
        let damaged = blobs(&store, repair, console, &mut report)?;
        // With a list that cannot be read there are no images to look at.
        if !report.findings.iter().any(|finding| finding.kind == FindingKind::Index && !finding.removed) {
            images(&store, &damaged, repair, &mut report)?;
        }
        steps(&store, &data.cache().join("steps"), &damaged, repair, &mut report)?;
        half_made(store.half_made()?, &folder.join(".incoming"), repair, &mut report)?;
    }
    let cache = data.cache();
    let mut folders = vec![cache.join("steps"), cache.join("builds"), cache.join("contexts")];
    // Layers have a folder for each map of a user namespace.
    folders.extend(prune::folders_of_all_maps(&cache, "layers")?);
    for folder in folders {
        half_made(durable::half_made(&folder)?, &folder, repair, &mut report)?;
    }
    report.findings.sort_by(|a, b| (a.kind as u8, &a.place).cmp(&(b.kind as u8, &b.place)));
    Ok(report)
}

fn index(folder: &Path, repair: bool, report: &mut FsckReport) -> Result<(), Error> {
    let file = folder.join("index.json");
    let Err(error) = Store::open(folder)?.list() else { return Ok(()) };
    if repair {
        if file.exists() {
            // The names in it may be of use to somebody who can read it.
            fs::rename(&file, folder.join("index.json.damaged")).map_err(at(&file))?;
        }
        // Without its marker an empty layout is made, in which the blobs stay.
        let marker = folder.join("oci-layout");
        fs::remove_file(&marker).map_err(at(&marker))?;
        Store::open_or_create(folder)?;
    }
    report.add(FindingKind::Index, file.display().to_string(), error.to_string(), repair);
    Ok(())
}

/// Reads every blob, and gives the digests of the damaged ones.
fn blobs(
    store: &Store,
    repair: bool,
    console: &Console,
    report: &mut FsckReport,
) -> Result<HashSet<String>, Error> {
    let (blobs, strays) = store.blobs()?;
    report.blobs = blobs.len();
    let work = console.work("reading blobs", Some(blobs.iter().map(|blob| blob.size).sum()));
    let (next, damaged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(blob) = blobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Some(problem) = damage(store, blob, Some(&work)) {
                        damaged.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((blob, problem));
                    }
                }
            });
        }
    });
    let damaged = damaged.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut digests = HashSet::new();
    for (blob, problem) in damaged {
        let path = store.blob_path(&blob.digest)?;
        if repair {
            let _removal = store.removal()?;
            // It may have been written again meanwhile.
            if damage(store, blob, None).is_some() {
                remove(&path)?;
            }
        }
        digests.insert(blob.digest.to_string());
        report.add(FindingKind::Blob, path.display().to_string(), problem, repair);
    }
    for path in strays {
        if repair {
            remove(&path)?;
        }
        report.add(FindingKind::Stray, path.display().to_string(), "no blob has such a name", repair);
    }
    Ok(digests)
}

/// What is wrong with the blob's bytes. One that is gone is not damaged: somebody removed it.
fn damage(store: &Store, blob: &StoredBlob, work: Option<&Work>) -> Option<String> {
    let read = || -> Result<Digest, Error> {
        let path = store.blob_path(&blob.digest)?;
        let mut file = fs::File::open(&path).map_err(at(&path))?;
        let (mut hasher, mut buffer) = (Hasher::new(), vec![0; READ_BUFFER]);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(hasher.finish().0),
                Ok(count) => {
                    hasher.update(&buffer[..count]);
                    if let Some(work) = work {
                        work.advance(count as u64);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(at(&path)(error)),
            }
        }
    };
    match read() {
        Ok(digest) if digest == blob.digest => None,
        Ok(digest) => Some(format!("its bytes have the digest {digest}")),
        Err(Error::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Looks whether each image in the list has everything.
fn images(
    store: &Store,
    damaged: &HashSet<String>,
    repair: bool,
    report: &mut FsckReport,
) -> Result<(), Error> {
    let entries = store.list()?;
    report.images = entries.len();
    let mut broken = HashMap::new();
    for entry in &entries {
        if let Some(problem) = missing(store, &entry.descriptor, damaged) {
            broken.insert((entry.name.clone(), entry.descriptor.digest().to_string()), problem);
        }
    }
    if repair && !broken.is_empty() {
        store.untag_all(|entry| {
            !broken.contains_key(&(entry.name.clone(), entry.descriptor.digest().to_string()))
        })?;
    }
    for ((name, digest), problem) in broken {
        report.add(FindingKind::Image, name.unwrap_or(digest), problem, repair);
    }
    Ok(())
}

/// What an image lacks.
fn missing(store: &Store, descriptor: &Descriptor, damaged: &HashSet<String>) -> Option<String> {
    let lacks = |blob: &Descriptor| {
        let path = store.blob_path(blob.digest()).ok();
        let length = path.and_then(|path| fs::metadata(path).ok()).map(|metadata| metadata.len());
        match length {
            _ if damaged.contains(blob.digest().as_ref()) => {
                Some(format!("blob {} is damaged", blob.digest()))
            }
            None => Some(format!("blob {} is missing", blob.digest())),
            Some(length) if length != blob.size() => {
                Some(format!("blob {} has {length} bytes, expected {}", blob.digest(), blob.size()))
            }
            Some(_) => None,
        }
    };
    let named = || -> Result<Vec<Descriptor>, oci::Error> {
        let manifest = select_manifest(store, descriptor)?;
        Ok([vec![manifest.clone()], blobs_of(store, &manifest)?].concat())
    };
    lacks(descriptor).or_else(|| match named() {
        Ok(blobs) => blobs.iter().find_map(lacks),
        Err(error) => Some(error.to_string()),
    })
}

fn steps(
    store: &Store,
    folder: &Path,
    damaged: &HashSet<String>,
    repair: bool,
    report: &mut FsckReport,
) -> Result<(), Error> {
    let (records, strays) = cache::records(folder)?;
    report.steps = records.len();
    for record in records {
        let problem = match record.record.as_ref().map(|record| record.result.layer.as_ref()) {
            None => Some("it cannot be read, or is not the result that its name promises".to_owned()),
            Some(Some(layer)) => {
                let digest = layer.descriptor.digest();
                let whole = !damaged.contains(digest.as_ref()) && store.has_blob(&layer.descriptor);
                (!whole).then(|| format!("its layer {digest} is missing or damaged"))
            }
            Some(None) => None,
        };
        let Some(problem) = problem else { continue };
        if repair {
            remove(&record.files)?;
            remove(&record.path)?;
        }
        report.add(FindingKind::Step, record.path.display().to_string(), problem, repair);
    }
    for path in strays {
        if repair {
            remove(&path)?;
        }
        report.add(FindingKind::Stray, path.display().to_string(), "no result has such a name", repair);
    }
    Ok(())
}

fn half_made(paths: Vec<PathBuf>, lock: &Path, repair: bool, report: &mut FsckReport) -> Result<(), Error> {
    if paths.is_empty() {
        return Ok(());
    }
    // Writers share this lock as long as they write.
    let folder = fs::File::open(lock).map_err(at(lock))?;
    let nobody = folder.try_lock().is_ok();
    for path in paths {
        let problem = match nobody {
            true => "a program was ended while it wrote it",
            false => "a program that is at work writes it, or was ended before",
        };
        let removed = repair && nobody;
        if removed {
            remove(&path)?;
        }
        report.add(FindingKind::HalfMade, path.display().to_string(), problem, removed);
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), Error> {
    let is_folder = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at::<io::Error>(path)(error)),
        _ => Ok(()),
    }
}
