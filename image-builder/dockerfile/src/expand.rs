//! Variables, quotes and escapes in an instruction's words, as BuildKit's shell lexer has them.

use crate::shell_pattern::{Length, ShellPattern};

/// The deepest `${a:-${b:-...}}`.
const MAX_DEPTH: usize = 32;
/// The longest result in bytes: variables that hold variables must not grow without end.
pub const MAX_RESULT: usize = 256 << 10;

/// A word that cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// `${` without `}`.
    #[error("variable {text:?} has no closing brace")]
    Unclosed {
        /// The text from `${` on.
        text: String,
    },
    /// `${NAME/pattern` without its second slash.
    #[error("variable {text:?} has no second slash; expected ${{NAME/PATTERN/REPLACEMENT}}")]
    Slash {
        /// The text from `${` on.
        text: String,
    },
    /// A quote without its pair.
    #[error("a quote {quote} is not closed in {text:?}")]
    Quote {
        /// The quote.
        quote: char,
        /// The word.
        text: String,
    },
    /// `${}` or `${:x}`.
    #[error("bad variable name in {text:?}")]
    Name {
        /// The text from `${` on.
        text: String,
    },
    /// A modifier that is not known.
    #[error(
        "unknown modifier {modifier:?} of variable {name}; expected one of :- - :+ + :? ? # ## % %% / //"
    )]
    Modifier {
        /// The variable.
        name: String,
        /// The modifier.
        modifier: String,
    },
    /// The pattern of `#`, `%` or `/`.
    #[error("pattern {pattern:?} of variable {name}: {problem}")]
    Pattern {
        /// The variable.
        name: String,
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// `${NAME:?message}` and the variable is not set.
    #[error("variable {name} is required: {message}")]
    Required {
        /// The variable.
        name: String,
        /// What the author says of it.
        message: String,
    },
    /// A bound was exceeded.
    #[error("the expansion of {text:?} is nested too deeply or too long")]
    TooLarge {
        /// The word.
        text: String,
    },
}

/// Gives the value of a variable.
pub trait Variables {
    /// The variable's value, `None` when it is not set.
    fn value(&self, name: &str) -> Option<&str>;
}

impl<F: for<'a> Fn(&'a str) -> Option<&'static str>> Variables for F {
    fn value(&self, name: &str) -> Option<&str> {
        self(name)
    }
}

/// Expands `$NAME`, `${NAME}` and its modifiers, and removes quotes and escapes.
pub fn expand(text: &str, escape: char, variables: &impl Variables) -> Result<String, ExpandError> {
    expand_noting(text, escape, variables, &mut |_| {})
}

/// As [`expand`], and tells each variable that is not set and has no word in its place.
pub fn expand_noting(
    text: &str,
    escape: char,
    variables: &impl Variables,
    unset: &mut dyn FnMut(&str),
) -> Result<String, ExpandError> {
    Expander { text, rest: text, escape, variables, depth: 0, quotes: true, unset }.until(None, false)
}

/// Expands variables in the body of a heredoc, where quotes are ordinary characters. A backslash takes the meaning of
/// the character behind it and goes away.
pub fn expand_heredoc(text: &str, variables: &impl Variables) -> Result<String, ExpandError> {
    let unset = &mut |_: &str| {};
    Expander { text, rest: text, escape: '\\', variables, depth: 0, quotes: false, unset }.until(None, false)
}

struct Expander<'a, V> {
    text: &'a str,
    rest: &'a str,
    escape: char,
    variables: &'a V,
    depth: usize,
    quotes: bool,
    unset: &'a mut dyn FnMut(&str),
}

impl<V: Variables> Expander<'_, V> {
    fn next(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let next = characters.next();
        self.rest = characters.as_str();
        next
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    /// Expands up to `stop`, which is taken, or the end. Patterns keep their escapes: there they mean something.
    fn until(&mut self, stop: Option<char>, keep_escapes: bool) -> Result<String, ExpandError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.too_large());
        }
        let mut out = String::new();
        loop {
            if out.len() > MAX_RESULT {
                return Err(self.too_large());
            }
            let Some(character) = self.next() else {
                return match stop {
                    None => Ok(out),
                    Some(_) => Err(ExpandError::Unclosed { text: self.shown() }),
                };
            };
            match character {
                _ if Some(character) == stop => {
                    self.depth -= 1;
                    return Ok(out);
                }
                '\'' if self.quotes => self.single_quoted(&mut out)?,
                '"' if self.quotes => self.double_quoted(&mut out, keep_escapes)?,
                '$' => self.variable(&mut out)?,
                _ if character == self.escape => {
                    if keep_escapes {
                        out.push(character);
                    }
                    out.extend(self.next());
                }
                _ => out.push(character),
            }
        }
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), ExpandError> {
        loop {
            match self.next() {
                None => return Err(ExpandError::Quote { quote: '\'', text: self.shown() }),
                Some('\'') => return Ok(()),
                Some(character) => out.push(character),
            }
        }
    }

    fn double_quoted(&mut self, out: &mut String, keep_escapes: bool) -> Result<(), ExpandError> {
        loop {
            if out.len() > MAX_RESULT {
                return Err(self.too_large());
            }
            match self.next() {
                None => return Err(ExpandError::Quote { quote: '"', text: self.shown() }),
                Some('"') => return Ok(()),
                Some('$') => self.variable(out)?,
                Some(character) if character == self.escape => match self.peek() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => {
                        if keep_escapes {
                            out.push(character);
                        }
                        self.next();
                        out.push(next);
                    }
                    Some(_) => out.push(character),
                    None => {}
                },
                Some(character) => out.push(character),
            }
        }
    }

    /// What follows a dollar.
    fn variable(&mut self, out: &mut String) -> Result<(), ExpandError> {
        if self.peek() != Some('{') {
            let name = self.name();
            match name.is_empty() {
                true => out.push('$'),
                false => out.push_str(&self.value(&name)),
            }
            return Ok(());
        }
        let shown: String = format!("${}", self.rest).chars().take(80).collect();
        self.next();
        match self.peek() {
            None => return Err(ExpandError::Unclosed { text: shown }),
            Some('{' | '}' | ':') => return Err(ExpandError::Name { text: shown }),
            Some(_) => {}
        }
        let name = self.name();
        let unclosed = |error| match error {
            ExpandError::Unclosed { .. } => ExpandError::Unclosed { text: shown.clone() },
            other => other,
        };
        match self.next() {
            None => Err(ExpandError::Unclosed { text: shown }),
            Some('}') => {
                out.push_str(&self.value(&name));
                Ok(())
            }
            Some('/') => {
                let all = self.peek() == Some('/');
                if all {
                    self.next();
                }
                let pattern = self.until(Some('/'), true).map_err(|error| match error {
                    ExpandError::Unclosed { .. } => ExpandError::Slash { text: shown.clone() },
                    other => other,
                })?;
                let replacement = self.until(Some('}'), true).map_err(unclosed)?;
                let value = self.value(&name);
                let parsed = self.pattern(&name, &pattern)?;
                let replaced = parsed.replace(&value, &replacement, all, MAX_RESULT);
                out.push_str(&replaced.ok_or_else(|| self.too_large())?);
                Ok(())
            }
            Some(first) => {
                let colon = first == ':';
                let modifier = if colon { self.next() } else { Some(first) };
                let word = match modifier {
                    None => return Err(ExpandError::Unclosed { text: shown }),
                    Some('-' | '+' | '?') => self.until(Some('}'), false).map_err(unclosed)?,
                    Some('#' | '%') => self.until(Some('}'), true).map_err(unclosed)?,
                    Some(other) => {
                        let modifier = if colon { format!(":{other}") } else { other.to_string() };
                        return Err(ExpandError::Modifier { name, modifier });
                    }
                };
                self.modified(out, name, colon, modifier.unwrap_or_default(), word)
            }
        }
    }

    fn modified(
        &mut self,
        out: &mut String,
        name: String,
        colon: bool,
        modifier: char,
        word: String,
    ) -> Result<(), ExpandError> {
        if modifier == '#' || modifier == '%' {
            let value = self.value(&name);
            // The doubled mark, where both are given the longest match goes.
            let (pattern, length) = match word.strip_prefix(modifier) {
                Some(rest) => (rest, Length::Longest),
                None => (word.as_str(), Length::Shortest),
            };
            let pattern = self.pattern(&name, pattern)?;
            out.push_str(&match modifier {
                '#' => pattern.trim_prefix(&value, length),
                _ => pattern.trim_suffix(&value, length),
            });
            return Ok(());
        }
        // With the colon, an empty value counts as none.
        let value = self.variables.value(&name);
        let empty = value == Some("");
        match (modifier, value.filter(|value| !colon || !value.is_empty())) {
            ('-' | '?', Some(value)) => out.push_str(value),
            ('-', None) | ('+', Some(_)) => out.push_str(&word),
            ('+', None) => {}
            _ => {
                let message = match word.is_empty() {
                    false => word,
                    true => (if empty { "it is empty" } else { "it is not set" }).to_owned(),
                };
                return Err(ExpandError::Required { name, message });
            }
        }
        Ok(())
    }

    fn pattern(&self, name: &str, pattern: &str) -> Result<ShellPattern, ExpandError> {
        ShellPattern::parse(pattern).map_err(|problem| ExpandError::Pattern {
            name: name.to_owned(),
            pattern: pattern.chars().take(80).collect(),
            problem,
        })
    }

    fn value(&mut self, name: &str) -> String {
        match self.variables.value(name) {
            Some(value) => value.to_owned(),
            None => {
                (self.unset)(name);
                String::new()
            }
        }
    }

    fn name(&mut self) -> String {
        let length = |fits: fn(char) -> bool| self.rest.find(|c| !fits(c)).unwrap_or(self.rest.len());
        let length = match self.peek() {
            Some(first) if first.is_ascii_digit() => length(|c| c.is_ascii_digit()),
            Some(first) if first.is_alphabetic() || first == '_' => {
                length(|c| c.is_alphanumeric() || c == '_')
            }
            // Special parameters are one character, and never set.
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => 1,
            _ => 0,
        };
        let (name, rest) = self.rest.split_at(length);
        self.rest = rest;
        name.to_owned()
    }

    fn shown(&self) -> String {
        self.text.chars().take(80).collect()
    }

    fn too_large(&self) -> ExpandError {
        ExpandError::TooLarge { text: self.shown() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(name: &str) -> Option<&'static str> {
        match name {
            "a" => Some("1"),
            "empty" => Some(""),
            "dollar" => Some("$a"),
            "path" => Some("/usr/local/lib/x.tar.gz"),
            "stars" => Some("a*b?c"),
            _ => None,
        }
    }

    #[test]
    fn words_are_expanded_as_buildkit_does() {
        for (text, result) in [
            ("$a", "1"),
            ("${a}b", "1b"),
            ("$ab", ""),
            ("a$", "a$"),
            ("$.x", "$.x"),
            (r"\$a", "$a"),
            (r"\\$a", r"\1"),
            (r"a\b", "ab"),
            (r"a\", "a"),
            ("'$a'", "$a"),
            ("\"$a b\"", "1 b"),
            (r#""\"\$\x""#, r#""$\x"#),
            ("x'y'\"z\"", "xyz"),
            ("${no:-d}", "d"),
            ("${empty:-d}", "d"),
            ("${empty-d}", ""),
            ("${no-d}", "d"),
            ("${a:-d}", "1"),
            ("${a:+y}", "y"),
            ("${no:+y}", ""),
            ("${empty:+y}", ""),
            ("${empty+y}", "y"),
            ("${no:-${a}x}", "1x"),
            ("${no:-'}'}", "}"),
            (r"${no:-\}}", "}"),
            ("${no:-\"$a b\"}", "1 b"),
            ("${a:?no}", "1"),
            ("$dollar", "$a"),
            ("ä$a", "ä1"),
            ("$1x", "x"),
            ("$12x", "x"),
            ("$$a", "a"),
            ("${path#/*/}", "local/lib/x.tar.gz"),
            ("${path##*/}", "x.tar.gz"),
            ("${path%.*}", "/usr/local/lib/x.tar"),
            ("${path%%.*}", "/usr/local/lib/x"),
            ("${path#nope}", "/usr/local/lib/x.tar.gz"),
            ("${path/local/}", "/usr//lib/x.tar.gz"),
            (r"${path//\//_}", "_usr_local_lib_x.tar.gz"),
            ("${path/l*l/L}", "/usr/Lib/x.tar.gz"),
            ("${path//?ib/N}", "/usr/local/N/x.tar.gz"),
            (r"${stars/\*/-}", "a-b?c"),
            (r"${stars//\?/-}", "a*b-c"),
            ("${stars%${no:-c}}", "a*b?"),
            ("${no#x}", ""),
            ("${a//1/11}", "11"),
            ("${a///x}", "x1x"),
            ("${a//*/x}", "x"),
        ] {
            assert_eq!(expand(text, '\\', &variables).as_deref(), Ok(result), "{text}");
        }
        assert_eq!(expand("`$a \\$a", '`', &variables).as_deref(), Ok("$a \\1"));
        let body = "'$a' \"\\$a\" \\n \\\\ ${no:-\"}";
        assert_eq!(expand_heredoc(body, &variables).as_deref(), Ok("'1' \"$a\" n \\ \""));
    }

    #[test]
    fn what_cannot_be_expanded_is_said() {
        let cases = [
            "${a",
            "${",
            "${}",
            "${:x}",
            "'a",
            "\"a",
            "${a^x}",
            "${a:x}",
            "${no:?set it}",
            "${no?}",
            "${empty:?}",
            "${a:-",
            "${a/x}",
            "${a/x/y",
            r"${a#\x}",
        ];
        let said =
            cases.map(|text| format!("{text}: {}", expand(text, '\\', &variables).unwrap_err())).join("\n");
        insta::assert_snapshot!(said);
        let deep = "${no:-".repeat(MAX_DEPTH + 1) + &"}".repeat(MAX_DEPTH + 1);
        assert!(matches!(expand(&deep, '\\', &variables), Err(ExpandError::TooLarge { .. })));
    }

    #[test]
    fn results_do_not_grow_without_end() {
        let long = |name: &str| -> Option<&'static str> {
            (name == "x").then(|| &*"a".repeat(MAX_RESULT / 2).leak())
        };
        for text in ["$x$x$x", "\"$x$x$x\"", "${x//a/aaaa}", "${x///a}${x}"] {
            assert!(matches!(expand(text, '\\', &long), Err(ExpandError::TooLarge { .. })), "{text}");
        }
    }

    #[test]
    fn unset_variables_are_told() {
        let mut unset = Vec::new();
        let text = "$a $no ${gone} ${other:-x} ${more%x}";
        expand_noting(text, '\\', &variables, &mut |name| unset.push(name.to_owned())).unwrap();
        assert_eq!(unset, ["no", "gone", "more"]);
    }
}
