//! `.dockerignore`: which files of a context are left out, as moby's patternmatcher decides it.
//!
//! The last pattern that fits a path, or a folder above it, decides. `!` takes back. A pattern is cleaned as Go cleans
//! paths: doubled slashes, `.` and `..` go, and a slash at the front means the context's root, where every pattern starts.

use crate::error::{Error, Fault, Reason};
use crate::lexer::{MAX_DOCKERFILE, raw_lines};
use crate::pattern::{Pattern, Stars};
use crate::position::Position;

/// The most patterns of a file; each path is compared with each.
const MAX_PATTERNS: usize = 10_000;

/// The patterns of an ignore file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignore {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    matcher: Matcher,
    include: bool,
}

/// Most patterns need no steps of their own, and contexts have many files.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Matcher {
    /// Ordinary characters.
    Exact(Vec<u8>),
    /// `a/b**`: everything that begins so.
    Prefix(Vec<u8>),
    /// `**a/b`: everything that ends so. `**/a` is also `a`.
    Suffix(Vec<u8>),
    /// The rest.
    Steps(Pattern),
}

impl Ignore {
    /// Reads an ignore file; `file` is its name in errors.
    pub fn parse(file: &str, text: &[u8]) -> Result<Self, Error> {
        let mut rules = Vec::new();
        for (index, line) in raw_lines(text).enumerate() {
            let column = 1 + line.len() - line.trim_ascii_start().len();
            let fail = |reason: Reason| {
                let shown = String::from_utf8_lossy(line).into_owned();
                Fault::new(Position { line: index + 1, column }, reason).in_file(file, shown)
            };
            if text.len() > MAX_DOCKERFILE {
                let (got, limit) = (text.len(), MAX_DOCKERFILE);
                return Err(fail(Reason::TooMuch { what: "the file", got, limit }));
            }
            let rule = match rule(line) {
                None => continue,
                Some(Ok(rule)) => rule,
                Some(Err(problem)) => {
                    let expected = "PATH, PATTERN or !PATTERN";
                    return Err(fail(Reason::Arguments { keyword: "pattern", problem, expected }));
                }
            };
            if rules.len() == MAX_PATTERNS {
                let (got, limit) = (MAX_PATTERNS + 1, MAX_PATTERNS);
                return Err(fail(Reason::TooMuch { what: "the file's patterns", got, limit }));
            }
            rules.push(rule);
        }
        Ok(Self { rules })
    }

    /// Patterns as `COPY --exclude` has them: those that fit are left out.
    pub fn of_patterns<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let rules = patterns.into_iter().filter_map(|pattern| rule(pattern.as_bytes()));
        Ok(Self { rules: rules.collect::<Result<_, _>>()? })
    }

    /// Whether the path, relative to the context, is left out.
    pub fn excludes(&self, path: &[u8]) -> bool {
        self.rules.iter().rev().find(|rule| rule.matcher.fits(path)).is_some_and(|rule| !rule.include)
    }

    /// Whether something below an excluded folder may come back, so that it must be walked.
    pub fn has_exceptions(&self) -> bool {
        self.rules.iter().any(|rule| rule.include)
    }

    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

impl Matcher {
    fn new(pattern: &[u8]) -> Result<Self, String> {
        let steps = Pattern::new(pattern, Stars::Two).map_err(|error| error.to_string())?;
        if !pattern.contains(&b'\\') {
            if steps.literal().is_some() {
                return Ok(Self::Exact(pattern.to_vec()));
            }
            let literal =
                |part: &[u8]| Pattern::new(part, Stars::Two).is_ok_and(|part| part.literal().is_some());
            // As patternmatcher has it, these are about characters, not names: `**a` fits `ba` too.
            if let Some(suffix) = pattern.strip_prefix(b"**").filter(|rest| literal(rest)) {
                return Ok(Self::Suffix(suffix.to_vec()));
            }
            if let Some(prefix) = pattern.strip_suffix(b"**").filter(|rest| literal(rest)) {
                return Ok(Self::Prefix(prefix.to_vec()));
            }
        }
        Ok(Self::Steps(steps))
    }

    /// Whether the path or a folder above it fits.
    fn fits(&self, path: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => {
                path.strip_prefix(exact.as_slice()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
            }
            Self::Prefix(prefix) => path.starts_with(prefix),
            Self::Suffix(suffix) => {
                let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
                ends.chain([path.len()]).any(|end| {
                    let path = &path[..end];
                    path.ends_with(suffix) || suffix.strip_prefix(b"/") == Some(path)
                })
            }
            Self::Steps(pattern) => pattern.matches_or_parent(path),
        }
    }
}

/// One line; `None` when it says nothing.
fn rule(line: &[u8]) -> Option<Result<Rule, String>> {
    if line.starts_with(b"#") {
        return None;
    }
    let line = line.trim_ascii();
    if line.is_empty() {
        return None;
    }
    let (include, pattern) = match line.strip_prefix(b"!") {
        Some(rest) => (true, rest.trim_ascii()),
        None => (false, line),
    };
    if pattern.is_empty() {
        return Some(Err("nothing follows the !".to_owned()));
    }
    let cleaned = clean(pattern);
    let cleaned = match cleaned.strip_prefix(b"/") {
        Some(rest) if !rest.is_empty() => rest,
        _ => &cleaned,
    };
    Some(Matcher::new(cleaned).map(|matcher| Rule { matcher, include }))
}

/// Go's `path.Clean`.
fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match parts.last() {
                Some(last) if *last != b".." => drop(parts.pop()),
                _ if rooted => {}
                _ => parts.push(part),
            },
            _ => parts.push(part),
        }
    }
    let joined = parts.join(&b'/');
    match (rooted, joined.is_empty()) {
        (true, _) => [b"/", &joined[..]].concat(),
        (false, true) => b".".to_vec(),
        (false, false) => joined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pattern_that_fits_decides() {
        let text = b"# comment\n*.log\n/build/\n!build/keep.txt\r\n**/node_modules\n!important.log\n";
        let ignore = Ignore::parse("x", text).unwrap();
        for (path, excluded) in [
            ("a.log", true),
            ("important.log", false),
            ("sub/a.log", false),
            ("build", true),
            ("build/x", true),
            ("build/keep.txt", false),
            ("deep/node_modules/x/y", true),
            ("node_modules", true),
            ("my_node_modules", false),
            ("src/main.rs", false),
        ] {
            assert_eq!(ignore.excludes(path.as_bytes()), excluded, "{path}");
        }
        assert!(ignore.has_exceptions());
        let all = Ignore::parse("x", b"*\n!only\n").unwrap();
        assert!(all.excludes(b"other") && !all.excludes(b"only/child"));
    }

    #[test]
    fn patterns_are_cleaned_as_go_does() {
        for (pattern, cleaned) in [
            ("a/../b", "b"),
            ("./a//b/", "a/b"),
            ("/../a", "/a"),
            ("../a", "../a"),
            (".", "."),
            ("/", "/"),
            ("a/..", "."),
        ] {
            assert_eq!(clean(pattern.as_bytes()), cleaned.as_bytes(), "{pattern}");
        }
    }
}
