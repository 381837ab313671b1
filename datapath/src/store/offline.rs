//! What tools do with a recovered lane that nobody serves: look at what a volume holds, and remove a volume.

use super::map::{FrameIndex, LEAF_BLOCKS, Mapping};
use super::recovery::{PoolReader, Recovered, RecoveryError, leaf_at_hand};

/// Leaves of the largest volume.
const LEAVES_MAX: u32 = u32::MAX / LEAF_BLOCKS + 1;

impl Recovered {
    /// Calls `visit` for each block of a volume that holds data, in order. Volumes are named by position.
    ///
    /// # Errors
    /// [`RecoveryError::LeafDamaged`].
    pub fn visit_blocks(
        &mut self,
        reader: &mut impl PoolReader,
        volume: usize,
        mut visit: impl FnMut(u32, Mapping),
    ) -> Result<(), RecoveryError> {
        self.visit_leaves(reader, volume, |recovered, leaf, frame| {
            for offset in 0..LEAF_BLOCKS {
                let mapping = recovered.map.get(frame, offset);
                if mapping.place.is_on_device() {
                    visit(leaf * LEAF_BLOCKS + offset, mapping);
                }
            }
        })
    }

    /// Removes a volume: nothing refers to its blocks and leaves any more. It takes effect with the lane's next
    /// checkpoint; until then the pool holds the volume as before. Returns how many blocks of data it had.
    ///
    /// # Errors
    /// [`RecoveryError::LeafDamaged`]: what the leaf refers to cannot be known. The lane is to be recovered anew.
    pub fn remove_volume(
        &mut self,
        reader: &mut impl PoolReader,
        volume: usize,
    ) -> Result<u64, RecoveryError> {
        let position = u32::try_from(volume).expect("volumes fit 32 bits");
        let mut released = 0;
        self.visit_leaves(reader, volume, |recovered, leaf, frame| {
            for offset in 0..LEAF_BLOCKS {
                let place = recovered.map.get(frame, offset).place;
                released += u64::from(place.is_on_device());
                recovered.segments.remove_live(place);
            }
            let on_device = recovered.map.table(position).leaf_on_device(leaf);
            recovered.segments.remove_live(on_device.place);
        })?;
        self.map.remove_volume(position);
        self.volumes.remove(volume);
        Ok(released)
    }

    fn visit_leaves(
        &mut self,
        reader: &mut impl PoolReader,
        volume: usize,
        mut visit: impl FnMut(&mut Recovered, u32, FrameIndex),
    ) -> Result<(), RecoveryError> {
        let position = u32::try_from(volume).expect("volumes fit 32 bits");
        let mut next = 0;
        while let Some(leaf) = self.map.table(position).next_present(next, LEAVES_MAX) {
            next = leaf + 1;
            let frame = leaf_at_hand(reader, self, volume, leaf)?;
            visit(self, leaf, frame);
        }
        Ok(())
    }
}
