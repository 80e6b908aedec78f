//! Variables, quotes and escapes in an instruction's words, as BuildKit's shell lexer has them.

/// The deepest `${a:-${b:-...}}`.
const MAX_DEPTH: usize = 32;
/// The longest result: variables that hold variables must not grow without end.
const MAX_RESULT: usize = 1 << 20;

/// A word that cannot be expanded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// `${` without `}`.
    #[error("variable {text:?} has no closing brace")]
    Unclosed {
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
    /// `${}` or `${-x}`.
    #[error("bad variable name in {text:?}")]
    Name {
        /// The text from `${` on.
        text: String,
    },
    /// A modifier that is not known.
    #[error("modifier {modifier:?} of variable {name} is not supported yet; use one of :- :+ :? - + ?")]
    Modifier {
        /// The variable.
        name: String,
        /// The modifier.
        modifier: String,
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
    let mut expander = Expander { text, rest: text, escape, variables, depth: 0, quotes: true };
    expander.until(None)
}

/// Expands variables in the body of a heredoc, where quotes are ordinary characters.
pub fn expand_heredoc(text: &str, escape: char, variables: &impl Variables) -> Result<String, ExpandError> {
    let mut expander = Expander { text, rest: text, escape, variables, depth: 0, quotes: false };
    expander.until(None)
}

struct Expander<'a, V> {
    text: &'a str,
    rest: &'a str,
    escape: char,
    variables: &'a V,
    depth: usize,
    quotes: bool,
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

    /// Expands up to `stop`, which is taken, or the end.
    fn until(&mut self, stop: Option<char>) -> Result<String, ExpandError> {
        let mut out = String::new();
        loop {
            if out.len() > MAX_RESULT {
                return Err(self.too_large());
            }
            let Some(character) = self.next() else {
                return match stop {
                    None => Ok(out),
                    Some(_) => Err(ExpandError::Unclosed { text: self.text.to_owned() }),
                };
            };
            match character {
                _ if Some(character) == stop => return Ok(out),
                '\'' if self.quotes => self.single_quoted(&mut out)?,
                '"' if self.quotes => self.double_quoted(&mut out)?,
                '$' => self.variable(&mut out)?,
                _ if character == self.escape => match self.peek() {
                    Some(next) if self.quotes || next == '$' || next == self.escape => {
                        self.next();
                        out.push(next);
                    }
                    _ => out.push(character),
                },
                _ => out.push(character),
            }
        }
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), ExpandError> {
        loop {
            match self.next() {
                None => return Err(ExpandError::Quote { quote: '\'', text: self.text.to_owned() }),
                Some('\'') => return Ok(()),
                Some(character) => out.push(character),
            }
        }
    }

    fn double_quoted(&mut self, out: &mut String) -> Result<(), ExpandError> {
        loop {
            match self.next() {
                None => return Err(ExpandError::Quote { quote: '"', text: self.text.to_owned() }),
                Some('"') => return Ok(()),
                Some('$') => self.variable(out)?,
                Some(character) if character == self.escape => match self.peek() {
                    Some(next) if next == '"' || next == '$' || next == self.escape => {
                        self.next();
                        out.push(next);
                    }
                    _ => out.push(character),
                },
                Some(character) => out.push(character),
            }
        }
    }

    fn variable(&mut self, out: &mut String) -> Result<(), ExpandError> {
        if self.peek() != Some('{') {
            let name = self.name();
            match name.is_empty() {
                true => out.push('$'),
                false => out.push_str(self.variables.value(&name).unwrap_or_default()),
            }
            return Ok(());
        }
        let shown = format!("${}", self.rest);
        self.next();
        let name = self.name();
        if name.is_empty() {
            return Err(ExpandError::Name { text: shown });
        }
        let value = self.variables.value(&name).map(str::to_owned);
        let modifier = match self.next() {
            None => return Err(ExpandError::Unclosed { text: shown }),
            Some('}') => {
                out.push_str(value.as_deref().unwrap_or_default());
                return Ok(());
            }
            Some(':') => match self.next() {
                Some(modifier @ ('-' | '+' | '?')) => (true, modifier),
                other => {
                    let modifier = format!(":{}", other.map(String::from).unwrap_or_default());
                    return Err(ExpandError::Modifier { name, modifier });
                }
            },
            Some(modifier @ ('-' | '+' | '?')) => (false, modifier),
            Some(other) => return Err(ExpandError::Modifier { name, modifier: other.to_string() }),
        };
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.too_large());
        }
        let word = self.until(Some('}'))?;
        self.depth -= 1;
        // With the colon, an empty value counts as none.
        let (colon, modifier) = modifier;
        let set = value.filter(|value| !colon || !value.is_empty());
        match (modifier, set) {
            ('-', Some(value)) | ('?', Some(value)) => out.push_str(&value),
            ('-', None) | ('+', Some(_)) => out.push_str(&word),
            ('+', None) => {}
            _ => {
                let message = if word.is_empty() { "it is not set".to_owned() } else { word };
                return Err(ExpandError::Required { name, message });
            }
        }
        Ok(())
    }

    fn name(&mut self) -> String {
        let length = match self.peek() {
            Some(first) if first.is_ascii_alphabetic() || first == '_' => {
                let name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
                self.rest.bytes().take_while(name).count()
            }
            // Positional and special parameters are one character, and never set.
            Some(first) if first.is_ascii_digit() || "@*#".contains(first) => 1,
            _ => 0,
        };
        let (name, rest) = self.rest.split_at(length);
        self.rest = rest;
        name.to_owned()
    }

    fn too_large(&self) -> ExpandError {
        ExpandError::TooLarge { text: self.text.chars().take(80).collect() }
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
            ("${a:?no}", "1"),
            ("$dollar", "$a"),
            ("ä$a", "ä1"),
            ("$1x", "x"),
        ] {
            assert_eq!(expand(text, '\\', &variables).as_deref(), Ok(result), "{text}");
        }
        assert_eq!(expand("`$a \\$a", '`', &variables).as_deref(), Ok("$a \\1"));
        assert_eq!(expand_heredoc("'$a' \"\\$a\" \\n", '\\', &variables).as_deref(), Ok("'1' \"$a\" \\n"));
    }

    #[test]
    fn what_cannot_be_expanded_is_said() {
        insta::assert_snapshot!(
            ["${a", "${", "${}", "'a", "\"a", "${a%x}", "${a:x}", "${no:?set it}", "${no?}", "${a:-"]
                .map(|text| format!("{text}: {}", expand(text, '\\', &variables).unwrap_err()))
                .join("\n")
        );
        let deep = "${no:-".repeat(MAX_DEPTH + 1) + &"}".repeat(MAX_DEPTH + 1);
        assert!(matches!(expand(&deep, '\\', &variables), Err(ExpandError::TooLarge { .. })));
    }

    proptest::proptest! {
        #[test]
        fn any_text_ends_in_an_answer(text in ".{0,200}") {
            let _ = expand(&text, '\\', &variables);
            let _ = expand_heredoc(&text, '`', &variables);
        }
    }
}
