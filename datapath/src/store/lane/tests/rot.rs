//! Descriptors of the log that rot after they were flushed: recovery notices, or is told by nothing on the device.

use super::*;
use crate::store::batch::Descriptor;
use crate::store::recovery::{Recovered, RecoveryError};

fn recover(world: &mut World) -> Result<Recovered, RecoveryError> {
    recover_lane(&mut world.disk, world.layout, 0, 1 << 20, Bugs::none())
}

/// Places of all that looks like a descriptor of the clients' stream.
fn descriptors(world: &World) -> Vec<usize> {
    let blocks = world.disk.seen.chunks_exact(BLOCK_BYTES_USIZE).enumerate();
    let of_clients = |block: &[u8]| Descriptor::decode(block).is_some_and(|found| found.header.stream == 0);
    blocks.filter(|(_, block)| of_clients(block)).map(|(at, _)| at * BLOCK_BYTES_USIZE).collect()
}

/// No sync ended while the log ran through several segments; the batches that state the watermark come long after.
#[test]
fn a_descriptor_that_rots_is_missed_also_segments_before_the_first_sync() {
    let mut world = World::new(AckPolicy::Device, 40, 11);
    world.disk.holds_syncs = true;
    let segment = |world: &World, at: usize| at / world.layout.segment_bytes() as usize;
    for turn in 0..36 {
        world.append(ChangeKind::Data, turn * 64 % 2048, 1 + turn % 40, false);
        world.run();
    }
    world.disk.holds_syncs = false;
    world.run();
    world.append(ChangeKind::Data, 3, 1, false);
    world.run();
    let whole = recover(&mut world).unwrap();
    let (stamp, batches) = (whole.volumes[0].stamp(), whole.batches_rolled_forward);
    assert_eq!((stamp.sequence, batches > 30), (37, true));
    let unproven: Vec<_> = whole.unproven.iter().map(|run| run.place.offset_bytes()).collect();
    let (mut noticed, mut segments) = (0, Vec::new());
    for at in descriptors(&world) {
        world.disk.seen[at + 50] ^= 1;
        match recover(&mut world) {
            Err(error) => {
                assert!(matches!(error, RecoveryError::FlushedBatchLost { .. }), "{error}");
                noticed += 1;
                segments.push(segment(&world, at));
            }
            Ok(found) => assert!(
                unproven.contains(&(at as u64))
                    || (found.volumes[0].stamp(), found.batches_rolled_forward) == (stamp, batches),
                "what was flushed is gone and nobody is told: the batch at byte {at}"
            ),
        }
        world.disk.seen[at + 50] ^= 1;
    }
    segments.dedup();
    assert!(noticed > 25 && segments.len() > 2, "{noticed} in the segments {segments:?}");
}
