//! File name patterns: Go's `filepath.Match`, with `**` for any number of directories as `.dockerignore` has it.

/// Whether the path fits the pattern. Both are split at slashes; `*` and `?` do not match a slash.
pub(crate) fn matches(pattern: &[u8], path: &[u8]) -> bool {
    let split = |text: &[u8]| -> Vec<Vec<u8>> {
        text.split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .map(<[u8]>::to_vec)
            .collect()
    };
    let (pattern, path) = (split(pattern), split(path));
    // reachable[j]: the pattern's parts so far fit the first j parts of the path. A table, so that `**/**/**` is cheap.
    let mut reachable = vec![false; path.len() + 1];
    reachable[0] = true;
    for part in &pattern {
        let mut next = vec![false; path.len() + 1];
        if part == b"**" {
            let mut any = false;
            for (here, there) in reachable.iter().zip(next.iter_mut()) {
                any |= *here;
                *there = any;
            }
        } else {
            for (index, name) in path.iter().enumerate() {
                next[index + 1] = reachable[index] && name_matches(part, name);
            }
        }
        reachable = next;
    }
    reachable[path.len()]
}

/// Whether the text holds anything but ordinary characters.
pub(crate) fn is_pattern(text: &[u8]) -> bool {
    text.iter().any(|byte| b"*?[\\".contains(byte))
}

/// One name: `*`, `?`, `[a-z]`, `[^a]` and `\x`.
fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // The last star, and how much of the name it has taken: only that one needs to be tried again.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p + 1, n));
            p += 1;
            continue;
        }
        if n == name.len() && p == pattern.len() {
            return true;
        }
        let step = if n < name.len() && p < pattern.len() { one(&pattern[p..], name[n]) } else { None };
        match (step, star) {
            (Some(length), _) => {
                p += length;
                n += 1;
            }
            (None, Some((after, taken))) if taken < name.len() => {
                star = Some((after, taken + 1));
                (p, n) = (after, taken + 1);
            }
            _ => return false,
        }
    }
}

/// Matches one byte against the front of the pattern and gives the length of what it took there.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern[0] {
        b'?' => Some(1),
        b'\\' if pattern.len() > 1 => (pattern[1] == byte).then_some(2),
        b'[' => {
            let negated = pattern.get(1) == Some(&b'^');
            let start = if negated { 2 } else { 1 };
            let end = start + 1 + pattern.get(start + 1..)?.iter().position(|byte| *byte == b']')?;
            let mut set = &pattern[start..end];
            let mut found = false;
            while let [first, rest @ ..] = set {
                set = match rest {
                    [b'-', last, rest @ ..] => {
                        found |= (*first..=*last).contains(&byte);
                        rest
                    }
                    _ => {
                        found |= *first == byte;
                        rest
                    }
                };
            }
            (found != negated).then_some(end + 1)
        }
        literal => (literal == byte).then_some(1),
    }
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
            ("a?c", "a/c", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[ab", "a", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("**", "a/b/c", true),
            ("**/c", "a/b/c", true),
            ("**/c", "c", true),
            ("a/**", "a/b/c", true),
            ("a/**/c", "a/c", true),
            ("a/**/c", "a/b/d", false),
            ("a*b*c", "aXbYbZc", true),
            ("*", "", false),
            ("a", "a/b", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
        let slow = "*a".repeat(50);
        assert!(!matches(slow.as_bytes(), "b".repeat(5000).as_bytes()));
        assert!(!matches(("**/".repeat(200) + "x").as_bytes(), "a/".repeat(500).as_bytes()));
    }

    proptest::proptest! {
        #[test]
        fn any_pattern_ends_in_an_answer(pattern in "[a*?\\[\\]^\\\\/-]{0,20}", path in "[a/]{0,20}") {
            matches(pattern.as_bytes(), path.as_bytes());
        }
    }
}
