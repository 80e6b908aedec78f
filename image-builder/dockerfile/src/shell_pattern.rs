//! The patterns of `${v#p}`, `${v%p}` and `${v/p/r}`: `*` and `?`, as in the shell, without brackets.

/// The longest pattern: each character may be compared with each of the value.
const MAX_PATTERN: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Literal(char),
    One,
}

/// A pattern, cut at its stars.
#[derive(Debug)]
pub(crate) struct ShellPattern {
    /// Never empty: one more than there are stars.
    blocks: Vec<Vec<Token>>,
}

/// Which of several matches is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    Shortest,
    Longest,
}

impl ShellPattern {
    /// Reads the pattern; the error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.len() > MAX_PATTERN {
            return Err("it is longer than 1024 bytes");
        }
        let mut blocks = Vec::new();
        let mut block = Vec::new();
        let mut characters = text.chars().peekable();
        while let Some(character) = characters.next() {
            let token = match character {
                '*' => {
                    blocks.push(std::mem::take(&mut block));
                    continue;
                }
                '?' => Token::One,
                '\\' => match characters.next() {
                    Some(escaped @ ('*' | '?' | '\\' | '}' | '/')) => Token::Literal(escaped),
                    _ => return Err("a backslash may stand only before * ? \\ } and /"),
                },
                other => Token::Literal(other),
            };
            block.push(token);
        }
        blocks.push(block);
        Ok(Self { blocks })
    }

    /// The value without the prefix that fits.
    pub(crate) fn trim_prefix(&self, value: &str, length: Length) -> String {
        let characters: Vec<char> = value.chars().collect();
        let end = self.prefix(&characters, length).unwrap_or(0);
        characters[end..].iter().collect()
    }

    /// The value without the suffix that fits.
    pub(crate) fn trim_suffix(&self, value: &str, length: Length) -> String {
        let mut characters: Vec<char> = value.chars().rev().collect();
        let reversed = |block: &Vec<Token>| block.iter().rev().copied().collect();
        let pattern = Self { blocks: self.blocks.iter().rev().map(reversed).collect() };
        let end = pattern.prefix(&characters, length).unwrap_or(0);
        characters.drain(..end);
        characters.iter().rev().collect()
    }

    /// The value with the first or every match replaced. `None` when it grows beyond `limit`.
    pub(crate) fn replace(&self, value: &str, with: &str, all: bool, limit: usize) -> Option<String> {
        let characters: Vec<char> = value.chars().collect();
        let mut out = String::new();
        let mut at = 0;
        let mut done = false;
        let mut after_match = false;
        while !done && at <= characters.len() {
            match self.prefix(&characters[at..], Length::Longest) {
                // An empty match directly behind another match is none.
                Some(0) if after_match => after_match = false,
                Some(length) => {
                    out.push_str(with);
                    at += length;
                    done = !all;
                    after_match = length > 0;
                    if length > 0 {
                        continue;
                    }
                }
                // What lies behind a star was not found: it is not found from later places either.
                None if self.blocks.len() > 1 && self.starts(&characters[at..]) => break,
                None => after_match = false,
            }
            if out.len() > limit {
                return None;
            }
            if !done {
                out.extend(characters.get(at));
                at += 1;
            }
        }
        out.extend(characters.iter().skip(at));
        (out.len() <= limit).then_some(out)
    }

    fn starts(&self, value: &[char]) -> bool {
        fits(&self.blocks[0], value)
    }

    /// How much of the front of the value fits.
    fn prefix(&self, value: &[char], length: Length) -> Option<usize> {
        let (first, rest) = self.blocks.split_first()?;
        if !fits(first, value) {
            return None;
        }
        let mut at = first.len();
        let Some((last, middle)) = rest.split_last() else { return Some(at) };
        let find = |block: &[Token], from: usize| (from..=value.len()).find(|at| fits(block, &value[*at..]));
        for block in middle {
            at = find(block, at)? + block.len();
        }
        let found = match length {
            Length::Shortest => find(last, at),
            Length::Longest => (at..=value.len()).rev().find(|at| fits(last, &value[*at..])),
        };
        Some(found? + last.len())
    }
}

fn fits(block: &[Token], value: &[char]) -> bool {
    let fits = |(token, character): (&Token, &char)| match token {
        Token::One => true,
        Token::Literal(literal) => literal == character,
    };
    block.len() <= value.len() && block.iter().zip(value).all(fits)
}
