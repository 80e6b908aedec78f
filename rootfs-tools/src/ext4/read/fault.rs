//! What is wrong with a file system, and whether reading goes on after it.

use std::fmt;
use std::io;

use serde::Serialize;

/// The most findings that are kept: enough to see what happened, and a bound for a file system that is all damage.
pub const MAX_FINDINGS: usize = 1000;

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where: a structure, an inode, a path.
    pub place: String,
    /// What about it.
    pub what: String,
    /// What was expected.
    pub expected: String,
    /// What was there.
    pub got: String,
}

impl Finding {
    pub(crate) fn new(
        place: impl fmt::Display,
        what: impl fmt::Display,
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Self {
            place: place.to_string(),
            what: what.to_string(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, what, expected, got } = self;
        write!(f, "{place}: {what}: expected {expected}, got {got}")
    }
}

/// Why a structure cannot be read.
#[derive(Debug)]
pub(crate) enum Fault {
    Damage(Box<Finding>),
    Unsupported { place: String, reason: String },
    Io(io::Error),
}

impl Fault {
    pub(super) fn unsupported(place: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::Unsupported { place: place.to_string(), reason: reason.to_string() }
    }
}

impl Fault {
    /// Says which path it is about.
    pub(super) fn locate(self, path: &str) -> Self {
        match self {
            Self::Damage(mut finding) => {
                finding.place = format!("{path}, {}", finding.place);
                Self::Damage(finding)
            }
            Self::Unsupported { place, reason } => {
                Self::Unsupported { place: format!("{path}, {place}"), reason }
            }
            Self::Io(error) => Self::Io(error),
        }
    }
}

/// A structure that cannot be read because of what is found in it.
pub(super) fn damage(
    place: impl fmt::Display,
    what: impl fmt::Display,
    expected: impl fmt::Display,
    got: impl fmt::Display,
) -> Fault {
    Fault::Damage(Box::new(Finding::new(place, what, expected, got)))
}

/// Takes findings. A strict one ends the reading at the first.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    strict: bool,
    list: Vec<Finding>,
    total: u64,
}

impl Findings {
    /// The first finding is an error.
    pub(crate) fn strict() -> Self {
        Self { strict: true, ..Self::default() }
    }

    /// Findings are kept, up to [`MAX_FINDINGS`], and counted.
    pub(crate) fn kept() -> Self {
        Self::default()
    }

    /// The findings that were kept, and the number of all.
    pub(crate) fn into_parts(self) -> (Vec<Finding>, u64) {
        (self.list, self.total)
    }

    /// How many are kept so far.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    /// Says which path those from number `from` on are about.
    pub(super) fn locate(&mut self, from: usize, path: &str) {
        for finding in &mut self.list[from..] {
            finding.place = format!("{path}, {}", finding.place);
        }
    }

    /// Takes a finding.
    pub(crate) fn report(&mut self, finding: Finding) -> Result<(), Fault> {
        if self.strict {
            return Err(Fault::Damage(Box::new(finding)));
        }
        self.keep(finding);
        Ok(())
    }

    /// Takes a finding that nothing goes on after.
    pub(crate) fn keep(&mut self, finding: Finding) {
        self.total += 1;
        if self.list.len() < MAX_FINDINGS {
            self.list.push(finding);
        }
    }

    /// Reports `got` where it is not `expected`.
    pub(super) fn expect<T: PartialEq + fmt::Display>(
        &mut self,
        place: impl fmt::Display,
        what: impl fmt::Display,
        expected: T,
        got: T,
    ) -> Result<(), Fault> {
        if expected == got { Ok(()) } else { self.report(Finding::new(place, what, expected, got)) }
    }

    /// Reports a checksum that does not fit.
    pub(super) fn checksum(
        &mut self,
        place: impl fmt::Display,
        expected: u32,
        got: u32,
    ) -> Result<(), Fault> {
        if expected == got {
            return Ok(());
        }
        self.report(Finding::new(place, "checksum", format!("{expected:#x}"), format!("{got:#x}")))
    }

    /// The value, or `None` after a report of why there is none. Only damage can be gone past.
    pub(super) fn tolerate<T>(&mut self, result: Result<T, Fault>) -> Result<Option<T>, Fault> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Fault::Damage(finding)) => self.report(*finding).map(|()| None),
            Err(fault) => Err(fault),
        }
    }
}
