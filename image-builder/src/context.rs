//! The build context: a folder, less what `.dockerignore` names.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use dockerfile::{Ignore, MAX_DOCKERFILE};

use crate::copy::SourceTree;
use crate::digests::{ContextTree, FileDigests};
use crate::error::{Error, at};
use crate::rooted::Rooted;

/// What a Dockerfile may be called that is not named, in the order in which they are looked for.
const NAMES: [&str; 3] = ["Dockerfile", "dockerfile", "e2b.Dockerfile"];

/// The context of a build.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) files: ContextTree,
    pub(crate) ignore: Ignore,
    /// How errors call it.
    shown: String,
}

/// A Dockerfile's text and its name.
pub(crate) struct DockerfileText {
    pub(crate) shown: String,
    pub(crate) contents: Vec<u8>,
}

impl Context {
    /// Opens the folder; what is known of its files is in the folder `digests`. A `.dockerignore` beside the Dockerfile, under its name, comes before the context's.
    pub(crate) fn open(folder: &Path, dockerfile: &Path, digests: &Path) -> Result<Self, Error> {
        if !folder.is_dir() {
            return Err(Error::Invalid {
                what: format!("context {}", folder.display()),
                reason: "expected a folder".to_owned(),
            });
        }
        let shown = format!("the context {}", folder.display());
        let digests = FileDigests::open(digests, folder)?;
        let files = ContextTree::new(Rooted::open(folder)?, digests);
        Ok(Self { files, ignore: read_ignore(folder, dockerfile)?, shown })
    }

    /// The folder of an archive, for that archive alone.
    pub(crate) fn of_archive(file: &Path, digests: &Path) -> Result<Self, Error> {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let shown = format!("the archive {}", file.display());
        let files = ContextTree::new(Rooted::open(folder)?, FileDigests::open(digests, file)?);
        Ok(Self { files, ignore: Ignore::default(), shown })
    }

    /// Its files, as a copy sees them.
    pub(crate) fn tree(&self) -> SourceTree<'_> {
        SourceTree {
            root: &self.files,
            ignore: Some(&self.ignore),
            is_context: true,
            shown: self.shown.clone(),
        }
    }
}

/// The ignore file of a context: the one beside the Dockerfile, under its name, comes before the context's own.
pub(crate) fn read_ignore(folder: &Path, dockerfile: &Path) -> Result<Ignore, Error> {
    let mut beside = dockerfile.as_os_str().to_owned();
    beside.push(".dockerignore");
    for path in [PathBuf::from(beside), folder.join(".dockerignore")] {
        if let Some(text) = read_limited(&path)? {
            return Ok(Ignore::parse(&path.display().to_string(), &text)?);
        }
    }
    Ok(Ignore::default())
}

/// The Dockerfile of a build: the named one, else the one in the context.
pub(crate) fn dockerfile_path(context: &Path, named: Option<&Path>) -> PathBuf {
    let found = || NAMES.iter().map(|name| context.join(name)).find(|path| path.is_file());
    named.map(Path::to_owned).or_else(found).unwrap_or_else(|| context.join(NAMES[0]))
}

impl DockerfileText {
    /// Reads the Dockerfile.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let contents = read_limited(path)?.ok_or_else(|| Error::Invalid {
            what: path.display().to_string(),
            reason: "no such file; name the Dockerfile with -f, or the folder that holds it".to_owned(),
        })?;
        Ok(Self { shown: path.display().to_string(), contents })
    }
}

fn read_limited(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    if !file.metadata().map_err(at(path))?.is_file() {
        return Err(Error::Invalid {
            what: path.display().to_string(),
            reason: "expected a file".to_owned(),
        });
    }
    let mut text = Vec::new();
    // One byte more than allowed: whoever parses it says that it is too long.
    file.take(MAX_DOCKERFILE as u64 + 1).read_to_end(&mut text).map_err(at(path))?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockerfiles_and_their_ignore_files_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let found = || dockerfile_path(folder, None).file_name().unwrap().to_owned();
        assert_eq!(found(), "Dockerfile", "the name that an error shows");
        fs::write(folder.join("e2b.Dockerfile"), "FROM a").unwrap();
        assert_eq!(found(), "e2b.Dockerfile");
        fs::write(folder.join(".dockerignore"), "a").unwrap();
        let ignore = || read_ignore(folder, &dockerfile_path(folder, None)).unwrap();
        assert!(ignore().excludes(b"a"));
        fs::write(folder.join("e2b.Dockerfile.dockerignore"), "b").unwrap();
        assert!(ignore().excludes(b"b") && !ignore().excludes(b"a"));
        fs::write(folder.join("Dockerfile"), "FROM a").unwrap();
        assert_eq!(found(), "Dockerfile");
        assert!(ignore().excludes(b"a"));
        assert_eq!(dockerfile_path(folder, Some(Path::new("x"))), Path::new("x"));
        fs::write(folder.join(".dockerignore"), "ok\n  [").unwrap();
        let error = read_ignore(folder, &folder.join("Dockerfile")).unwrap_err().to_string();
        assert!(error.contains(".dockerignore:2:3: "), "{error}");
    }
}
