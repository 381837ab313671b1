//! Scenarios: seeds with a slant, each for a kind of trouble that once hid between the ordinary ones.

/// How a seed's world is bent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slant {
    /// A hundred lives, most of which end before the engine has done much: what a start costs, adds up.
    pub short_lives: bool,
    /// The volumes are larger than the pool.
    pub fills: bool,
    /// Clients leave all the time, in the midst of whatever they do.
    pub restless: bool,
    /// Requests of many pieces.
    pub long_requests: bool,
    /// More clients than receive buffers, who often read nothing for so long that the others would have to wait.
    pub hoarding: bool,
    /// Two lanes on a device whose syncs often fail.
    pub failing_syncs: bool,
}

/// A slant with a name.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// How it is asked for.
    pub name: &'static str,
    /// What it does to the world.
    pub slant: Slant,
}

const PLAIN: Slant = Slant {
    short_lives: false,
    fills: false,
    restless: false,
    long_requests: false,
    hoarding: false,
    failing_syncs: false,
};

/// All scenarios.
pub const SCENARIOS: [Scenario; 6] = [
    // A pool of 32 MiB lost two segments at each start, until a start found too few for its checkpoint.
    Scenario { name: "short-lives", slant: Slant { short_lives: true, ..PLAIN } },
    Scenario { name: "short-lives-in-a-full-pool", slant: Slant { short_lives: true, fills: true, ..PLAIN } },
    Scenario { name: "brim", slant: Slant { fills: true, ..PLAIN } },
    // A write was refused in one piece while its connection was being closed under another one.
    Scenario {
        name: "leaving-mid-write",
        slant: Slant { fills: true, restless: true, long_requests: true, ..PLAIN },
    },
    // Clients at a limit kept their receive buffers, and nobody else was heard.
    Scenario { name: "hoarding-clients", slant: Slant { hoarding: true, long_requests: true, ..PLAIN } },
    // Of two syncs at once one failed, and the lane of the other trusted what was gone.
    Scenario { name: "failing-syncs", slant: Slant { failing_syncs: true, ..PLAIN } },
];

/// The scenario of this name.
///
/// # Errors
/// The names there are.
pub fn find(name: &str) -> Result<Scenario, String> {
    let names = || SCENARIOS.map(|scenario| scenario.name).join(", ");
    SCENARIOS
        .into_iter()
        .find(|scenario| scenario.name == name)
        .ok_or_else(|| format!("no scenario {name:?}; there are: {}", names()))
}
