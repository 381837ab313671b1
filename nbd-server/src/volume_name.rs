//! Names of volumes: 1 to 63 of `a-z 0-9 . -`. They appear in URIs, paths, metrics and host names unchanged.

use std::fmt;
use std::str::FromStr;

use datapath::limits::VOLUME_NAME_BYTES_MAX;
use thiserror::Error;

/// A checked name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeName(String);

/// Why a text cannot name a volume.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VolumeNameError {
    /// Too short or too long.
    #[error("a volume's name has 1 to 63 characters, not {0}")]
    Length(usize),
    /// A character that has a meaning elsewhere.
    #[error("volume {name:?}: {character:?} is not one of a-z, 0-9, '.' and '-'")]
    Character {
        /// What was given.
        name: String,
        /// The first character at fault.
        character: char,
    },
    /// `.x`, `x-` and the like would be hidden files, options, or paths.
    #[error("volume {0:?}: a name begins and ends with a letter or digit")]
    Edge(String),
}

impl FromStr for VolumeName {
    type Err = VolumeNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_plain = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit();
        if text.is_empty() || text.chars().count() > VOLUME_NAME_BYTES_MAX {
            return Err(VolumeNameError::Length(text.chars().count()));
        }
        if let Some(character) =
            text.chars().find(|character| !is_plain(*character) && !".-".contains(*character))
        {
            return Err(VolumeNameError::Character { name: text.to_owned(), character });
        }
        if !text.starts_with(is_plain) || !text.ends_with(is_plain) {
            return Err(VolumeNameError::Edge(text.to_owned()));
        }
        Ok(VolumeName(text.to_owned()))
    }
}

impl VolumeName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{VolumeName, VolumeNameError};

    #[test]
    fn takes_what_is_plain_everywhere() {
        for name in ["a", "0", "db-1", "pg.data-01", &"x".repeat(63)] {
            assert_eq!(name.parse::<VolumeName>().expect("a name").as_str(), name);
        }
    }

    #[test]
    fn says_what_is_wrong() {
        for (name, expected) in [
            ("", VolumeNameError::Length(0)),
            (&*"x".repeat(64), VolumeNameError::Length(64)),
            ("Data", VolumeNameError::Character { name: "Data".into(), character: 'D' }),
            ("a/b", VolumeNameError::Character { name: "a/b".into(), character: '/' }),
            ("bär", VolumeNameError::Character { name: "bär".into(), character: 'ä' }),
            ("..", VolumeNameError::Edge("..".into())),
            ("-a", VolumeNameError::Edge("-a".into())),
        ] {
            assert_eq!(name.parse::<VolumeName>(), Err(expected), "{name:?}");
        }
    }
}
