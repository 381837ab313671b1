//! Virtual time: what is going to happen, in order. Nothing in a simulation waits; the clock jumps.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use datapath::units::Moment;

/// The things that are going to happen, and the present moment.
#[derive(Debug)]
pub struct Agenda<T> {
    now: Moment,
    /// Breaks ties: what was planned first happens first.
    planned: u64,
    entries: BinaryHeap<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    moment: Moment,
    number: u64,
    happening: T,
}

impl<T> Agenda<T> {
    /// An empty agenda whose clock shows `now`.
    #[must_use]
    pub fn new(now: Moment) -> Agenda<T> {
        Agenda { now, planned: 0, entries: BinaryHeap::new() }
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.now
    }

    /// Plans something for `moment`, or for now if that has passed.
    pub fn at(&mut self, moment: Moment, happening: T) {
        self.planned += 1;
        self.entries.push(Entry { moment: moment.max(self.now), number: self.planned, happening });
    }

    /// Plans something `nanoseconds` from now.
    pub fn after_ns(&mut self, nanoseconds: u64, happening: T) {
        self.at(self.now.after_ns(nanoseconds), happening);
    }

    /// When the next happening is.
    #[must_use]
    pub fn next_moment(&self) -> Option<Moment> {
        self.entries.peek().map(|entry| entry.moment)
    }

    /// Lets time pass, up to `moment` or to the next happening.
    pub fn advance_to(&mut self, moment: Moment) {
        let limit = self.next_moment().unwrap_or(moment).min(moment);
        self.now = self.now.max(limit);
    }

    /// Jumps to the next happening.
    pub fn advance(&mut self) -> Option<T> {
        let entry = self.entries.pop()?;
        self.now = entry.moment;
        Some(entry.happening)
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    /// The greatest entry is the one that happens first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.moment, other.number).cmp(&(self.moment, self.number))
    }
}

#[cfg(test)]
mod tests {
    use super::{Agenda, Moment};

    #[test]
    fn things_happen_in_order_and_never_in_the_past() {
        let mut agenda = Agenda::new(Moment(100));
        agenda.after_ns(50, "third");
        agenda.at(Moment(7), "first");
        agenda.after_ns(0, "second");
        agenda.at(Moment(150), "fourth");
        let mut seen = Vec::new();
        while let Some(happening) = agenda.advance() {
            seen.push((agenda.now().0, happening));
        }
        assert_eq!(seen, [(100, "first"), (100, "second"), (150, "third"), (150, "fourth")]);
    }
}
