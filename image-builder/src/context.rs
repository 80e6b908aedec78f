//! The build context: a folder, less what `.dockerignore` names.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::dockerfile::MAX_DOCKERFILE;
use crate::error::{Error, at};
use crate::pattern::matches;
use crate::rooted::Rooted;

/// The most patterns of a `.dockerignore`; each file is compared with each.
const MAX_PATTERNS: usize = 10_000;

/// The context of a build.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) root: Rooted,
    pub(crate) ignore: Ignore,
}

/// A Dockerfile's text and its name.
pub(crate) struct DockerfileText {
    pub(crate) shown: String,
    pub(crate) contents: Vec<u8>,
}

/// The patterns of a `.dockerignore`; the last one that fits a path decides.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ignore {
    rules: Vec<Rule>,
}

#[derive(Debug, PartialEq, Eq)]
struct Rule {
    pattern: Vec<u8>,
    include: bool,
}

impl Context {
    /// Opens the folder. A `.dockerignore` beside the Dockerfile, under its name, comes before the context's.
    pub(crate) fn open(folder: &Path, dockerfile: &Path) -> Result<Self, Error> {
        if !folder.is_dir() {
            return Err(Error::Invalid {
                what: format!("context {}", folder.display()),
                reason: "expected a folder".to_owned(),
            });
        }
        let mut beside = dockerfile.as_os_str().to_owned();
        beside.push(".dockerignore");
        let mut ignore = Ignore::default();
        for path in [PathBuf::from(beside), folder.join(".dockerignore")] {
            if let Some(text) = read_limited(&path)? {
                ignore = Ignore::parse(&path.display().to_string(), &text)?;
                break;
            }
        }
        Ok(Self { root: Rooted::open(folder)?, ignore })
    }
}

impl DockerfileText {
    /// Reads the Dockerfile: the named one, else `Dockerfile` in the context.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let contents = read_limited(path)?.ok_or_else(|| Error::Invalid {
            what: path.display().to_string(),
            reason: "no such file; name the Dockerfile with -f, or the folder that holds it".to_owned(),
        })?;
        Ok(Self { shown: path.display().to_string(), contents })
    }
}

impl Ignore {
    pub(crate) fn parse(file: &str, text: &[u8]) -> Result<Self, Error> {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let mut rules = Vec::new();
        for line in text.split(|byte| *byte == b'\n') {
            if line.starts_with(b"#") {
                continue;
            }
            let line = line.trim_ascii();
            let (include, line) = match line.strip_prefix(b"!") {
                Some(rest) => (true, rest.trim_ascii()),
                None => (false, line),
            };
            let mut parts: Vec<&[u8]> = Vec::new();
            for part in line.split(|byte| *byte == b'/') {
                match part {
                    b"" | b"." => {}
                    b".." => {
                        parts.pop();
                    }
                    _ => parts.push(part),
                }
            }
            if parts.is_empty() {
                continue;
            }
            rules.push(Rule { pattern: parts.join(&b'/'), include });
            if rules.len() > MAX_PATTERNS {
                return Err(Error::Invalid {
                    what: file.to_owned(),
                    reason: format!("it has more than {MAX_PATTERNS} patterns"),
                });
            }
        }
        Ok(Self { rules })
    }

    /// Whether the path, relative to the context, is left out: it or a folder above it fits.
    pub(crate) fn excludes(&self, path: &[u8]) -> bool {
        let fits = |rule: &Rule| {
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
            ends.chain([path.len()]).any(|end| matches(&rule.pattern, &path[..end]))
        };
        self.rules.iter().rev().find(|rule| fits(rule)).is_some_and(|rule| !rule.include)
    }

    /// Whether something below an excluded folder may come back, so that it must be walked.
    pub(crate) fn has_exceptions(&self) -> bool {
        self.rules.iter().any(|rule| rule.include)
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
    fn the_last_pattern_that_fits_decides() {
        let ignore = Ignore::parse(
            "x",
            b"# comment\n*.log\n/build/\n!build/keep.txt\r\n**/node_modules\n!important.log\n",
        )
        .unwrap();
        for (path, excluded) in [
            ("a.log", true),
            ("important.log", false),
            ("sub/a.log", false),
            ("build", true),
            ("build/x", true),
            ("build/keep.txt", false),
            ("deep/node_modules/x/y", true),
            ("src/main.rs", false),
        ] {
            assert_eq!(ignore.excludes(path.as_bytes()), excluded, "{path}");
        }
        assert!(ignore.has_exceptions());
        assert_eq!(Ignore::parse("x", b"\n#\n.\n/\n").unwrap(), Ignore::default());
        let all = Ignore::parse("x", b"*\n!only\n").unwrap();
        assert!(all.excludes(b"other") && !all.excludes(b"only/child"));
    }
}
