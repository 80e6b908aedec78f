//! File name patterns: Go's `filepath.Match`, and the patterns of ignore files, where `**` crosses folders.

/// What is wrong with a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// `[` without `]`, or nothing between them.
    #[error("a [ has no matching ], or nothing between them")]
    Class,
    /// A backslash at the end.
    #[error("it ends with a backslash")]
    Escape,
}

/// One step of a pattern. A path is read character by character; bytes that are no UTF-8 are characters of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Literal(char),
    /// `?`: anything but a slash.
    One,
    /// `*`: anything without slashes.
    Star,
    /// `[a-z]`, `[^a]`.
    Class(Vec<(char, char)>, bool),
    /// `**` or `**/` before more: nothing, or anything that ends with a slash.
    Folders,
    /// `**` at the end.
    Anything,
}

/// A compiled pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(Vec<Token>);

/// How the pattern is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stars {
    /// Go's `filepath.Match`: `**` is no more than `*`.
    One,
    /// Ignore files and `COPY --parents`: `**` is any number of folders.
    Two,
}

impl Pattern {
    /// Compiles the pattern.
    pub fn new(text: &[u8], stars: Stars) -> Result<Self, BadPattern> {
        let characters: Vec<char> = decode(text).collect();
        let mut tokens = Vec::new();
        let mut rest = characters.as_slice();
        while let [first, after @ ..] = rest {
            rest = after;
            tokens.push(match first {
                '*' if stars == Stars::Two && rest.first() == Some(&'*') => {
                    rest = &rest[1..];
                    rest = rest.strip_prefix(&['/']).unwrap_or(rest);
                    if rest.is_empty() { Token::Anything } else { Token::Folders }
                }
                '*' => Token::Star,
                '?' => Token::One,
                '[' => {
                    let (class, after) = class(rest)?;
                    rest = after;
                    class
                }
                '\\' => {
                    let (escaped, after) = rest.split_first().ok_or(BadPattern::Escape)?;
                    rest = after;
                    Token::Literal(*escaped)
                }
                literal => Token::Literal(*literal),
            });
        }
        Ok(Self(tokens))
    }

    /// Whether the path fits.
    pub fn matches(&self, path: &[u8]) -> bool {
        self.run(path, false)
    }

    /// Whether the path or a folder above it fits.
    pub fn matches_or_parent(&self, path: &[u8]) -> bool {
        self.run(path, true)
    }

    /// Whether there are only ordinary characters in it.
    pub(crate) fn literal(&self) -> Option<String> {
        let literal = |token: &Token| if let Token::Literal(literal) = token { Some(*literal) } else { None };
        self.0.iter().map(literal).collect()
    }

    /// All places in the pattern at which the path may be, at once: the time is that of path times pattern.
    fn run(&self, path: &[u8], parents: bool) -> bool {
        let tokens = &self.0;
        let mut here = vec![false; tokens.len() + 1];
        // Inside of the folders that a `**` takes.
        let mut inside = vec![false; tokens.len()];
        let mut next = vec![false; tokens.len() + 1];
        here[0] = true;
        self.skip(&mut here);
        for character in decode(path) {
            if parents && character == '/' && here[tokens.len()] {
                return true;
            }
            next.fill(false);
            let mut alive = false;
            for (index, token) in tokens.iter().enumerate() {
                if inside[index] && character == '/' {
                    next[index + 1] = true;
                }
                if here[index] {
                    match token {
                        Token::Literal(literal) => next[index + 1] |= *literal == character,
                        Token::One => next[index + 1] |= character != '/',
                        Token::Class(ranges, negated) => {
                            let found = ranges.iter().any(|(from, to)| (*from..=*to).contains(&character));
                            next[index + 1] |= found != *negated;
                        }
                        Token::Star => next[index] |= character != '/',
                        Token::Anything => next[index] = true,
                        Token::Folders => {
                            inside[index] = true;
                            next[index + 1] |= character == '/';
                        }
                    }
                }
                alive |= inside[index] | next[index];
            }
            alive |= next[tokens.len()];
            if !alive {
                return false;
            }
            self.skip(&mut next);
            std::mem::swap(&mut here, &mut next);
        }
        here[tokens.len()]
    }

    /// Steps that may take nothing.
    fn skip(&self, here: &mut [bool]) {
        for (index, token) in self.0.iter().enumerate() {
            here[index + 1] |= here[index] && matches!(token, Token::Star | Token::Anything | Token::Folders);
        }
    }
}

/// What stands between the brackets, and the rest.
fn class(mut rest: &[char]) -> Result<(Token, &[char]), BadPattern> {
    let negated = rest.first() == Some(&'^');
    if negated {
        rest = &rest[1..];
    }
    let mut ranges = Vec::new();
    loop {
        if rest.first() == Some(&']') && !ranges.is_empty() {
            return Ok((Token::Class(ranges, negated), &rest[1..]));
        }
        let from = class_character(&mut rest)?;
        let mut to = from;
        if rest.first() == Some(&'-') {
            rest = &rest[1..];
            to = class_character(&mut rest)?;
        }
        ranges.push((from, to));
    }
}

fn class_character(rest: &mut &[char]) -> Result<char, BadPattern> {
    let (first, after) = rest.split_first().ok_or(BadPattern::Class)?;
    *rest = after;
    match first {
        '-' | ']' => Err(BadPattern::Class),
        '\\' => {
            let (escaped, after) = rest.split_first().ok_or(BadPattern::Class)?;
            *rest = after;
            Ok(*escaped)
        }
        other => Ok(*other),
    }
}

/// Characters of a path. A byte that is no UTF-8 becomes one of a private plane, so that it equals itself alone.
fn decode(text: &[u8]) -> impl Iterator<Item = char> {
    text.utf8_chunks().flat_map(|chunk| {
        let stray = chunk.invalid().iter().filter_map(|byte| char::from_u32(0x10_0000 + u32::from(*byte)));
        chunk.valid().chars().chain(stray)
    })
}

/// Whether one name fits Go's pattern; a pattern that is none fits nothing.
pub fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    Pattern::new(pattern, Stars::One).is_ok_and(|pattern| pattern.matches(name))
}

/// Whether the text holds anything but ordinary characters.
pub fn is_pattern(text: &[u8]) -> bool {
    text.iter().any(|byte| b"*?[\\".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_gos() {
        for (pattern, path, expected) in [
            ("*.txt", "a.txt", true),
            ("*.txt", "d/a.txt", false),
            ("*/*.txt", "d/a.txt", true),
            ("a?c", "abc", true),
            ("a?c", "aäc", true),
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a]b", "/b", true),
            ("[\\]]x", "]x", true),
            ("[ab", "a", false),
            ("[]a]", "a", false),
            ("[-]", "-", false),
            ("[a-]", "a", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("a*b*c", "aXbYbZc", true),
            ("*", "", true),
            ("a", "a/b", false),
            ("**", "a", true),
            ("**", "a/b", false),
        ] {
            assert_eq!(name_matches(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
        assert!(name_matches(b"a\xff", b"a\xff") && !name_matches(b"a\xff", b"a\xfe"));
        assert_eq!(Pattern::new(b"a\\", Stars::One), Err(BadPattern::Escape));
    }

    #[test]
    fn two_stars_cross_folders() {
        for (pattern, path, expected) in [
            ("**", "a/b/c", true),
            ("**/c", "a/b/c", true),
            ("**/c", "c", true),
            ("**/c", "abc", false),
            ("a/**", "a/b/c", true),
            ("a/**", "a", false),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/b/c", true),
            ("a/**/c", "a/b/d", false),
            ("a/**/c", "ac", false),
            ("**/*.go", "x/y.go", true),
            ("**/*.go", "y.go", true),
        ] {
            let compiled = Pattern::new(pattern.as_bytes(), Stars::Two).unwrap();
            assert_eq!(compiled.matches(path.as_bytes()), expected, "{pattern} {path}");
        }
        let parent = |pattern: &str, path: &str| {
            Pattern::new(pattern.as_bytes(), Stars::Two).unwrap().matches_or_parent(path.as_bytes())
        };
        assert!(parent("a", "a/b") && parent("*/b", "a/b/c") && !parent("b", "a/b"));
    }

    #[test]
    fn hostile_patterns_end() {
        assert!(!name_matches("*a".repeat(50).as_bytes(), "b".repeat(5000).as_bytes()));
        let deep = Pattern::new(("**/".repeat(200) + "x").as_bytes(), Stars::Two).unwrap();
        assert!(!deep.matches("a/".repeat(500).as_bytes()));
    }
}
