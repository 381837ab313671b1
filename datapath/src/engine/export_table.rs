//! The volumes that a shard serves, by name.

use crate::request::{Export, ExportIndex, Exports};

/// Exports in the order of their names, for lookups and listings.
#[derive(Debug, Default)]
pub(super) struct ExportTable {
    exports: Vec<Export>,
    by_name: Vec<usize>,
}

impl ExportTable {
    /// Adds an export; its index is the number of those before it.
    ///
    /// # Panics
    /// If the name is taken.
    pub(super) fn add(&mut self, name: String, size_bytes: u64, read_only: bool) -> ExportIndex {
        let index = ExportIndex(u32::try_from(self.exports.len()).expect("exports fit 32 bits"));
        let position = self.position(&name).expect_err("names are unique");
        self.by_name.insert(position, self.exports.len());
        self.exports.push(Export {
            index,
            name,
            description: String::new(),
            size_bytes,
            read_only,
            refusal: None,
        });
        index
    }

    /// The same for a volume of a cluster. Names are unique there: an export that has this one is of a volume that is no more,
    /// and is not found from now on.
    pub(super) fn add_newest(&mut self, name: String, size_bytes: u64, read_only: bool) -> ExportIndex {
        self.withdraw_name(&name);
        self.add(name, size_bytes, read_only)
    }

    fn withdraw_name(&mut self, name: &str) {
        if let Ok(position) = self.position(name) {
            self.by_name.remove(position);
        }
    }

    /// Nobody finds the export any more. Its index can be [given to another](Self::replace).
    pub(super) fn withdraw(&mut self, index: ExportIndex) {
        self.by_name.retain(|other| *other != index.0 as usize);
    }

    /// A withdrawn export's index is another one's from now on, which is added like [the newest](Self::add_newest).
    ///
    /// # Panics
    /// If the export was not withdrawn.
    pub(super) fn replace(&mut self, index: ExportIndex, name: String, size_bytes: u64) {
        let at = index.0 as usize;
        assert!(!self.by_name.contains(&at), "export {at} is in use");
        self.withdraw_name(&name);
        let position = self.position(&name).expect_err("names are unique");
        self.by_name.insert(position, at);
        let export = &mut self.exports[at];
        (export.name, export.size_bytes, export.refusal) = (name, size_bytes, None);
    }

    /// Says why an export cannot be chosen now, or that it can.
    pub(super) fn set_refusal(&mut self, index: ExportIndex, refusal: Option<String>) {
        self.exports[index.0 as usize].refusal = refusal;
    }

    fn position(&self, name: &str) -> Result<usize, usize> {
        self.by_name.binary_search_by(|index| self.exports[*index].name.as_str().cmp(name))
    }
}

impl Exports for ExportTable {
    fn find(&self, name: &str) -> Option<&Export> {
        // Clients that name no export mean the only one there is.
        if let (true, [only]) = (name.is_empty(), self.by_name.as_slice()) {
            return Some(&self.exports[*only]);
        }
        self.position(name).ok().map(|position| &self.exports[self.by_name[position]])
    }

    fn nth(&self, position: usize) -> Option<&Export> {
        self.by_name.get(position).map(|index| &self.exports[*index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_found_by_name_and_listed_in_order() {
        let mut table = ExportTable::default();
        let b = table.add("b".into(), 1, false);
        assert_eq!(table.find("").map(|export| export.index), Some(b));
        let a = table.add("a".into(), 1, false);
        assert_eq!((table.find(""), table.find("c")), (None, None));
        assert_eq!(table.find("a").map(|export| export.index), Some(a));
        let listed: Vec<_> =
            (0..).map_while(|position| table.nth(position)).map(|export| export.index).collect();
        assert_eq!(listed, [a, b]);
        table.withdraw(b);
        assert_eq!((table.find("b"), table.find("").map(|export| export.index)), (None, Some(a)));
        table.replace(b, "0".into(), 7);
        let listed: Vec<_> = (0..).map_while(|position| table.nth(position)).collect();
        assert_eq!(listed.iter().map(|export| export.index).collect::<Vec<_>>(), [b, a]);
        assert_eq!(table.find("0").map(|export| export.size_bytes), Some(7));
        let c = table.add_newest("a".into(), 3, false);
        assert_eq!(table.find("a").map(|export| export.index), Some(c), "the newest of this name");
        table.withdraw(a);
        assert_eq!(table.find("a").map(|export| export.index), Some(c), "the older one had gone already");
    }
}
