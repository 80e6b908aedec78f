//! Near misses: what a misspelt name was most likely meant to be.

/// The longest name that is compared, so that hostile text costs nothing.
const MAX_COMPARED: usize = 64;

/// The known name that is nearest to what was written, if one is near; case does not count.
pub fn nearest<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if written.is_empty() || written.len() > MAX_COMPARED {
        return None;
    }
    let written: Vec<char> = written.to_lowercase().chars().collect();
    // A third of the letters may be wrong, at least one and at most three.
    let limit = (written.len() / 3).clamp(1, 3);
    known
        .into_iter()
        .filter(|name| name.len() <= MAX_COMPARED)
        .map(|name| (distance(&written, &name.to_lowercase().chars().collect::<Vec<_>>()), name))
        .filter(|(distance, name)| *distance <= limit && *distance < name.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// "; did you mean X?", or nothing.
pub fn did_you_mean<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(written, known).map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

/// Letters that must be inserted, removed or replaced, or swapped with their neighbour.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut best = (last[j] + usize::from(x != y)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found_and_far_ones_not() {
        let known = ["RUN", "COPY", "ENTRYPOINT", "ENV"];
        for (written, name) in [
            ("RUNN", Some("RUN")),
            ("ruN", Some("RUN")),
            ("CPOY", Some("COPY")),
            ("ENTRPOINT", Some("ENTRYPOINT")),
            ("EXECUTE", None),
            ("", None),
            ("X", None),
        ] {
            assert_eq!(nearest(written, known), name, "{written}");
        }
        assert_eq!(nearest(&"R".repeat(100_000), known), None);
        assert_eq!(did_you_mean("RNU", known), "; did you mean RUN?");
    }
}
