//! Planted bugs: mistakes that the simulator must find, to prove that its alarms ring.
//!
//! They exist only with the feature `planted-bugs`, which the program is never built with; without it
//! [`Bugs::has`] is a constant and the branches are gone.

/// A mistake that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    /// A segment is written again as soon as nothing in memory refers to it, without waiting for a checkpoint.
    SegmentReusedEarly,
    /// A write is answered when its own batch is on the device, though an earlier batch of the lane is not.
    AckBeforeEarlierBatch,
    /// A sync that was running when a write completed is taken to cover it.
    RunningSyncCovers,
    /// Rolling forward takes any batch with good checksums, whether or not it follows the one before.
    NoChain,
    /// The cleaner's move takes effect although the block was written again meanwhile.
    MoveOverNewerVersion,
}

impl PlantedBug {
    /// All of them, with the names that the simulator's command line uses.
    pub const ALL: [(PlantedBug, &'static str); 5] = [
        (PlantedBug::SegmentReusedEarly, "segment-reused-early"),
        (PlantedBug::AckBeforeEarlierBatch, "ack-before-earlier-batch"),
        (PlantedBug::RunningSyncCovers, "running-sync-covers"),
        (PlantedBug::NoChain, "no-chain"),
        (PlantedBug::MoveOverNewerVersion, "move-over-newer-version"),
    ];
}

/// Which bug is planted, if any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bugs {
    #[cfg(feature = "planted-bugs")]
    planted: Option<PlantedBug>,
}

impl Bugs {
    /// None.
    #[must_use]
    pub fn none() -> Bugs {
        Bugs::default()
    }

    /// Plants one.
    #[cfg(feature = "planted-bugs")]
    #[must_use]
    pub fn planted(bug: PlantedBug) -> Bugs {
        Bugs { planted: Some(bug) }
    }

    /// Is this one planted?
    #[must_use]
    #[inline]
    pub fn has(self, bug: PlantedBug) -> bool {
        #[cfg(feature = "planted-bugs")]
        return self.planted == Some(bug);
        #[cfg(not(feature = "planted-bugs"))]
        {
            let _ = bug;
            false
        }
    }
}
