//! Mount points that a tree did not have: made for a step, and taken away so that its layer does not show them.

use oci::layer::{LayerPath, Timestamp};
use rustix::fs::FileType;

use crate::error::Error;
use crate::ids;
use crate::rooted::{Rooted, time_of};
use crate::tree::{Escape, Last};

/// The mount points that were made in the tree for a step, and the times that this changed.
#[derive(Debug)]
pub(crate) struct MountPoints {
    made: Vec<LayerPath>,
    parents: Vec<(LayerPath, Timestamp)>,
}

impl MountPoints {
    /// Makes what is missing. The times of the folders above are put back at once, so that the command sees the tree
    /// as it was.
    pub(crate) fn make(root: &Rooted, points: &[(Vec<u8>, bool)]) -> Result<Self, Error> {
        let mut made = Self { made: Vec::new(), parents: Vec::new() };
        for (path, is_directory) in points {
            let path = root.resolve(path, Last::Follow, Escape::Clamp)?;
            if root.stat(&path)?.is_some() {
                continue;
            }
            let mut existing = path.split().map(|(parent, _)| parent).unwrap_or_default();
            while root.stat(&existing)?.is_none() {
                existing = existing.split().map(|(parent, _)| parent).unwrap_or_default();
            }
            let time = root.stat(&existing)?.map(|stat| time_of(&stat)).unwrap_or_default();
            if *is_directory {
                made.made.extend(root.make_directories(&path)?);
            } else {
                let parent = path.split().map(|(parent, _)| parent).unwrap_or_default();
                made.made.extend(root.make_directories(&parent)?);
                root.create(&path)?;
                made.made.push(path);
            }
            root.set_time(&existing, time)?;
            made.parents.push((existing, time));
        }
        Ok(made)
    }

    /// Takes away what was made and is still empty; a folder whose only change was this keeps its time.
    pub(crate) fn remove(&self, root: &Rooted) -> Result<(), Error> {
        let mut before = Vec::new();
        for (parent, _) in &self.parents {
            if let Some(stat) = root.stat(parent)? {
                before.push((parent, time_of(&stat)));
            }
        }
        for path in self.made.iter().rev() {
            let Some(stat) = root.stat(path)? else { continue };
            let empty = match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => stat.st_size == 0,
                FileType::Directory => root.names(path)?.is_empty(),
                _ => false,
            };
            if empty {
                root.remove(path)?;
            }
        }
        for (parent, time) in before {
            if root.stat(parent)?.is_some() {
                root.set_time(parent, time)?;
            }
        }
        Ok(())
    }

    /// Folders of the upper directory that were copied up for a mount point and hold nothing: without them the layer
    /// is what the command did. The upper directory must not be mounted.
    pub(crate) fn prune(&self, upper: &Rooted) -> Result<(), Error> {
        for (parent, time) in &self.parents {
            let mut folder = parent.clone();
            while let Some((above, _)) = folder.split() {
                let Some(stat) = upper.stat(&folder)? else { break };
                let untouched = folder != *parent || time_of(&stat) == *time;
                if !untouched || !upper.names(&folder)?.is_empty() || is_opaque(upper, &folder)? {
                    break;
                }
                let above_time = upper.stat(&above)?.map(|stat| time_of(&stat));
                upper.remove(&folder)?;
                if let Some(time) = above_time {
                    upper.set_time(&above, time)?;
                }
                folder = above;
            }
        }
        Ok(())
    }
}

fn is_opaque(upper: &Rooted, folder: &LayerPath) -> Result<bool, Error> {
    let mut value = [0u8; 8];
    let folder = upper.directory(folder)?;
    let name = if ids::are_limited() { "user.overlay.opaque" } else { "trusted.overlay.opaque" };
    Ok(rustix::fs::fgetxattr(&folder, name, &mut value[..]).is_ok())
}
