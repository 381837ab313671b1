//! The last things that happened on this thread, kept without formatting and printed when a seed fails.
//!
//! The trace belongs to the thread because a failed assertion inside the engine knows nothing of the simulator:
//! the panic hook of the runner prints whatever the panicking thread remembers.

use std::cell::RefCell;

use datapath::units::Moment;

const ENTRIES_MAX: usize = 4096;

/// Something that happened, with up to three numbers that describe it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where, if there are several places.
    place: Option<usize>,
    now: Moment,
    label: &'static str,
    numbers: [u64; 3],
}

#[derive(Default)]
struct Trace {
    seed: u64,
    entries: Vec<Entry>,
    next: usize,
    digest: u64,
    verbose: bool,
    place: Option<usize>,
}

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::default();
}

/// Forgets everything: a new seed begins. When `verbose`, every entry is printed at once.
pub fn begin(seed: u64, verbose: bool) {
    TRACE.with_borrow_mut(|trace| *trace = Trace { seed, verbose, ..Trace::default() });
}

/// What follows happens at this node; nothing if it is outside of all.
pub fn set_place(place: Option<usize>) {
    TRACE.with_borrow_mut(|trace| trace.place = place);
}

/// Notes that something happened. The label says what the numbers are.
pub fn note(now: Moment, label: &'static str, numbers: [u64; 3]) {
    TRACE.with_borrow_mut(|trace| {
        let entry = Entry { place: trace.place, now, label, numbers };
        for number in [now.0, label.len() as u64].into_iter().chain(numbers) {
            trace.digest =
                trace.digest.rotate_left(5).wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        if trace.verbose {
            println!("{}", line(&entry));
        }
        if trace.entries.len() < ENTRIES_MAX {
            trace.entries.push(entry);
        } else {
            let next = trace.next;
            trace.entries[next] = entry;
            trace.next = (next + 1) % ENTRIES_MAX;
        }
    });
}

/// The seed under way on this thread and the last `count` entries, oldest first.
#[must_use]
pub fn tail(count: usize) -> (u64, Vec<String>) {
    TRACE.with_borrow(|trace| {
        let (newest, oldest) = trace.entries.split_at(trace.next);
        let skipped = trace.entries.len().saturating_sub(count);
        (trace.seed, oldest.iter().chain(newest).skip(skipped).map(line).collect())
    })
}

/// A number that two runs have in common only if the same things happened in them.
#[must_use]
pub fn digest() -> u64 {
    TRACE.with_borrow(|trace| trace.digest)
}

fn line(entry: &Entry) -> String {
    let [a, b, c] = entry.numbers;
    let place = entry.place.map_or_else(String::new, |place| format!("n{place} "));
    format!("{place}{:?} {}: {a} {b} {c}", entry.now, entry.label)
}

#[cfg(test)]
mod tests {
    use super::{ENTRIES_MAX, Moment, begin, note, tail};

    #[test]
    fn the_newest_entries_are_kept_in_order() {
        begin(5, false);
        for number in 0..ENTRIES_MAX as u64 + 10 {
            note(Moment(number), "step", [number, 0, 0]);
        }
        let (seed, lines) = tail(2);
        assert_eq!((seed, lines.len()), (5, 2));
        assert!(lines[0].ends_with(&format!("step: {} 0 0", ENTRIES_MAX + 8)), "{lines:?}");
        assert!(lines[1].ends_with(&format!("step: {} 0 0", ENTRIES_MAX + 9)), "{lines:?}");
        assert_eq!(tail(usize::MAX).1.len(), ENTRIES_MAX);
    }
}
