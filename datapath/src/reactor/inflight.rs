//! What the kernel works on: each submission carries a slot number and the slot's generation, never a pointer.
//!
//! The kernel must answer every submission once (a multishot one: until it says that it ends). An answer for a
//! slot of another generation would be an answer too many, and memory handed to somebody else by then: the
//! process stops rather than go on.

/// What a submission carries and its completions bring back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    slot: u32,
    generation: u32,
}

impl Ticket {
    /// As the kernel carries it.
    pub(super) fn to_user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// As the kernel gave it back.
    pub(super) fn from_user_data(user_data: u64) -> Ticket {
        let slot = u32::try_from(user_data & u64::from(u32::MAX)).expect("masked to 32 bits");
        let generation = u32::try_from(user_data >> 32).expect("shifted to 32 bits");
        Ticket { slot, generation }
    }
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    operation: Option<T>,
}

/// A table of fixed size, made at start.
#[derive(Debug)]
pub(super) struct Inflight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T: Copy> Inflight<T> {
    /// A table with `capacity` slots.
    pub(super) fn new(capacity: u32) -> Inflight<T> {
        Inflight {
            slots: (0..capacity).map(|_| Slot { generation: 0, operation: None }).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// Nothing is with the kernel.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes a slot for an operation about to be submitted.
    ///
    /// # Panics
    /// If there is none: the table is sized for all that the limits allow.
    pub(super) fn insert(&mut self, operation: T) -> Ticket {
        let index = self.free.pop().expect("a free slot: the table covers all that may be asked for");
        let slot = &mut self.slots[index as usize];
        assert!(slot.operation.is_none(), "slot {index} is taken twice");
        slot.operation = Some(operation);
        Ticket { slot: index, generation: slot.generation }
    }

    /// The operation of a ticket that stays with the kernel.
    ///
    /// # Panics
    /// If the ticket is not of a live operation.
    pub(super) fn get_mut(&mut self, ticket: Ticket) -> &mut T {
        let slot = self.slots.get_mut(ticket.slot as usize).expect("a slot of this table");
        assert_eq!(slot.generation, ticket.generation, "{ticket:?} was completed before");
        slot.operation.as_mut().expect("a live operation")
    }

    /// Frees the slot of an operation that has ended.
    ///
    /// # Panics
    /// If the ticket is not of a live operation.
    pub(super) fn remove(&mut self, ticket: Ticket) -> T {
        let operation = *self.get_mut(ticket);
        let slot = &mut self.slots[ticket.slot as usize];
        slot.operation = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(ticket.slot);
        operation
    }

    /// The operations that the kernel has.
    pub(super) fn live(&self) -> impl Iterator<Item = (Ticket, T)> {
        self.slots.iter().zip(0..).filter_map(|(slot, index)| {
            let ticket = Ticket { slot: index, generation: slot.generation };
            slot.operation.map(|operation| (ticket, operation))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Inflight, Ticket};

    #[test]
    fn a_slot_comes_back_under_another_ticket() {
        let mut table = Inflight::new(1);
        let first = table.insert('a');
        assert!(!table.is_empty());
        assert_eq!(table.remove(first), 'a');
        let second = table.insert('b');
        assert_ne!(first, second);
        assert_eq!(Ticket::from_user_data(second.to_user_data()), second);
        assert_eq!(table.live().collect::<Vec<_>>(), [(second, 'b')]);
    }

    #[test]
    #[should_panic(expected = "was completed before")]
    fn a_second_completion_is_fatal() {
        let mut table = Inflight::new(2);
        let ticket = table.insert(());
        table.remove(ticket);
        table.remove(ticket);
    }

    #[test]
    #[should_panic(expected = "a free slot")]
    fn more_than_was_sized_for_is_fatal() {
        let mut table = Inflight::new(1);
        table.insert(());
        table.insert(());
    }
}
