//! Which paths of a tree a source of `COPY` or `ADD` names.

use std::collections::HashSet;

use dockerfile::{is_pattern, name_matches};
use oci::layer::LayerPath;

use crate::copy::SourceTree;
use crate::error::Error;
use crate::tree::Last;

/// The most paths of one pattern.
const MAX_FOUND: usize = 1_000_000;

/// A path that was named.
#[derive(Debug)]
pub(crate) struct Named {
    /// The path, relative to the tree.
    pub(crate) path: LayerPath,
    /// With `--parents`, its end, which is kept below the destination.
    pub(crate) kept: Option<LayerPath>,
}

impl Named {
    /// The folders on the way to a path whose parents are kept: where they are, and where they go.
    pub(crate) fn folders(&self) -> Vec<(LayerPath, LayerPath)> {
        let mut folders = Vec::new();
        let mut next = self.kept.as_ref().map(|kept| (self.path.clone(), kept.clone()));
        while let Some((path, kept)) = next {
            next = path.split().zip(kept.split()).map(|((path, _), (kept, _))| (path, kept));
            folders.extend(next.clone().filter(|(_, kept)| !kept.is_root()));
        }
        folders.reverse();
        folders
    }
}

/// The paths that a source names, relative to the tree; of a pattern perhaps none, as with BuildKit. A source that leads outside is refused, also when nothing is there.
/// With `parents`, `**` stands for any number of folders, and what follows `/./` is kept.
pub(crate) fn find(tree: &SourceTree<'_>, written: &str, parents: bool) -> Result<Vec<Named>, Error> {
    let mut depth = 0i64;
    for component in written.split('/') {
        depth += match component {
            "" | "." => 0,
            ".." => -1,
            _ => 1,
        };
        if depth < 0 && tree.is_context {
            return Err(Error::Source {
                what: written.to_owned(),
                reason: format!(
                    "it leads outside of {}: copy the file into it, or build from a folder above",
                    tree.shown
                ),
            });
        }
    }
    let plain = |path: &str| path.split('/').filter(|part| !part.is_empty() && *part != ".").count();
    // How many folders at the front are not kept.
    let pivot = written.find("/./").filter(|_| parents).map_or(0, |at| plain(&written[..at]));
    let named = |path: LayerPath| -> Result<Named, Error> {
        let kept = match parents {
            false => None,
            true => {
                let parts: Vec<&[u8]> = path.as_bytes().split(|byte| *byte == b'/').skip(pivot).collect();
                Some(LayerPath::parse(&parts.join(&b'/'))?)
            }
        };
        Ok(Named { path, kept })
    };
    if !is_pattern(written.as_bytes()) {
        return Ok(vec![named(tree.resolve(written.as_bytes(), Last::Keep)?)?]);
    }
    let mut search = Search { tree, deep: parents, seen: HashSet::new(), found: Vec::new() };
    let pattern: Vec<&str> = written.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    search.below(&LayerPath::default(), &pattern)?;
    let mut found = search.found;
    // Several ways of a `**` may lead to one path.
    found.sort();
    found.dedup();
    found.retain(|path| !tree.excludes(path));
    found.into_iter().map(named).collect()
}

struct Search<'a> {
    tree: &'a SourceTree<'a>,
    deep: bool,
    /// Folders that were searched, with how much of the pattern was left: several `**` lead to one in many ways.
    seen: HashSet<(LayerPath, usize)>,
    found: Vec<LayerPath>,
}

impl Search<'_> {
    fn below(&mut self, folder: &LayerPath, pattern: &[&str]) -> Result<(), Error> {
        let Some((part, rest)) = pattern.split_first() else { return Ok(()) };
        if !self.seen.insert((folder.clone(), pattern.len())) {
            return Ok(());
        }
        let any_depth = self.deep && *part == "**";
        // Links are followed, but not by `**`: they may lead back.
        let last = if any_depth { Last::Keep } else { Last::Follow };
        let real = self.tree.resolve(folder.as_bytes(), last)?;
        if !self.tree.root.entry(&real)?.is_some_and(|entry| entry.is_directory()) {
            return Ok(());
        }
        if any_depth && !rest.is_empty() {
            self.below(folder, rest)?;
        }
        for name in self.tree.root.names(&real)? {
            // Go's patterns for COPY know no `**`: there it is two stars in one name.
            if !any_depth && !name_matches(part.as_bytes(), &name) {
                continue;
            }
            let path = folder.join(&name)?;
            if any_depth {
                self.below(&path, pattern)?;
            }
            if rest.is_empty() {
                self.take(path)?;
            } else if !any_depth {
                self.below(&path, rest)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, path: LayerPath) -> Result<(), Error> {
        if self.found.len() >= MAX_FOUND {
            return Err(Error::Source {
                what: "COPY".to_owned(),
                reason: format!("a pattern fits more than {MAX_FOUND} paths"),
            });
        }
        self.found.push(path);
        Ok(())
    }
}
