//! `--chmod`: octal modes, and the symbolic ones of chmod(1).

/// A change of permissions.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Chmod {
    /// `755`.
    Octal(u32),
    /// `u+x,go=rX`, in order.
    Symbolic(Vec<Clause>),
}

/// One `WHO OP WHAT` of a symbolic mode.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Clause {
    /// The bits of user (0o100), group (0o10) and others (0o1) that it is about.
    who: u32,
    operation: Operation,
    /// Of `rwx`, as an octal digit.
    bits: u32,
    /// `X`: execution, where it is a folder or somebody may execute it already.
    execute_if: bool,
    /// `s`.
    set_id: bool,
    /// `t`.
    sticky: bool,
    /// `g=u`: the bits of this class, by its shift.
    copy_from: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
enum Operation {
    Add,
    Remove,
    Set,
}

impl Chmod {
    /// Reads a mode; `None` when it is none.
    pub fn parse(text: &str) -> Option<Self> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let bits = u32::from_str_radix(text, 8).ok()?;
            return (bits <= 0o7777).then_some(Self::Octal(bits));
        }
        let mut clauses = Vec::new();
        for part in text.split(',') {
            clause(part, &mut clauses)?;
        }
        Some(Self::Symbolic(clauses))
    }

    /// The mode of a file that had `mode`.
    pub fn apply(&self, mode: u32, is_directory: bool) -> u32 {
        match self {
            Self::Octal(bits) => *bits,
            Self::Symbolic(clauses) => {
                clauses.iter().fold(mode & 0o7777, |mode, clause| clause.apply(mode, is_directory))
            }
        }
    }
}

impl Clause {
    fn apply(&self, mode: u32, is_directory: bool) -> u32 {
        let mut digit = self.bits;
        if self.execute_if && (is_directory || mode & 0o111 != 0) {
            digit |= 1;
        }
        if let Some(shift) = self.copy_from {
            digit |= mode >> shift & 7;
        }
        let mut bits = digit * self.who;
        let mut special = 0;
        if self.set_id {
            special |= if self.who & 0o100 != 0 { 0o4000 } else { 0 };
            special |= if self.who & 0o10 != 0 { 0o2000 } else { 0 };
        }
        if self.sticky {
            special |= 0o1000;
        }
        bits |= special;
        match self.operation {
            Operation::Add => mode | bits,
            Operation::Remove => mode & !bits,
            Operation::Set => mode & !(7 * self.who) | bits,
        }
    }
}

/// `ugo+rwx`, perhaps with several operations, as `u=rw+x`.
fn clause(text: &str, clauses: &mut Vec<Clause>) -> Option<()> {
    let mut rest = text;
    let mut who = 0;
    while let Some(first) = rest.chars().next() {
        who |= match first {
            'u' => 0o100,
            'g' => 0o10,
            'o' => 0o1,
            'a' => 0o111,
            _ => break,
        };
        rest = &rest[1..];
    }
    if who == 0 {
        who = 0o111;
    }
    let mut any = false;
    while let Some(first) = rest.chars().next() {
        let operation = match first {
            '+' => Operation::Add,
            '-' => Operation::Remove,
            '=' => Operation::Set,
            _ => return None,
        };
        rest = &rest[1..];
        let mut clause = Clause {
            who,
            operation,
            bits: 0,
            execute_if: false,
            set_id: false,
            sticky: false,
            copy_from: None,
        };
        while let Some(letter) = rest.chars().next() {
            match letter {
                'r' => clause.bits |= 4,
                'w' => clause.bits |= 2,
                'x' => clause.bits |= 1,
                'X' => clause.execute_if = true,
                's' => clause.set_id = true,
                't' => clause.sticky = true,
                'u' => clause.copy_from = Some(6),
                'g' => clause.copy_from = Some(3),
                'o' => clause.copy_from = Some(0),
                _ => break,
            }
            rest = &rest[1..];
        }
        clauses.push(clause);
        any = true;
    }
    any.then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_those_of_chmod() {
        for (text, before, is_directory, after) in [
            ("755", 0o600, false, 0o755),
            ("0", 0o644, false, 0),
            ("u+x", 0o644, false, 0o744),
            ("+x", 0o644, false, 0o755),
            ("a-w", 0o666, false, 0o444),
            ("go-rwx", 0o755, false, 0o700),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("g=u", 0o640, false, 0o660),
            ("u+s,+t", 0o755, false, 0o5755),
            ("u=rw+x", 0o000, false, 0o700),
        ] {
            let chmod = Chmod::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(chmod.apply(before, is_directory), after, "{text} on {before:o}");
        }
        for text in ["", "789", "10000", "u", "x+u+", "u+q", "u+x,", "ä"] {
            assert_eq!(Chmod::parse(text), None, "{text}");
        }
    }
}
