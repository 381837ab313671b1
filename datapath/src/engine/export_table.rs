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
        if name.is_empty() && self.exports.len() == 1 {
            return self.exports.first();
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
    }
}
