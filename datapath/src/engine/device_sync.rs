//! One sync of a device at a time, for all its lanes, whichever shard runs them.
//!
//! A failed sync is told to one caller only, and may have dropped what any lane wrote. If two ran at once, the other
//! could succeed afterwards and prove nothing, and its lane would trust what is gone. One after the other, a failure
//! is known here before the next sync could begin, and then none begins any more: a lane of another shard may ask before
//! it has heard of the failure. Besides, lanes that ask in the same turn share one.

use super::ports::Token;
use super::shard_message::ShardIndex;

/// Who wants a sync: a lane of a shard, known by the token of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Applicant {
    pub(super) shard: ShardIndex,
    pub(super) token: Token,
}

/// Syncs of one device: that under way and those asked for.
#[derive(Debug, Default)]
pub(super) struct DeviceSync {
    running: Vec<Applicant>,
    waiting: Vec<Applicant>,
    failed: bool,
}

impl DeviceSync {
    /// A lane wants everything that has completed on stable media.
    pub(super) fn request(&mut self, applicant: Applicant) {
        self.waiting.push(applicant);
    }

    /// Begins the next sync if one is wanted and none is under way.
    pub(super) fn begin(&mut self) -> bool {
        if self.failed || !self.running.is_empty() || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.running, &mut self.waiting);
        true
    }

    /// The sync under way has ended: moves those that it was for to `served`.
    pub(super) fn finish(&mut self, good: bool, served: &mut Vec<Applicant>) {
        assert!(!self.running.is_empty(), "a sync ends once");
        served.append(&mut self.running);
        self.failed |= !good;
    }

    /// A write or sync of the device has failed: no further sync will prove anything.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    /// After a failure: one who waits in vain.
    pub(super) fn refuse_next(&mut self) -> Option<Applicant> {
        if self.failed { self.waiting.pop() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(shard: u16, token: u32) -> Applicant {
        Applicant { shard: ShardIndex(shard), token: Token(token) }
    }

    #[test]
    fn who_comes_while_one_is_running_waits_for_the_next() {
        let mut sync = DeviceSync::default();
        sync.request(lane(0, 1));
        sync.request(lane(1, 1));
        assert!(sync.begin());
        sync.request(lane(0, 3));
        assert!(!sync.begin());
        let mut served = Vec::new();
        sync.finish(true, &mut served);
        assert_eq!(served, [lane(0, 1), lane(1, 1)]);
        assert_eq!((sync.begin(), sync.refuse_next()), (true, None));
    }

    #[test]
    fn after_a_failure_nobody_gets_another_one() {
        let mut sync = DeviceSync::default();
        sync.request(lane(0, 1));
        assert!(sync.begin());
        sync.request(lane(1, 2));
        let mut served = Vec::new();
        sync.finish(false, &mut served);
        assert_eq!((served, sync.begin()), (vec![lane(0, 1)], false));
        assert_eq!((sync.refuse_next(), sync.refuse_next()), (Some(lane(1, 2)), None));
        // From a shard that has not heard of it yet.
        sync.request(lane(1, 3));
        assert_eq!((sync.begin(), sync.refuse_next()), (false, Some(lane(1, 3))));
    }

    #[test]
    fn a_failed_write_lets_the_sync_under_way_end() {
        let mut sync = DeviceSync::default();
        sync.request(lane(0, 1));
        assert!(sync.begin());
        sync.fail();
        let mut served = Vec::new();
        sync.finish(true, &mut served);
        sync.request(lane(0, 2));
        assert_eq!((served, sync.begin(), sync.refuse_next()), (vec![lane(0, 1)], false, Some(lane(0, 2))));
    }
}
