//! Damages the image of a pool as bytes say.

use super::Input;
use super::build::{Builder, Image};
use crate::store::batch::Descriptor;
use crate::store::bugs::Bugs;
use crate::store::fields::{crc32c_without, put};
use crate::store::layout::{ANCHORS, Place};
use crate::store::recovery::recover_lane;
use crate::units::BLOCK_BYTES_USIZE;
use std::collections::BTreeSet;

/// What can be asked of a pool after some damage, from most to least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trust {
    /// What was answered is there, or an error is.
    Answered,
    /// What is there was once written there: a disk that lies about a write, or a change of the log's very end, cannot be
    /// found out with one replica.
    OnceThere,
    /// Checksums were made right for what nobody wrote: only that nothing falls over.
    Forged,
}

/// Blocks of one kind each, so that few bytes of input reach all of them.
pub(super) struct Targets {
    kinds: [Vec<u32>; 6],
    /// Those of which nothing on the disk says that they had been flushed, and what lies behind them.
    fragile: BTreeSet<u32>,
    blocks: u32,
}

/// Names of the kinds, for the corpus.
pub(super) const KINDS: [&str; 6] = ["header", "root", "body", "leaf", "descriptor", "payload"];

impl Targets {
    pub(super) fn of(builder: &mut Builder) -> Targets {
        let layout = builder.layout;
        builder.image.bytes_read = 0;
        let mut recovered = recover_lane(&mut builder.image, layout, 0, 0, Bugs::none())
            .expect("an undamaged pool is recovered");
        let anchors = 0..ANCHORS;
        let headers = anchors.clone().map(|anchor| layout.place(layout.anchor(anchor), 0).0).collect();
        let roots = anchors.map(|anchor| layout.root_place(0, anchor).0).collect();
        let body =
            recovered.body.iter().flatten().flat_map(|run| run.places()).map(|place| place.0).collect();
        let positions = 0..u32::try_from(recovered.volumes.len()).expect("two");
        let leaves = positions.clone().flat_map(|volume| recovered.map.table(volume).records());
        let leaves = leaves.filter(|leaf| leaf.place != Place::NONE).map(|leaf| leaf.place.0).collect();
        let mut fragile = BTreeSet::new();
        for run in &recovered.unproven {
            fragile.extend(run.places().map(|place| place.0));
        }
        for end in recovered.log_ends.iter().flatten() {
            let first = layout.place(end.segment, 0).0;
            fragile.extend(first + end.block..first + layout.segment_blocks);
            let next = layout.place(end.next_segment, 0).0;
            fragile.extend(next..next + layout.segment_blocks);
        }
        let mut payloads = Vec::new();
        for position in positions {
            recovered
                .visit_blocks(&mut builder.image, position as usize, |_, mapping| {
                    payloads.push(mapping.place.0)
                })
                .expect("an undamaged pool");
        }
        let blocks = u32::try_from(builder.image.bytes.len() / BLOCK_BYTES_USIZE).expect("fits");
        let is_descriptor = |place: &u32| Descriptor::decode(builder.image.block(*place)).is_some();
        let descriptors = (0..blocks).filter(is_descriptor).collect();
        Targets { kinds: [headers, roots, body, leaves, descriptors, payloads], fragile, blocks }
    }

    /// A block by two bytes: the last of a kind, and those before it, come first.
    fn choose(&self, kind: u8, index: u8) -> u32 {
        match self.kinds.get(usize::from(kind) % 8) {
            Some(list) if !list.is_empty() => list[list.len() - 1 - usize::from(index) % list.len()],
            _ => (u32::from(kind) << 8 | u32::from(index)) * 37 % self.blocks,
        }
    }
}

/// Applies damage after damage until the bytes are used up; says what can be asked of the pool now.
pub(super) fn apply(image: &mut Image, targets: &Targets, input: &mut Input<'_>) -> Trust {
    let mut trust = Trust::Answered;
    // A pool that is damaged all over teaches nothing.
    for _ in 0..8 {
        let Some(kind) = input.next() else { break };
        let place = targets.choose(kind, input.next_or(0));
        let (action, at, value) = (input.next_or(0), input.next_or(0), input.next_or(0));
        let found = damage(image, targets, place, action, (at, value));
        trust = trust.max(found);
    }
    trust
}

fn damage(image: &mut Image, targets: &Targets, place: u32, action: u8, (at, value): (u8, u8)) -> Trust {
    let rotten = if targets.fragile.contains(&place) { Trust::OnceThere } else { Trust::Answered };
    let len_blocks = u32::try_from(image.bytes.len() / BLOCK_BYTES_USIZE).expect("fits");
    if place >= len_blocks {
        return rotten;
    }
    match action % 8 {
        0 => {
            // The first 256 bytes one by one, for the fields are there, or any.
            let at = if value & 1 == 0 { usize::from(at) } else { usize::from(at) * 16 + 5 };
            image.block_mut(place).expect("inside")[at] ^= value | 1;
            rotten
        }
        1 => {
            let block = image.block_mut(place).expect("inside");
            let mut noise = u64::from(at) << 8 | u64::from(value) | 1;
            block.iter_mut().for_each(|byte| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = noise.to_be_bytes()[0];
            });
            rotten
        }
        2 => {
            image.block_mut(place).expect("inside").fill(0);
            rotten
        }
        3 => {
            image.unreadable.insert(place);
            rotten
        }
        4 => {
            let from = targets.choose(at, value);
            if from < len_blocks {
                let block = image.block(from).to_vec();
                image.block_mut(place).expect("inside").copy_from_slice(&block);
            }
            Trust::OnceThere
        }
        5 => {
            let earlier: Vec<_> = image.old.iter().filter(|(old, _)| old.0 == place).collect();
            if let Some(index) = usize::from(value).checked_rem(earlier.len()) {
                let block = earlier[earlier.len() - 1 - index].1.clone();
                image.block_mut(place).expect("inside").copy_from_slice(&block);
            }
            Trust::OnceThere
        }
        6 => {
            forge(image, targets, place, usize::from(at), value);
            Trust::Forged
        }
        _ => {
            // Cut off by at most a tenth, and rarely.
            let cut = if value == 0xff { usize::from(at) * 16 } else { 0 };
            let left = image.bytes.len() - cut * BLOCK_BYTES_USIZE;
            image.bytes.truncate(left);
            rotten
        }
    }
}

/// Changes a field of a block that carries its own checksum, and makes that right again; of a root in all slots, or no
/// two would agree.
fn forge(image: &mut Image, targets: &Targets, place: u32, at: usize, value: u8) {
    let word = match value & 3 {
        0 => u32::from(value >> 2),
        1 => u32::MAX - u32::from(value >> 2),
        2 => 1 << (value >> 3),
        _ => u32::from(value) * 0x0101_0101,
    };
    let crc_at = match &image.block(place)[..4] {
        b"BERT" if &image.block(place)[..8] == b"BERTHPOL" => 12,
        b"BERT" => 8,
        b"BTCH" => 4,
        _ => return,
    };
    let slots = if crc_at == 4 { vec![place] } else { targets.kinds[usize::from(crc_at == 8)].clone() };
    for slot in slots {
        let Some(block) = image.block_mut(slot) else { continue };
        put(block, at, &word.to_le_bytes());
        let crc = crc32c_without(block, crc_at);
        put(block, crc_at, &crc.to_le_bytes());
    }
}
