//! What the kernel's io_uring can do, found out once at start.
//!
//! Nothing is concluded from a version string: distributions carry features back, and container runtimes take
//! them away. `BERTH_MASK_FEATURES` hides features that are there, so that one machine can test the way of
//! every kernel: `5.15` or `6.1` hides all that came later, a name (`buffer-ring`) hides that one.

use std::fmt;

use thiserror::Error;

/// The environment variable that hides features.
pub const MASK_VARIABLE: &str = "BERTH_MASK_FEATURES";

/// Something that not every supported kernel (5.15 and later) has or allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Feature {
    /// Device I/O on memory that was pinned once at start. Refused where the locked-memory limit is small.
    RegisteredBuffers,
    /// Files named by their place in the ring's table.
    RegisteredFiles,
    /// One faulty submission does not hold up those behind it.
    SubmitAll,
    /// The ring named by its place in the thread's table.
    RegisteredRing,
    /// Completions interrupt no running code.
    CooperativeTaskrun,
    /// Receive buffers are handed over in shared memory and chosen by the kernel when there is data.
    BufferRing,
    /// One submission accepts connections until it is cancelled.
    MultishotAccept,
    /// Only one thread submits, and completions are worked off when it waits.
    DeferTaskrun,
    /// Waiting for requests does not count as waiting for disks in the machine's statistics.
    NoIowait,
    /// A wait for several completions that is content with one after a moment.
    MinimumWait,
}

impl Feature {
    /// All of them.
    pub const ALL: [Feature; 10] = [
        Feature::RegisteredBuffers,
        Feature::RegisteredFiles,
        Feature::SubmitAll,
        Feature::RegisteredRing,
        Feature::CooperativeTaskrun,
        Feature::BufferRing,
        Feature::MultishotAccept,
        Feature::DeferTaskrun,
        Feature::NoIowait,
        Feature::MinimumWait,
    ];

    /// As printed, and as [`MASK_VARIABLE`] takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Feature::RegisteredBuffers => "registered-buffers",
            Feature::RegisteredFiles => "registered-files",
            Feature::SubmitAll => "submit-all",
            Feature::RegisteredRing => "registered-ring",
            Feature::CooperativeTaskrun => "cooperative-taskrun",
            Feature::BufferRing => "buffer-ring",
            Feature::MultishotAccept => "multishot-accept",
            Feature::DeferTaskrun => "defer-taskrun",
            Feature::NoIowait => "no-iowait",
            Feature::MinimumWait => "minimum-wait",
        }
    }

    /// The first release of Linux that has it.
    fn since(self) -> (u32, u32) {
        match self {
            Feature::RegisteredBuffers | Feature::RegisteredFiles => (5, 1),
            Feature::SubmitAll | Feature::RegisteredRing => (5, 18),
            Feature::CooperativeTaskrun | Feature::BufferRing | Feature::MultishotAccept => (5, 19),
            Feature::DeferTaskrun => (6, 1),
            Feature::NoIowait => (6, 15),
            Feature::MinimumWait => (6, 12),
        }
    }
}

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Features(u16);

impl Features {
    /// No feature at all.
    pub const NONE: Features = Features(0);
    /// Every feature.
    pub const EVERY: Features = Features((1 << Feature::ALL.len()) - 1);

    /// Is it among them?
    #[must_use]
    pub fn has(self, feature: Feature) -> bool {
        self.0 & 1 << feature as u8 != 0
    }

    /// Adds one.
    pub fn insert(&mut self, feature: Feature) {
        self.0 |= 1 << feature as u8;
    }

    /// Takes one away.
    pub fn remove(&mut self, feature: Feature) {
        self.0 &= !(1 << feature as u8);
    }

    /// What a mask leaves of every feature.
    ///
    /// # Errors
    /// If a word of the mask is neither a release (`6.1`) nor the name of a feature.
    pub fn allowed_by(mask: &str) -> Result<Features, MaskError> {
        let mut allowed = Features::EVERY;
        for word in mask.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            if let Some(feature) = Feature::ALL.into_iter().find(|feature| feature.name() == word) {
                allowed.remove(feature);
                continue;
            }
            let release = parse_release(word).ok_or_else(|| MaskError(word.to_owned()))?;
            for feature in Feature::ALL.into_iter().filter(|feature| feature.since() > release) {
                allowed.remove(feature);
            }
        }
        Ok(allowed)
    }

    /// What [`MASK_VARIABLE`] leaves; every feature if it is not set.
    ///
    /// # Errors
    /// As [`Features::allowed_by`].
    pub fn allowed_by_environment() -> Result<Features, MaskError> {
        match std::env::var(MASK_VARIABLE) {
            Ok(mask) => Features::allowed_by(&mask),
            Err(std::env::VarError::NotPresent) => Ok(Features::EVERY),
            Err(std::env::VarError::NotUnicode(_)) => Err(MaskError("(not text)".to_owned())),
        }
    }
}

fn parse_release(word: &str) -> Option<(u32, u32)> {
    let (major, minor) = word.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, feature) in Feature::ALL.into_iter().enumerate() {
            let (space, sign) =
                (if position == 0 { "" } else { " " }, if self.has(feature) { "+" } else { "-" });
            write!(f, "{space}{sign}{}", feature.name())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A word of [`MASK_VARIABLE`] means nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{MASK_VARIABLE}: {0:?} is neither a kernel release like 6.1 nor one of {names}",
    names = Feature::ALL.map(Feature::name).join(", ")
)]
pub struct MaskError(pub String);

#[cfg(test)]
mod tests {
    use super::{Feature, Features};

    #[test]
    fn a_release_hides_what_came_later() {
        let old = Features::allowed_by("5.15").expect("a release");
        assert!(
            old.has(Feature::RegisteredFiles)
                && !old.has(Feature::SubmitAll)
                && !old.has(Feature::BufferRing)
        );
        let debian = Features::allowed_by("6.1").expect("a release");
        assert!(debian.has(Feature::DeferTaskrun) && !debian.has(Feature::NoIowait));
        assert_eq!(Features::allowed_by("").expect("an empty mask"), Features::EVERY);
    }

    #[test]
    fn a_name_hides_one() {
        let mut expected = Features::EVERY;
        expected.remove(Feature::RegisteredBuffers);
        assert_eq!(Features::allowed_by("registered-buffers").expect("a name"), expected);
        let both = Features::allowed_by("6.1, registered-files").expect("a release and a name");
        assert!(!both.has(Feature::RegisteredFiles) && !both.has(Feature::NoIowait));
    }

    #[test]
    fn an_unknown_word_is_refused_by_name() {
        let error = Features::allowed_by("6.1,warp-drive").expect_err("no such feature");
        assert!(error.to_string().contains("\"warp-drive\"") && error.to_string().contains("buffer-ring"));
    }

    #[test]
    fn prints_one_line() {
        let mut features = Features::NONE;
        features.insert(Feature::SubmitAll);
        assert!(features.to_string().starts_with("-registered-buffers -registered-files +submit-all "));
    }
}
