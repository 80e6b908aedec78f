//! Tables of what was measured.

/// A row: what was measured, its value, and its ratio to a yardstick with the bound that the ratio keeps.
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) value: String,
    pub(crate) ratio: Option<(f64, Bound)>,
}

pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Told for comparison only.
    None,
}

impl Row {
    pub(crate) fn plain(what: impl Into<String>, value: impl Into<String>) -> Self {
        Self { what: what.into(), value: value.into(), ratio: None }
    }

    pub(crate) fn head(value: &str) {
        println!("{:<64} {value:>14} {:>7}", "", "ratio");
    }

    pub(crate) fn print(&self) {
        let (ratio, verdict) = match &self.ratio {
            None => (String::new(), String::new()),
            Some((ratio, bound)) => {
                let verdict = match bound {
                    Bound::AtMost(most) if ratio <= most => format!("at most {most}: kept"),
                    Bound::AtMost(most) => format!("at most {most}: MISSED"),
                    Bound::AtLeast(least) if ratio >= least => format!("at least {least}: kept"),
                    Bound::AtLeast(least) => format!("at least {least}: MISSED"),
                    Bound::None => String::new(),
                };
                (format!("{ratio:.2}"), verdict)
            }
        };
        println!("{:<64} {:>14} {ratio:>7}  {verdict}", self.what, self.value);
    }
}
