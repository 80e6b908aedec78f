//! `image-builder prune`: removes what builds left, what was used least recently first.
//!
//! ```text
//! looked at         found by           last used            taken away
//! results of steps  cache/steps        the file's time      under the store's lock, if no build that runs may rely on it
//! unpacked layers   cache/layers       the inode's time     renamed under the lock, removed after it
//! cache mounts      cache/mounts       the latest time      renamed if no build runs, then removed
//! root file systems cache/rootfs       the file's time      if no build runs
//! answers of ADD    cache/urls         the file's time      if no build runs
//! blobs             images/            -                    when neither an image nor a result that stays names them
//! ```
//!
//! A build takes a result up under a shared lock, and sets its time and its blob's (see [`oci::Store::has_blob`]); here
//! each is looked at again under the exclusive lock. So a result that a build has found keeps its blob as long as it runs.
//! In user namespaces layers and mounts have folders of their own, whose names begin as those above.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci::layer::Timestamp;
use oci::{Removal, Store};
use serde::Serialize;
use template::DataDir;

use crate::cache::{self, StoredRecord};
use crate::clock;
use crate::console::Console;
use crate::durable::{self, NEW_PREFIX};
use crate::error::{Error, at};

/// What may go.
#[derive(Clone, Copy, Debug, Default)]
pub struct PruneOptions {
    /// What was not used for so long.
    pub max_age: Option<Duration>,
    /// What was used least recently, until no more bytes than these are left.
    pub max_size: Option<u64>,
    /// Everything.
    pub all: bool,
    /// Only tell.
    pub dry_run: bool,
}

/// What went.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PruneReport {
    /// Each thing that was removed, or would be.
    pub removed: Vec<Pruned>,
    /// Bytes that they had.
    pub freed: u64,
    /// Bytes of what is left of the same kinds.
    pub left: u64,
    /// Things that a running build may need, and that were left for that alone.
    pub in_use: usize,
    /// Things that could not be removed, and why.
    pub failed: Vec<String>,
}

/// A thing that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// What it was.
    pub kind: PrunedKind,
    /// Where it was.
    pub path: PathBuf,
    /// Bytes on the disk.
    pub size: u64,
    /// When it was used last, as RFC 3339.
    pub used: String,
}

/// The kinds of things that go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PrunedKind {
    /// The result of a step.
    Step,
    /// An unpacked layer.
    Layer,
    /// What a cache mount of a RUN holds.
    Mount,
    /// A root file system of vm isolation.
    Rootfs,
    /// What a server said of a URL of an ADD.
    Url,
    /// A blob.
    Blob,
}

struct Item {
    kind: PrunedKind,
    path: PathBuf,
    size: u64,
    used: SystemTime,
    /// It is of no use to anybody.
    garbage: bool,
}

/// Removes what the options allow.
pub fn prune(data: &DataDir, options: &PruneOptions, console: &Console) -> Result<PruneReport, Error> {
    let mut report = PruneReport::default();
    if !data.images().join("oci-layout").exists() {
        return Ok(report);
    }
    // Without a session: our own must not hold anything.
    let store = Store::open(&data.images())?;
    let cache = data.cache();
    // What is renamed there must not be swept at the same time.
    let layers = folders_of_all_maps(&cache, "layers")?;
    let _held: Vec<_> = layers.iter().map(|folder| durable::hold(folder)).collect::<Result<_, _>>()?;
    let mut items = {
        let _work = console.work("looking at the cache", None);
        items(&store, &cache)?
    };
    let chosen = choose(&mut items, options);
    let mut trash = Vec::new();
    {
        let removal = store.removal()?;
        for (index, item) in items.iter().enumerate() {
            if !chosen.contains(&index) {
                report.left += item.size;
                continue;
            }
            match take_away(item, &removal, options.dry_run) {
                Ok(Taken::Kept) => {
                    report.in_use += 1;
                    report.left += item.size;
                }
                Ok(Taken::Gone) => report.add(item),
                Ok(Taken::Renamed(path)) => {
                    trash.push(path);
                    report.add(item);
                }
                Err(error) => report.failed.push(error.to_string()),
            }
        }
        let gone: HashSet<_> = report.removed.iter().map(|pruned| pruned.path.clone()).collect();
        blobs(&store, &cache, &removal, &gone, options.dry_run, &mut report)?;
    }
    // Large trees, and nobody waits for the lock any more.
    let _work = (!trash.is_empty()).then(|| console.work("removing", None));
    for path in trash {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                report.failed.push(at::<io::Error>(&path)(error).to_string());
            }
            _ => {}
        }
    }
    Ok(report)
}

impl PruneReport {
    fn add(&mut self, item: &Item) {
        let Item { kind, path, size, used, .. } = item;
        self.freed += size;
        self.removed.push(Pruned { kind: *kind, path: path.clone(), size: *size, used: text_of(*used) });
    }
}

fn items(store: &Store, cache: &Path) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    for record in cache::records(&cache.join("steps"))?.0 {
        let garbage = !is_whole(store, &record);
        let StoredRecord { path, size, used, .. } = record;
        items.push(Item { kind: PrunedKind::Step, path, size, used, garbage });
    }
    for path in of_all_maps(cache, "layers")? {
        let name = name_of(&path);
        // Behind a dot: in which boot it was made.
        let digest = name.split('.').next().unwrap_or_default();
        let is_layer = digest.len() == 32 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_layer && let Some(used) = inode_changed(&path)? {
            items.push(Item { kind: PrunedKind::Layer, size: size_of(&path)?, used, garbage: false, path });
        }
    }
    for path in of_all_maps(cache, "mounts")? {
        if path.is_dir()
            && let Some(used) = mount_used(&path)?
        {
            // What an earlier prune was killed at.
            let garbage = name_of(&path).starts_with(NEW_PREFIX);
            items.push(Item { kind: PrunedKind::Mount, size: size_of(&path)?, used, garbage, path });
        }
    }
    let rootfs = children(&cache.join("rootfs"))?;
    let rootfs =
        rootfs.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "ext4"));
    let rootfs = rootfs.map(|path| (PrunedKind::Rootfs, path));
    let urls = children(&cache.join("urls"))?.into_iter().map(|path| (PrunedKind::Url, path));
    for (kind, path) in rootfs.chain(urls) {
        if let Ok(metadata) = fs::metadata(&path) {
            let used = metadata.modified().map_err(at(&path))?.max(metadata.accessed().unwrap_or(UNIX_EPOCH));
            items.push(Item { kind, size: metadata.blocks() * 512, used, garbage: false, path });
        }
    }
    Ok(items)
}

/// The indexes of what goes. Afterwards the items are in the order of their last use.
fn choose(items: &mut [Item], options: &PruneOptions) -> HashSet<usize> {
    items.sort_by_key(|item| item.used);
    let oldest = options.max_age.and_then(|age| SystemTime::now().checked_sub(age));
    let mut left: u64 = items.iter().map(|item| item.size).sum();
    let mut chosen = HashSet::new();
    for (index, item) in items.iter().enumerate() {
        let too_old = oldest.is_some_and(|oldest| item.used < oldest);
        if options.all || item.garbage || too_old || options.max_size.is_some_and(|most| left > most) {
            chosen.insert(index);
            left -= item.size;
        }
    }
    chosen
}

enum Taken {
    /// Somebody may need it, or has used it meanwhile.
    Kept,
    Gone,
    /// It must still be removed, under this name.
    Renamed(PathBuf),
}

fn take_away(item: &Item, removal: &Removal, dry_run: bool) -> Result<Taken, Error> {
    let Item { kind, path, used, .. } = item;
    let remove_file = |path: &Path| match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at::<io::Error>(path)(error)),
        _ => Ok(()),
    };
    match kind {
        PrunedKind::Step => {
            let now = fs::metadata(path).and_then(|metadata| metadata.modified()).map_err(at(path))?;
            if now != *used || !removal.allows(now) {
                return Ok(Taken::Kept);
            }
            if !dry_run {
                // The record last: without it the other would belong to nothing.
                remove_file(&path.with_extension("files"))?;
                remove_file(path)?;
            }
            Ok(Taken::Gone)
        }
        PrunedKind::Layer => match inode_changed(path)? {
            Some(now) if now == *used && removal.allows(now) => rename(path, dry_run),
            _ => Ok(Taken::Kept),
        },
        // A step that is about to lock them has not done so yet.
        PrunedKind::Mount | PrunedKind::Rootfs | PrunedKind::Url if !removal.is_alone() => Ok(Taken::Kept),
        PrunedKind::Mount => rename(path, dry_run),
        PrunedKind::Rootfs | PrunedKind::Url => {
            if !dry_run {
                remove_file(path)?;
            }
            Ok(Taken::Gone)
        }
        PrunedKind::Blob => Ok(Taken::Kept),
    }
}

fn rename(path: &Path, dry_run: bool) -> Result<Taken, Error> {
    if dry_run {
        return Ok(Taken::Gone);
    }
    let name = format!("{NEW_PREFIX}gone-{}-{}", std::process::id(), name_of(path));
    let target = path.with_file_name(name);
    fs::rename(path, &target).map_err(at(path))?;
    Ok(Taken::Renamed(target))
}

/// Removes the blobs that nothing names any more.
fn blobs(
    store: &Store,
    cache: &Path,
    removal: &Removal,
    gone: &HashSet<PathBuf>,
    dry_run: bool,
    report: &mut PruneReport,
) -> Result<(), Error> {
    let mut named = HashSet::new();
    for entry in store.list()? {
        named.extend(store.reachable(&entry.descriptor).iter().map(|digest| digest.to_string()));
    }
    for record in cache::records(&cache.join("steps"))?.0 {
        if gone.contains(&record.path) {
            continue;
        }
        let layer = record.record.and_then(|record| record.result.layer);
        named.extend(layer.map(|layer| layer.descriptor.digest().to_string()));
    }
    let (blobs, _) = store.blobs()?;
    let sizes: HashMap<_, _> = blobs.iter().map(|blob| (blob.digest.to_string(), blob.size)).collect();
    for blob in &blobs {
        if named.contains(blob.digest.as_ref()) {
            continue;
        }
        let removed = match dry_run {
            true => removal.allows(blob.used),
            false => store.remove_blob(removal, &blob.digest)?,
        };
        match removed {
            true => report.add(&Item {
                kind: PrunedKind::Blob,
                path: store.blob_path(&blob.digest)?,
                size: blob.size,
                used: blob.used,
                garbage: true,
            }),
            false => report.in_use += 1,
        }
    }
    report.left +=
        sizes.iter().filter(|(digest, _)| named.contains(*digest)).map(|(_, size)| size).sum::<u64>();
    Ok(())
}

/// Whether the record can still be used.
fn is_whole(store: &Store, record: &StoredRecord) -> bool {
    let Some(record) = &record.record else { return false };
    let layer = record.result.layer.as_ref();
    layer.is_none_or(|layer| store.has_blob(&layer.descriptor))
}

/// The folder of that name, and those of user namespaces.
pub(crate) fn folders_of_all_maps(cache: &Path, name: &str) -> Result<Vec<PathBuf>, Error> {
    let of_a_map =
        |found: &str| found.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
    let mut folders = children(cache)?;
    folders.retain(|path| of_a_map(&name_of(path)) && path.is_dir());
    Ok(folders)
}

fn of_all_maps(cache: &Path, name: &str) -> Result<Vec<PathBuf>, Error> {
    let folders = folders_of_all_maps(cache, name)?;
    let children: Vec<_> = folders.iter().map(|folder| children(folder)).collect::<Result<_, _>>()?;
    Ok(children.concat())
}

/// The latest time of a cache mount and of what is right below it. `None` when it is gone.
fn mount_used(path: &Path) -> Result<Option<SystemTime>, Error> {
    let mut used = inode_changed(path)?;
    for folder in children(path)? {
        used = used.max(inode_changed(&folder)?);
        if folder.is_dir() {
            for path in children(&folder)? {
                used = used.max(inode_changed(&path)?);
            }
        }
    }
    Ok(used)
}

fn children(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(folder)(error)),
    };
    entries.map(|entry| Ok(entry.map_err(at(folder))?.path())).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `None` when it is gone.
fn inode_changed(path: &Path) -> Result<Option<SystemTime>, Error> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => {
            let seconds = Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or_default());
            let nanoseconds = Duration::from_nanos(u64::try_from(metadata.ctime_nsec()).unwrap_or_default());
            Ok(Some(UNIX_EPOCH + seconds + nanoseconds))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path)(error)),
    }
}

/// The bytes that a tree takes on the disk. What vanishes meanwhile has none.
fn size_of(path: &Path) -> Result<u64, Error> {
    let (mut size, mut seen, mut folders) = (0, HashSet::new(), vec![path.to_owned()]);
    while let Some(folder) = folders.pop() {
        for path in children(&folder).or_else(|error| match &error {
            Error::Io { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => Ok(Vec::new()),
            _ => Err(error),
        })? {
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.nlink() < 2 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
                size += metadata.blocks() * 512;
            }
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(size)
}

fn text_of(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    clock::rfc3339(Timestamp { seconds: i64::try_from(seconds).unwrap_or_default(), nanoseconds: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(age: u64, size: u64, garbage: bool) -> Item {
        let used = SystemTime::now() - Duration::from_secs(age);
        Item { kind: PrunedKind::Layer, path: PathBuf::from(format!("{age}")), size, used, garbage }
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let chosen = |options: PruneOptions| {
            let mut items = vec![item(10, 100, false), item(1000, 100, false), item(100, 100, true)];
            let mut ages: Vec<_> = choose(&mut items, &options)
                .into_iter()
                .map(|index| items[index].path.display().to_string())
                .collect();
            ages.sort();
            ages
        };
        let none = PruneOptions::default();
        assert_eq!(chosen(none), ["100"], "what is of no use");
        assert_eq!(chosen(PruneOptions { all: true, ..none }).len(), 3);
        assert_eq!(chosen(PruneOptions { max_age: Some(Duration::from_secs(500)), ..none }), ["100", "1000"]);
        assert_eq!(chosen(PruneOptions { max_size: Some(150), ..none }), ["100", "1000"]);
        assert_eq!(chosen(PruneOptions { max_size: Some(99), ..none }).len(), 3);
    }
}
