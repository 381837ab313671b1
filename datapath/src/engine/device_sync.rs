//! One sync of a device at a time, for all its lanes.
//!
//! A failed sync is told to one caller only, and may have dropped what any lane wrote. If two ran at once, the other
//! could succeed afterwards and prove nothing, and its lane would trust what is gone. One after the other, a failure
//! is known to all lanes before the next sync begins. Besides, lanes that ask in the same turn share one.

use super::ports::Token;

/// Syncs of one device: that under way and those asked for. Lanes are known by the tokens of their requests.
#[derive(Debug, Default)]
pub(super) struct DeviceSync {
    running: Vec<Token>,
    waiting: Vec<Token>,
}

impl DeviceSync {
    /// A lane wants everything that has completed on stable media.
    pub(super) fn request(&mut self, token: Token) {
        self.waiting.push(token);
    }

    /// Begins the next sync if one is wanted and none is under way: the token to start it with.
    pub(super) fn begin(&mut self) -> Option<Token> {
        if !self.running.is_empty() || self.waiting.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        Some(self.running[0])
    }

    /// Begins a write that is on stable media when it ends, as if it were a sync: the kernel may make it one, with all
    /// that a failure means. False if a sync is under way or wanted: the write is better covered by one that comes after it.
    pub(super) fn begin_lasting_write(&mut self, token: Token) -> bool {
        let free = self.running.is_empty() && self.waiting.is_empty();
        if free {
            self.running.push(token);
        }
        free
    }

    /// Is this what [`Self::begin`] gave, or [`Self::begin_lasting_write`] took?
    pub(super) fn is_running(&self, token: Token) -> bool {
        self.running.first() == Some(&token)
    }

    /// The sync or write under way has ended: moves those that it was for to `served`. After a failure nobody waits for
    /// another one.
    pub(super) fn finish(&mut self, good: bool, served: &mut Vec<Token>) {
        served.append(&mut self.running);
        if !good {
            served.append(&mut self.waiting);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_while_one_is_running_waits_for_the_next() {
        let mut sync = DeviceSync::default();
        sync.request(Token(1));
        sync.request(Token(2));
        assert_eq!(sync.begin(), Some(Token(1)));
        sync.request(Token(3));
        assert_eq!((sync.begin(), sync.is_running(Token(1)), sync.is_running(Token(3))), (None, true, false));
        let mut served = Vec::new();
        sync.finish(true, &mut served);
        assert_eq!(served, [Token(1), Token(2)]);
        assert_eq!(sync.begin(), Some(Token(3)));
    }

    #[test]
    fn a_lasting_write_and_a_sync_never_run_at_once() {
        let mut sync = DeviceSync::default();
        assert!(sync.begin_lasting_write(Token(1)));
        assert!(sync.is_running(Token(1)) && !sync.begin_lasting_write(Token(2)));
        sync.request(Token(3));
        assert_eq!(sync.begin(), None);
        let mut served = Vec::new();
        sync.finish(true, &mut served);
        assert_eq!(served, [Token(1)]);
        // Who waits for a sync comes first.
        assert!(!sync.begin_lasting_write(Token(2)));
        assert_eq!(sync.begin(), Some(Token(3)));
        assert!(!sync.begin_lasting_write(Token(2)));
    }

    #[test]
    fn a_failure_is_everybodys() {
        let mut sync = DeviceSync::default();
        sync.request(Token(1));
        sync.begin();
        sync.request(Token(2));
        let mut served = Vec::new();
        sync.finish(false, &mut served);
        assert_eq!(served, [Token(1), Token(2)]);
        assert_eq!(sync.begin(), None);
    }
}
