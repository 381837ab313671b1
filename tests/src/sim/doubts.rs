//! Changes whose clients went before they heard of them: what may still become of these, and until when.
//!
//! A server may carry out what was asked on a connection that is gone, or not. But whoever came after that client had gone
//! may be the same one, that asks again and goes on from there: nothing of what it had asked before may come over that. So a
//! change in doubt has taken effect, or never will, once somebody who came later has been answered.

use super::oracle::{ChangeId, Oracle};

/// Those of one volume.
#[derive(Debug, Default)]
pub struct Doubts {
    /// Counts comings and goings.
    moment: u64,
    /// Each with the moment when its client went.
    changes: Vec<(u64, ChangeId)>,
}

/// When a client came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Came(u64);

impl Doubts {
    /// A client connects.
    pub fn come(&mut self) -> Came {
        self.moment += 1;
        Came(self.moment)
    }

    /// A client is gone, and had not heard of these.
    pub fn go(&mut self, changes: impl IntoIterator<Item = ChangeId>) {
        self.moment += 1;
        self.changes.extend(changes.into_iter().map(|change| (self.moment, change)));
    }

    /// A client who came then was answered.
    pub fn settle(&mut self, came: Came, oracle: &mut Oracle) {
        self.changes.retain(|(went, change)| {
            let settled = *went < came.0;
            if settled {
                oracle.close_change(*change);
            }
            !settled
        });
    }
}
