//! Planted bugs of replication: mistakes that the simulator must find, to prove that its alarms ring.
//!
//! They exist only with the feature `planted-bugs`, which the program is never built with; without it
//! [`Bugs::has`] is a constant and the branches are gone.

/// A mistake that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    /// While the admission of a replica is open, changes are acknowledged without it.
    AckBeforeAdmission,
    /// A replica that is sent all changes counts as complete although most of what is older was not copied to it yet.
    ClaimWhileFilling,
    /// Of a replica that is filled, copies overwrite what live changes have written since.
    CopyWins,
    /// A replica that is filled keeps its blocks where the head has holes: what was trimmed comes back.
    HolesNotFilled,
    /// A replica that comes back does not tell what it has beyond what is in common.
    SurplusKept,
    /// All that a replica has counts as in common, whatever epochs have ended since.
    WrongCommonPoint,
    /// Once the removal of a member is proposed, changes are acknowledged without it.
    AckBeforeRemoval,
    /// A head counts its leases from when it received them, not from when it asked.
    LeaseFromReceipt,
    /// A member that starts assumes that it granted no lease.
    LeaseForgotten,
    /// A node that has forgotten a volume in which it is in sync takes part as if it had never been changed.
    LossUnnoticed,
    /// A promise is not brought to stable media.
    PromiseInMemory,
    /// A read shows what is not committed.
    ReadBeforeCommit,
    /// What another replica gave for a damaged block is written again over a change that came meanwhile.
    RepairOverNewer,
    /// What the head gives a member for a damaged block is written there over a change that came meanwhile.
    MendOverNewer,
    /// Replicas are compared although the blocks were changed meanwhile.
    CompareWhileChanging,
    /// A head sees whether it may still read by what the clock showed some turns ago.
    StaleClock,
    /// The head's own log is searched for what a replica lacks before it is known from where on that is sent all changes.
    SourceTooEarly,
    /// What was asked over a connection that is gone is done whenever its turn comes.
    OldBytesLast,
    /// Changes are numbered whether or not the other replicas have room for them.
    RoomIgnored,
    /// A head that lets go of its volume serves until it reads in the record that it has.
    ReadsAfterRelease,
    /// A head reads from its own replica though that is not in sync.
    ReadsOwnStale,
    /// A member that says what was changed leaves out what was released.
    ReleasesNotListed,
}

impl PlantedBug {
    /// All of them, with the names that the simulator's command line uses.
    pub const ALL: [(PlantedBug, &'static str); 22] = [
        (PlantedBug::AckBeforeAdmission, "ack-before-admission"),
        (PlantedBug::ClaimWhileFilling, "claim-while-filling"),
        (PlantedBug::CopyWins, "copy-wins"),
        (PlantedBug::HolesNotFilled, "holes-not-filled"),
        (PlantedBug::SurplusKept, "surplus-kept"),
        (PlantedBug::WrongCommonPoint, "wrong-common-point"),
        (PlantedBug::AckBeforeRemoval, "ack-before-removal"),
        (PlantedBug::LeaseFromReceipt, "lease-from-receipt"),
        (PlantedBug::LeaseForgotten, "lease-forgotten"),
        (PlantedBug::LossUnnoticed, "loss-unnoticed"),
        (PlantedBug::PromiseInMemory, "promise-in-memory"),
        (PlantedBug::ReadBeforeCommit, "read-before-commit"),
        (PlantedBug::RepairOverNewer, "repair-over-newer"),
        (PlantedBug::MendOverNewer, "mend-over-newer"),
        (PlantedBug::CompareWhileChanging, "compare-while-changing"),
        (PlantedBug::StaleClock, "stale-clock"),
        (PlantedBug::SourceTooEarly, "source-too-early"),
        (PlantedBug::OldBytesLast, "old-bytes-last"),
        (PlantedBug::RoomIgnored, "room-ignored"),
        (PlantedBug::ReadsAfterRelease, "reads-after-release"),
        (PlantedBug::ReadsOwnStale, "reads-own-stale"),
        (PlantedBug::ReleasesNotListed, "releases-not-listed"),
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
    pub const fn none() -> Bugs {
        Bugs {
            #[cfg(feature = "planted-bugs")]
            planted: None,
        }
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
