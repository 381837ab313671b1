//! Numbered slots with reuse: how operations under way are named without pointers.

/// A vector whose empty slots are reused. Grows to the largest number ever under way and then stays.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Option<T>>,
    vacant: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Slab<T> {
        Slab { slots: Vec::new(), vacant: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Keeps `value` under the returned number.
    pub fn insert(&mut self, value: T) -> u32 {
        if let Some(index) = self.vacant.pop() {
            self.slots[index as usize] = Some(value);
            return index;
        }
        self.slots.push(Some(value));
        u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations under way")
    }

    /// Takes the value out and frees its number.
    ///
    /// # Panics
    /// If nothing is kept under `index`: an operation would have ended twice.
    pub fn remove(&mut self, index: u32) -> T {
        let value = self.slots[index as usize].take().expect("an operation ends once");
        self.vacant.push(index);
        value
    }

    /// The value kept under `index`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn get(&self, index: u32) -> &T {
        self.slots[index as usize].as_ref().expect("an operation under way")
    }

    /// The value kept under `index`, to change it.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_mut(&mut self, index: u32) -> &mut T {
        self.slots[index as usize].as_mut().expect("an operation under way")
    }

    /// The value kept under `index`, if any.
    #[must_use]
    pub fn find(&self, index: u32) -> Option<&T> {
        self.slots.get(index as usize)?.as_ref()
    }

    /// All values kept, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.slots).filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }

    /// The same, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        (0..).zip(&mut self.slots).filter_map(|(index, slot)| Some((index, slot.as_mut()?)))
    }

    /// How many values are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    /// Is nothing kept?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn numbers_are_reused_and_values_kept_apart() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert("a"), slab.insert("b"));
        assert_eq!(slab.remove(a), "a");
        let c = slab.insert("c");
        assert_eq!((c, *slab.get(b), *slab.get(c), slab.len()), (a, "b", "c", 2));
    }

    #[test]
    #[should_panic(expected = "ends once")]
    fn removing_twice_is_caught() {
        let mut slab = Slab::default();
        let a = slab.insert(1);
        slab.remove(a);
        slab.remove(a);
    }
}
