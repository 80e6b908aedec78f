//! Whether a file system is whole, and whether it holds what an image says.

use std::path::Path;

use serde::Serialize;

use crate::Error;
use crate::compare::{Difference, trees};
use crate::ext4::{FileSystem, Finding, Findings};
use crate::source::Source;

/// What [`verify()`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// What is wrong with the file system, up to [`MAX_FINDINGS`](crate::MAX_FINDINGS).
    pub findings: Vec<Finding>,
    /// How much is wrong.
    pub total_findings: u64,
    /// How the file system differs from the source: what is `added` is in the file system only.
    pub differences: Vec<Difference>,
    /// Entries of the file system.
    pub entries: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.total_findings == 0 && self.differences.is_empty()
    }
}

/// Checks the file system in `path`: structure, checksums, bitmaps, counts, links, directories and their indices, copies of
/// the superblock. With `source`, also that it holds the source's entries with the same metadata and data, and no others.
///
/// An error means that it could not be checked: it is no ext4, or has features that are not read.
pub fn verify(path: &Path, source: Option<&Source>) -> Result<VerifyReport, Error> {
    let mut findings = Findings::kept();
    let checked = FileSystem::open_reporting(path, &mut findings)
        .and_then(|fs| fs.check(&mut findings).map(|contents| (fs, contents)));
    let (fs, contents) = match checked {
        Ok(checked) => checked,
        // Too damaged to go on is damaged, too.
        Err(Error::Damaged { finding, .. }) => {
            findings.keep(*finding);
            let (findings, total_findings) = findings.into_parts();
            return Ok(VerifyReport { findings, total_findings, differences: Vec::new(), entries: 0 });
        }
        Err(error) => return Err(error),
    };
    let mut differences = Vec::new();
    if let Some(source) = source {
        let (tree, mut data) = source.read()?;
        differences = trees((&tree, &mut data), (&contents.tree, &mut fs.data()))?;
        data.finish()?;
    }
    let (findings, total_findings) = findings.into_parts();
    Ok(VerifyReport { findings, total_findings, differences, entries: contents.numbers.len() as u64 })
}
