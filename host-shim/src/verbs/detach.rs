//! The keys that leave a terminal, as docker's `--detach-keys`.

/// A sequence of keys; none means that nothing leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Keys(Vec<u8>);

impl Keys {
    /// `ctrl-p,ctrl-q`: letters, or `ctrl-` and one of `a`-`z`, `@`, `[`, `\`, `]`, `^`, `_`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let key = |name: &str| match name.as_bytes() {
            [byte] if byte.is_ascii() => Some(*byte),
            [b'c', b't', b'r', b'l', b'-', letter] => match letter {
                b'a'..=b'z' => Some(letter - b'a' + 1),
                b'@' => Some(0),
                b'[' | b'\\' | b']' | b'^' | b'_' => Some(letter - b'[' + 27),
                _ => None,
            },
            _ => None,
        };
        let keys = text.split(',').map(|name| key(name).ok_or_else(|| format!("{name:?} is no key")));
        keys.collect::<Result<_, _>>().map(Self)
    }
}

/// Looks for the keys in what is typed.
#[derive(Debug)]
pub(crate) struct Detector {
    keys: Keys,
    seen: usize,
}

impl Detector {
    pub(crate) fn new(keys: Keys) -> Self {
        Self { keys, seen: 0 }
    }

    /// What of the input goes to the process, and whether the keys were typed. The beginning of the keys is held back
    /// until the next byte shows what it is.
    pub(crate) fn feed(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let keys = &self.keys.0;
        if keys.is_empty() {
            return (input.to_vec(), false);
        }
        let mut out = Vec::with_capacity(input.len());
        for byte in input {
            if *byte == keys[self.seen] {
                self.seen += 1;
                if self.seen == keys.len() {
                    self.seen = 0;
                    return (out, true);
                }
                continue;
            }
            out.extend_from_slice(&keys[..self.seen]);
            self.seen = usize::from(*byte == keys[0]);
            if self.seen == 0 {
                out.push(*byte);
            } else if keys.len() == 1 {
                return (out, true);
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_dockers_names() {
        assert_eq!(Keys::parse("ctrl-p,ctrl-q"), Ok(Keys(vec![16, 17])));
        assert_eq!(Keys::parse("a,ctrl-@,ctrl-\\,ctrl-_"), Ok(Keys(vec![b'a', 0, 28, 31])));
        assert_eq!(Keys::parse(""), Ok(Keys(vec![])));
        for bad in ["ctrl-", "ctrl-P", "ab", "a,,b", "é"] {
            assert!(Keys::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_whole_sequence_leaves_and_nothing_else_is_lost() {
        let mut detector = Detector::new(Keys::parse("ctrl-p,ctrl-q").unwrap());
        assert_eq!(detector.feed(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(detector.feed(b"b"), (b"\x10b".to_vec(), false));
        assert_eq!(detector.feed(b"\x10\x10\x10"), (b"\x10\x10".to_vec(), false));
        assert_eq!(detector.feed(b"\x11"), (vec![], true));
        assert_eq!(detector.feed(b"x\x10\x11rest"), (b"x".to_vec(), true));
        let mut one = Detector::new(Keys::parse("q").unwrap());
        assert_eq!(one.feed(b"ab"), (b"ab".to_vec(), false));
        assert_eq!(one.feed(b"aq"), (b"a".to_vec(), true));
        let mut none = Detector::new(Keys::parse("").unwrap());
        assert_eq!(none.feed(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }
}
