//! Sets of blocks as ranges: what they take grows with the structures that name the blocks, not with the disk.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges.
#[derive(Clone, Debug, Default)]
pub(super) struct Intervals {
    /// End by start; ranges that touch are joined.
    ranges: BTreeMap<u64, u64>,
}

impl Intervals {
    /// Adds `range`, or says which number of it is there already and adds nothing.
    pub(super) fn insert(&mut self, range: Range<u64>) -> Result<(), u64> {
        if range.is_empty() {
            return Ok(());
        }
        let mut joined = range.clone();
        if let Some((&start, &end)) = self.ranges.range(..range.end).next_back() {
            if end > range.start {
                return Err(start.max(range.start));
            }
            if end == range.start {
                joined.start = start;
            }
        }
        if let Some(end) = self.ranges.remove(&range.end) {
            joined.end = end;
        }
        self.ranges.insert(joined.start, joined.end);
        Ok(())
    }

    /// The ranges within `window`.
    pub(super) fn within(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.ranges.range(..=window.start).next_back();
        let rest = self.ranges.range((
            std::ops::Bound::Excluded(window.start),
            std::ops::Bound::Excluded(window.end.max(window.start + 1)),
        ));
        first
            .into_iter()
            .chain(rest)
            .map(move |(&start, &end)| start.max(window.start)..end.min(window.end))
            .filter(|range| !range.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_refused_and_neighbours_join() {
        let mut set = Intervals::default();
        assert_eq!(set.insert(10..20), Ok(()));
        assert_eq!(set.insert(30..40), Ok(()));
        assert_eq!(set.insert(19..21), Err(19));
        assert_eq!(set.insert(5..31), Err(30));
        assert_eq!(set.insert(12..13), Err(12));
        assert_eq!(set.insert(7..7), Ok(()));
        assert_eq!(set.insert(20..30), Ok(()));
        assert_eq!(set.ranges, [(10, 40)].into());
        assert_eq!(set.insert(40..u64::MAX), Ok(()));
        assert!(set.within(0..15).eq(std::iter::once(10..15)));
        assert!(set.within(15..16).eq(std::iter::once(15..16)));
        assert_eq!(set.within(0..10).count(), 0);
    }
}
