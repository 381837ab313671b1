//! Names of nodes: they obey the rules of volumes' names, because they appear in the same places.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::volume_name::VolumeName;

/// A checked name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeName(String);

/// A text that cannot name a node.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "node {0:?}: a name has 1 to 63 of a-z, 0-9, '.' and '-', and begins and ends with a letter or digit"
)]
pub struct NodeNameError(String);

/// What is shown of a name that is far too long.
const SHOWN_CHARACTERS_MAX: usize = 80;

impl FromStr for NodeName {
    type Err = NodeNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<VolumeName>() {
            Ok(_) => Ok(NodeName(text.to_owned())),
            Err(_) => Err(NodeNameError(text.chars().take(SHOWN_CHARACTERS_MAX).collect())),
        }
    }
}

impl NodeName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::NodeName;

    #[test]
    fn takes_what_names_a_volume() {
        for name in ["n1", "node-1.rack-2", &"x".repeat(63)] {
            assert_eq!(name.parse::<NodeName>().expect("a name").as_str(), name);
        }
        for name in ["", "N1", "a_b", "-n", &"x".repeat(64)] {
            let error = name.parse::<NodeName>().expect_err(name).to_string();
            assert!(error.starts_with(&format!("node {name:?}: a name has 1 to 63")), "{error}");
        }
        assert!("x".repeat(1 << 20).parse::<NodeName>().expect_err("too long").to_string().len() < 300);
    }
}
