//! The `--name=value` flags of an instruction.

use std::time::Duration;

use crate::error::{Fault, Reason};
use crate::position::{Position, Word};
use crate::suggest::nearest;

/// What a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A value, once.
    Text,
    /// `true`, `false` or nothing, which is true.
    Switch,
    /// A value, any number of times.
    List,
}

/// Flags with their values.
#[derive(Debug)]
pub(crate) struct Flags {
    keyword: &'static str,
    found: Vec<(&'static str, Word)>,
}

impl Flags {
    pub(crate) fn parse(
        keyword: &'static str,
        words: &[Word],
        known: &[(&'static str, Kind)],
    ) -> Result<Self, Fault> {
        let mut found: Vec<(&'static str, Word)> = Vec::new();
        for word in words {
            let text = &word.text[2..];
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (text, None),
            };
            let Some((name, kind)) = known.iter().copied().find(|(known, _)| *known == name) else {
                return Err(Fault::new(word.at, unknown(keyword, name, known)));
            };
            let wrong = |problem: &str, expected| {
                let reason = Reason::Flag { keyword, flag: name, problem: problem.to_owned(), expected };
                Err(Fault::new(word.at, reason))
            };
            if kind != Kind::List && found.iter().any(|(flag, _)| *flag == name) {
                return wrong("it stands twice", "the flag once");
            }
            let value = match (kind, value) {
                (Kind::Switch, None) => "true",
                (Kind::Switch, Some(value)) => match value.to_ascii_lowercase().as_str() {
                    "true" => "true",
                    "false" => "false",
                    _ => return wrong(&format!("{value:?}"), "true or false"),
                },
                (_, Some(value)) => value,
                (_, None) => return wrong("it has no value", "--NAME=VALUE"),
            };
            let at = Position { column: word.at.column + name.len() + 3, ..word.at };
            found.push((name, Word { text: value.to_owned(), at }));
        }
        Ok(Self { keyword, found })
    }

    pub(crate) fn text(&self, name: &str) -> Option<Word> {
        self.list(name).into_iter().next()
    }

    /// A text that is not empty.
    pub(crate) fn filled(&self, name: &'static str) -> Result<Option<Word>, Fault> {
        match self.text(name) {
            Some(word) if word.text.is_empty() => Err(self.wrong(&word, name, "a value")),
            other => Ok(other),
        }
    }

    pub(crate) fn list(&self, name: &str) -> Vec<Word> {
        self.found.iter().filter(|(flag, _)| *flag == name).map(|(_, word)| word.clone()).collect()
    }

    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        self.text(name).map(|word| word.text == "true")
    }

    /// One of a few values.
    pub(crate) fn choice<T: Copy + Default>(
        &self,
        name: &'static str,
        choices: &[(&str, T)],
        expected: &'static str,
    ) -> Result<T, Fault> {
        let Some(word) = self.text(name) else { return Ok(T::default()) };
        let found = choices.iter().find(|(known, _)| *known == word.text);
        found.map(|(_, value)| *value).ok_or_else(|| self.wrong(&word, name, expected))
    }

    /// A duration as Go writes it; at least a millisecond, or 0 for the default.
    pub(crate) fn duration(&self, name: &'static str) -> Result<Option<Duration>, Fault> {
        let Some(word) = self.text(name).filter(|word| !word.text.is_empty()) else { return Ok(None) };
        match duration(&word.text) {
            Some(duration) if duration.is_zero() => Ok(None),
            Some(duration) if duration >= Duration::from_millis(1) => Ok(Some(duration)),
            _ => Err(self.wrong(&word, name, "a duration of 1ms or more, as 30s, 1m30s or 500ms")),
        }
    }

    pub(crate) fn number(&self, name: &'static str) -> Result<Option<u32>, Fault> {
        let Some(word) = self.text(name).filter(|word| !word.text.is_empty()) else { return Ok(None) };
        match word.text.parse::<u32>() {
            Ok(number) if number <= i32::MAX as u32 => Ok(Some(number)),
            _ => Err(self.wrong(&word, name, "a number from 0 on")),
        }
    }

    fn wrong(&self, word: &Word, flag: &'static str, expected: &'static str) -> Fault {
        let problem = format!("{:?}", word.text);
        Fault::new(word.at, Reason::Flag { keyword: self.keyword, flag, problem, expected })
    }
}

fn unknown(keyword: &'static str, name: &str, known: &[(&'static str, Kind)]) -> Reason {
    let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
    let advice = match nearest(name, names.iter().copied()) {
        Some(near) => format!("; did you mean --{near}?"),
        None if names.is_empty() => "; it has none".to_owned(),
        None => format!("; it has --{}", names.join(", --")),
    };
    Reason::UnknownFlag { keyword, flag: format!("--{name}"), advice }
}

/// Go's `time.ParseDuration`, without a sign: `1h30m`, `1.5s`, `500ms`, `0`.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos = 0u128;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let digits = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u64>().ok() };
        nanos += u128::from(digits(whole)?) * unit;
        // Digits beyond nanoseconds change nothing.
        let fraction = &fraction[..fraction.len().min(15)];
        nanos += u128::from(digits(fraction)?) * unit / 10u128.pow(fraction.len() as u32);
        rest = after;
    }
    // Go's durations are signed 64-bit nanoseconds.
    (!text.is_empty() && nanos <= i64::MAX as u128).then(|| Duration::from_nanos(nanos as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, nanos) in [
            ("30s", Some(30_000_000_000)),
            ("1m30s", Some(90_000_000_000)),
            ("1.5h", Some(5_400_000_000_000)),
            (".5s", Some(500_000_000)),
            ("500ms", Some(500_000_000)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("30", None),
            ("s", None),
            ("-1s", None),
            ("1.2.3s", None),
            ("", None),
            ("9999999999999h", None),
        ] {
            assert_eq!(duration(text).map(|duration| duration.as_nanos()), nanos, "{text}");
        }
    }
}
