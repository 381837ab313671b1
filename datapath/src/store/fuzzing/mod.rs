//! What must hold for a pool with any damage at all: the body of the fuzz target `pool_image`. Tests replay its corpus and
//! many mutations of it.
//!
//! Input: a program that fills a small pool through a lane, byte by byte (`build`, `Builder::operate`), then the byte 0xf0
//! or more, then damages of five bytes each (`damage`): kind of block, which of them counted from the last, what is done
//! to it, and two bytes more.
//!
//! Recovery and the offline check must end, without a panic and without reading or keeping more than the pool's size
//! warrants. What they then say a block holds is what was answered last, or something newer that was under way, unless it
//! is an error. Only where the disk had lied, or the damage is at the end of the log of which nothing yet says that it was
//! flushed, it may be anything that was once written to that block.

mod build;
mod damage;
#[cfg(test)]
mod tests;

use super::bugs::Bugs;
use super::check::check_lane;
use super::map::LEAF_BLOCKS;
use super::recovery::{Recovered, RecoveryError, leaf_at_hand, read_layout, recover_lane};
use crate::checksum::crc32c;
use crate::memory::Memory;
use crate::units::{BLOCK_BYTES_USIZE, MemoryRange};
use build::{Builder, History, Image, tag_of, volumes};
use damage::{Targets, Trust};
use std::collections::BTreeMap;

use super::layout::{Layout, Place};
use super::recovery::PoolReader;

/// The least byte with which a program ends and damage begins.
const DAMAGE: u8 = 0xf0;

/// The bytes of an input that are left.
#[derive(Debug)]
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn next_or(&mut self, otherwise: u8) -> u8 {
        self.next().unwrap_or(otherwise)
    }
}

/// Memory that is a vector.
#[derive(Debug)]
struct VecMemory(Vec<u8>);

fn span(range: MemoryRange) -> std::ops::Range<usize> {
    range.start as usize..range.end() as usize
}

impl Memory for VecMemory {
    fn len_bytes(&self) -> u32 {
        u32::try_from(self.0.len()).expect("below 4 GiB")
    }

    fn bytes(&self, range: MemoryRange) -> &[u8] {
        &self.0[span(range)]
    }

    fn bytes_mut(&mut self, range: MemoryRange) -> &mut [u8] {
        &mut self.0[span(range)]
    }

    fn copy(&mut self, from: MemoryRange, to: MemoryRange) {
        self.0.copy_within(span(from), to.start as usize);
    }
}

/// How recovery ended, for tests that look where seeds lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Why the pool was refused, if it was.
    pub refused: Option<RecoveryError>,
    /// Problems that the check found.
    pub problems: u64,
    /// Blocks whose content was an error.
    pub errors: u32,
    /// Blocks that held data.
    pub data: u32,
    /// Was the damage such that everything answered must be there, or an error?
    pub exact: bool,
}

/// Target `pool_image`: see the module's text.
///
/// # Panics
/// If it does not hold; that is the finding.
pub fn check_pool_image(data: &[u8]) -> Outcome {
    let mut input = Input(data);
    let mut builder = Builder::new();
    builder.run_program(&mut input);
    let targets = Targets::of(&mut builder);
    let Builder { mut image, histories, .. } = builder;
    let trust = damage::apply(&mut image, &targets, &mut input);
    image.old.clear();
    let exact = trust == Trust::Answered;
    let mut outcome = Outcome { refused: None, problems: 0, errors: 0, data: 0, exact };
    match recover(&mut image) {
        Ok((layout, mut recovered)) => {
            outcome.problems = check_lane(&mut image, &layout, &mut recovered).problems;
            let mut found = BTreeMap::new();
            look(&mut image, &mut recovered, trust, &histories, &mut found, &mut outcome);
            if trust != Trust::Forged {
                look_again(layout, image, trust, &histories, &found);
            }
        }
        Err(error) => outcome.refused = Some(error),
    }
    outcome
}

fn recover(image: &mut Image) -> Result<(Layout, Recovered), RecoveryError> {
    image.bytes_read = 0;
    let layout = read_layout(image)?;
    let recovered = recover_lane(image, layout, 0, 0, Bugs::none())?;
    Ok((layout, recovered))
}

/// Reads every block as a client would, and compares.
fn look(
    image: &mut Image,
    recovered: &mut Recovered,
    trust: Trust,
    histories: &BTreeMap<(u32, u32), History>,
    found: &mut BTreeMap<(u32, u32), u32>,
    outcome: &mut Outcome,
) {
    let never = History::default();
    for (number, blocks) in volumes() {
        let position = recovered.volumes.iter().position(|volume| volume.number == number);
        let Some(position) = position else {
            assert!(trust != Trust::Answered, "volume {number} is gone");
            continue;
        };
        for block in 0..blocks {
            let Some(bytes) = read_block(image, recovered, position, block) else {
                outcome.errors += 1;
                continue;
            };
            let Some(tag) = tag_of(&bytes, number, block) else {
                assert!(
                    trust == Trust::Forged,
                    "volume {number}: block {block} holds what nobody wrote there"
                );
                continue;
            };
            outcome.data += u32::from(tag > 0);
            let history = histories.get(&(number, block)).unwrap_or(&never);
            let good = match trust {
                Trust::Answered => history.may_hold(tag),
                Trust::OnceThere => history.ever_held(tag),
                Trust::Forged => true,
            };
            assert!(
                good,
                "volume {number}: block {block} is of operation {tag}, which is wrong: {history:?}"
            );
            found.insert((number, block), tag);
        }
    }
}

fn read_block(
    image: &mut Image,
    recovered: &mut Recovered,
    volume: usize,
    block: u32,
) -> Option<[u8; BLOCK_BYTES_USIZE]> {
    let frame = leaf_at_hand(image, recovered, volume, block / LEAF_BLOCKS).ok()?;
    let mapping = recovered.map.get(frame, block % LEAF_BLOCKS);
    let mut bytes = [0; BLOCK_BYTES_USIZE];
    match mapping.place {
        Place::NONE => Some(bytes),
        Place::LOST => None,
        place => {
            let good = image.read_at(place.offset_bytes(), &mut bytes) && crc32c(&bytes) == mapping.crc;
            good.then_some(bytes)
        }
    }
}

/// The first checkpoint of the next mount changes nothing of what is found.
fn look_again(
    layout: Layout,
    image: Image,
    trust: Trust,
    histories: &BTreeMap<(u32, u32), History>,
    found: &BTreeMap<(u32, u32), u32>,
) {
    let Some(mut image) = Builder::next_life(layout, image) else { return };
    let (_, mut recovered) = recover(&mut image).expect("what was opened can be opened again");
    let mut again = BTreeMap::new();
    let mut outcome = Outcome { refused: None, problems: 0, errors: 0, data: 0, exact: true };
    look(&mut image, &mut recovered, trust, histories, &mut again, &mut outcome);
    for (block, tag) in again {
        assert_eq!(found.get(&block), Some(&tag), "{block:?} has changed by itself");
    }
}
