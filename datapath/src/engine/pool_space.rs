//! The free segments of a pool, lent to its lanes in small lots.

use crate::store::layout::{Layout, SegmentIndex};
use crate::store::segment::{SegmentState, SegmentTable};

/// Segments that belong to no lane.
#[derive(Debug)]
pub struct PoolSpace {
    layout: Layout,
    segments: u32,
    free: Vec<SegmentIndex>,
    /// Segments from here on were never written.
    pristine_from: u32,
    zero_before_use: bool,
}

impl PoolSpace {
    /// What the lanes of a pool do not own. `zero_before_use` says that the pool is a file, whose blocks cost
    /// more at their first write.
    pub fn new<'l>(
        layout: Layout,
        segments: u32,
        lanes: impl Iterator<Item = &'l SegmentTable>,
        zero_before_use: bool,
    ) -> PoolSpace {
        let mut owned = vec![false; segments as usize];
        for table in lanes {
            for segment in table.indices().filter(|segment| table.state(*segment) != SegmentState::Foreign) {
                let taken = std::mem::replace(&mut owned[segment.0 as usize], true);
                assert!(!taken, "segment {} belongs to two lanes", segment.0);
            }
        }
        let last_owned = owned.iter().rposition(|owned| *owned).map_or(0, |index| index + 1);
        let pristine_from = u32::try_from(last_owned).expect("segments fit 32 bits");
        let free = (0..pristine_from)
            .rev()
            .map(SegmentIndex)
            .filter(|segment| !owned[segment.0 as usize] && !layout.is_anchor(*segment))
            .collect();
        PoolSpace { layout, segments, free, pristine_from, zero_before_use }
    }

    /// The pool now has so many segments.
    pub fn grow(&mut self, segments: u32) {
        assert!(segments >= self.segments);
        self.segments = segments;
    }

    /// Segments of the pool, lent or not, without its anchors.
    #[must_use]
    pub fn segment_count(&self) -> u32 {
        self.segments - crate::store::layout::ANCHORS
    }

    /// Segments that can be lent.
    #[must_use]
    pub fn free_count(&self) -> u32 {
        let pristine = self.segments - self.pristine_from;
        let anchors = (0..crate::store::layout::ANCHORS)
            .filter(|number| self.layout.anchor(*number).0 >= self.pristine_from)
            .count();
        u32::try_from(self.free.len()).expect("segments fit 32 bits") + pristine
            - u32::try_from(anchors).expect("four")
    }

    /// A segment to lend, and whether it must be zeroed before it is written.
    pub fn lend(&mut self) -> Option<(SegmentIndex, bool)> {
        if let Some(segment) = self.free.pop() {
            return Some((segment, false));
        }
        while self.pristine_from < self.segments {
            let segment = SegmentIndex(self.pristine_from);
            self.pristine_from += 1;
            if !self.layout.is_anchor(segment) {
                return Some((segment, self.zero_before_use));
            }
        }
        None
    }

    /// A lane gives a segment back.
    pub fn take_back(&mut self, segment: SegmentIndex) {
        self.free.push(segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_segment_but_the_anchors_is_lent_once() {
        let layout = Layout::with_segment_blocks([0; 16], 256 << 20, 1, 256).unwrap();
        let table = SegmentTable::new(layout, 256);
        let mut space = PoolSpace::new(layout, 256, [&table].into_iter(), true);
        assert_eq!(space.free_count(), 252);
        let mut lent = Vec::new();
        while let Some((segment, pristine)) = space.lend() {
            assert!(pristine && !layout.is_anchor(segment) && !lent.contains(&segment));
            lent.push(segment);
        }
        assert_eq!((lent.len(), space.free_count()), (252, 0));
        space.take_back(lent[7]);
        assert_eq!(space.lend(), Some((lent[7], false)));
        space.grow(300);
        assert_eq!(space.free_count(), 44);
    }
}
