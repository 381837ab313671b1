//! Room: a change is numbered only if every replica that must have it has said beforehand that it has the space.
//!
//! What every member has granted is counted here in blocks that changes may newly take: overwriting, trims and zeroes cost
//! nothing. A question says how much of it the head keeps, so that both sides know what was given back; changes and
//! questions go the same way in order, so what a member has reserved is never less than what is counted here and what is on
//! its way to it, or is yet to be sent. Grants outlast connections, and end with the epoch.
//!
//! While changes are written the head has a little more granted than it needs; a volume at rest gives everything back.

use super::peers::{Peer, Phase};
use super::{Head, HeadEffect, Lead, Role, Stage};
use crate::limits::ROOM_BLOCKS_MAX;
use crate::record::NodeId;
use crate::replica::bugs::PlantedBug;
use crate::units::Moment;
use crate::wire::peer_message::{RoomAnswer, RoomQuestion};

/// A member that may have more room soon is asked again after this time.
const ASK_AGAIN_NS: u64 = 20_000_000;
/// A change waits so long for room that may come, before it is refused. Volumes at rest give theirs back within less.
const ROOM_PATIENCE_NS: u64 = 3_000_000_000;

/// May a change be numbered?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Every replica that must have it has the space.
    Granted,
    /// That is not known yet: ask again in the next turn.
    Awaited,
    /// One has not.
    Lacking,
}

/// What a member has granted.
#[derive(Clone, Debug, Default)]
pub(super) struct Credit {
    /// Blocks that changes to come may newly take there.
    left: u32,
    /// Half of what it last granted: with less the head asks ahead of need.
    low: u32,
    /// The member has said that changes are numbered within its room.
    pub(super) is_known: bool,
    /// The question that was not answered yet: when it was asked, what was needed, and what arrives behind it.
    open: Option<(Moment, u32, u32)>,
    /// Since when something has waited for its answer.
    asking_since: Option<Moment>,
    /// It could not grant what was needed: when that was asked and answered, and whether there may be more soon.
    short: Option<(Moment, Moment, bool)>,
}

impl Credit {
    /// The connection is gone, and with it questions and answers. What was granted is not.
    pub(super) fn note_lost(&mut self) {
        (self.open, self.asking_since) = (None, None);
    }

    /// Since when it owes an answer.
    pub(super) fn asking_since(&self) -> Option<Moment> {
        self.asking_since
    }
}

impl Head {
    /// May a change be numbered that newly takes so many blocks at most, and has waited since then? If that is not known,
    /// those are asked who must know.
    pub fn find_room(&mut self, now: Moment, since: Moment, blocks: u32) -> Room {
        let Role::Lead(lead) = &mut self.role else { return Room::Granted };
        if lead.stage != Stage::Serving || blocks == 0 || self.bugs.has(PlantedBug::RoomIgnored) {
            return Room::Granted;
        }
        let mut to_ask = Vec::new();
        let mut room = Room::Granted;
        for node in lead.counted(&self.record, self.bugs) {
            let Some(peer) = lead.peers.get_mut(node) else {
                room = Room::Awaited;
                continue;
            };
            if peer.credit.left >= blocks {
                continue;
            }
            peer.credit.asking_since.get_or_insert(now);
            match peer.credit.short.filter(|(asked, ..)| *asked >= since) {
                Some((.., may_grow)) if !may_grow || now.since_ns(since) >= ROOM_PATIENCE_NS => {
                    room = Room::Lacking;
                    break;
                }
                Some((_, answered, _)) if now < answered.after_ns(ASK_AGAIN_NS) => {
                    let again = answered.after_ns(ASK_AGAIN_NS);
                    lead.room_again_at = Some(lead.room_again_at.map_or(again, |at| at.min(again)));
                }
                _ => to_ask.push(node),
            }
            room = Room::Awaited;
        }
        lead.room_needed = if room == Room::Awaited { blocks } else { 0 };
        if room == Room::Awaited {
            to_ask.into_iter().for_each(|node| self.ask_for_room(now, node));
        }
        room
    }

    /// Nothing waits for room any more.
    pub fn needs_no_room(&mut self) {
        if let Role::Lead(lead) = &mut self.role {
            lead.room_needed = 0;
        }
    }

    /// A change was numbered that newly takes so many blocks at most.
    pub(super) fn spend_room(&mut self, now: Moment, blocks: u32) {
        if blocks == 0 {
            return;
        }
        let Role::Lead(lead) = &mut self.role else { return };
        lead.is_filling_space = true;
        let mut low = Vec::new();
        for node in lead.counted(&self.record, self.bugs) {
            let Some(peer) = lead.peers.get_mut(node) else { continue };
            let credit = &mut peer.credit;
            let left = credit.left.checked_sub(blocks);
            assert!(
                left.is_some() || self.bugs.has(PlantedBug::RoomIgnored),
                "numbered within what was granted"
            );
            credit.left = left.unwrap_or(0);
            if let Some((.., used)) = &mut credit.open {
                *used += blocks;
            }
            if credit.left < credit.low {
                low.push(node);
            }
        }
        low.into_iter().for_each(|node| self.ask_for_room(now, node));
    }

    fn ask_for_room(&mut self, now: Moment, node: NodeId) {
        let Role::Lead(lead) = &mut self.role else { return };
        let may = |peer: &Peer| peer.phase == Phase::Following && peer.credit.open.is_none();
        if lead.peers.get(node).is_some_and(may) {
            self.ask_for_lease(now, node);
        }
    }

    /// Asks a member for its leave to read, and for room if changes are numbered within that.
    pub(super) fn ask_for_lease(&mut self, now: Moment, member: NodeId) {
        let bugs = self.bugs;
        let Role::Lead(lead) = &mut self.role else { return };
        let is_counted = lead.counted(&self.record, bugs).contains(&member);
        let (needs, at_rest) = (lead.room_needed, lead.room_needed == 0 && !lead.is_filling_space);
        let Lead { peers, window, epoch, .. } = &mut **lead;
        let Some(peer) = peers.get_mut(member) else { return };
        // What the member is yet to be sent will arrive behind the question: it must keep the room for that.
        let to_come = window.iter().rev().take_while(|windowed| windowed.change.stamp.sequence > peer.sent);
        let to_come: u32 = to_come.map(|windowed| windowed.change.new_blocks).sum();
        let credit = &mut peer.credit;
        if credit.open.is_some_and(|(asked, ..)| asked == now) {
            // An answer names the moment of its question: one at a time.
            return;
        }
        let room = is_counted.then(|| {
            if at_rest {
                credit.left = 0;
            }
            let needs = if needs == 0 { 0 } else { (needs + to_come).min(ROOM_BLOCKS_MAX) };
            credit.open = Some((now, needs, to_come));
            let wants = if at_rest { 0 } else { ROOM_BLOCKS_MAX };
            RoomQuestion { keeps: credit.left + to_come, needs, wants }
        });
        self.effects.push_back(HeadEffect::Lease { member, epoch: *epoch, asked: now, room });
    }

    /// A member has answered the question that was asked at `asked`.
    pub fn granted(
        &mut self,
        now: Moment,
        member: NodeId,
        epoch: u32,
        asked: Moment,
        room: Option<RoomAnswer>,
    ) {
        let Role::Lead(lead) = &mut self.role else { return };
        let Some(peer) = lead.peers.get_mut(member).filter(|_| lead.epoch == epoch) else { return };
        let credit = &mut peer.credit;
        let Some((_, needed, used)) = credit.open.filter(|(moment, ..)| *moment == asked) else { return };
        (credit.open, credit.asking_since, credit.is_known) = (None, None, room.is_some());
        // One that is not counted yet may soon be.
        let RoomAnswer { granted, may_grow } = room.unwrap_or(RoomAnswer { granted: 0, may_grow: true });
        credit.left = granted.saturating_sub(used);
        credit.low = granted / 2;
        credit.short = (granted < needed).then_some((asked, now, may_grow));
        self.advance_fill(now);
    }
}

impl Lead {
    /// Who must have room for a change: whoever's acknowledgement counts, and a replica that is about to be admitted.
    fn counted(&self, record: &crate::record::Record, bugs: crate::replica::bugs::Bugs) -> Vec<NodeId> {
        let mut counted = self.needed(record, bugs);
        counted.extend(self.fills.awaited().filter(|node| !counted.contains(node)));
        counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{ChangeKind, Record, Stamp, VolumeNumber};

    const START: Moment = Moment(1 << 40);
    const NODES: [NodeId; 2] = [NodeId(0), NodeId(1)];

    /// The questions about room, and to whom; a proposal is carried out.
    fn questions(head: &mut Head, now: Moment) -> Vec<(NodeId, Moment, RoomQuestion)> {
        let mut found = Vec::new();
        while let Some(effect) = head.poll_effect() {
            match effect {
                HeadEffect::Lease { member, asked, room: Some(room), .. } => {
                    found.push((member, asked, room))
                }
                HeadEffect::Propose(record) => head.handle_record(now, &record, |_| true),
                _ => {}
            }
        }
        found
    }

    fn serving() -> Head {
        let mut head = Head::new(NODES[0], Record::new(VolumeNumber(1), "v", [1; 16], 1000, &NODES));
        head.take(START, 1);
        questions(&mut head, START);
        NODES.iter().for_each(|node| head.promised(START, *node, 1, Stamp::default(), 0));
        for (node, asked, question) in questions(&mut head, START) {
            assert_eq!(question, RoomQuestion::default(), "at rest it wants nothing");
            head.granted(START, node, 1, asked, answer(0, false));
        }
        assert!(head.is_serving());
        head
    }

    fn answer(granted: u32, may_grow: bool) -> Option<RoomAnswer> {
        Some(RoomAnswer { granted, may_grow })
    }

    #[test]
    fn a_change_is_numbered_when_all_have_room() {
        let mut head = serving();
        assert_eq!(head.find_room(START, START, 0), Room::Granted, "overwriting takes none");
        assert_eq!(head.find_room(START, START, 8), Room::Awaited);
        let asked = questions(&mut head, START);
        let wanted = RoomQuestion { keeps: 0, needs: 8, wants: ROOM_BLOCKS_MAX };
        assert_eq!(asked, [(NODES[0], START, wanted), (NODES[1], START, wanted)]);
        head.granted(START, NODES[0], 1, START, answer(20, false));
        assert_eq!(head.find_room(START, START, 8), Room::Awaited);
        head.granted(START, NODES[1], 1, START, answer(10, false));
        assert_eq!(head.find_room(START, START, 8), Room::Granted);
        head.submit(START, 1, ChangeKind::Data, 0, (8, 8)).expect("it serves");
        // Less than half is left at one of them, beside what it has not been sent yet.
        let keeps = RoomQuestion { keeps: 2 + 8, needs: 0, wants: ROOM_BLOCKS_MAX };
        assert_eq!(questions(&mut head, START), [(NODES[1], START, keeps)]);
        head.submit(START, 2, ChangeKind::Data, 0, (2, 2)).expect("it serves");
        head.granted(START, NODES[1], 1, START, answer(14, false));
        assert_eq!(head.find_room(START, START, 4), Room::Granted, "what was used since is known");
        assert_eq!(head.find_room(START, START, 5), Room::Awaited);
    }

    #[test]
    fn a_change_is_refused_when_one_has_no_room_and_gets_none_soon() {
        let mut head = serving();
        let since = START;
        let mut now = START;
        assert_eq!(head.find_room(now, since, 8), Room::Awaited);
        questions(&mut head, now);
        head.granted(now, NODES[0], 1, now, answer(8, false));
        head.granted(now, NODES[1], 1, now, answer(0, true));
        while head.find_room(now, since, 8) == Room::Awaited {
            now = head.poll_timeout().expect("it asks again").max(now);
            assert!(now < since.after_ns(2 * ROOM_PATIENCE_NS), "it does not wait for ever");
            head.handle_timeout(now);
            assert_eq!(
                head.find_room(now, since, 8) == Room::Lacking,
                now.since_ns(since) >= ROOM_PATIENCE_NS
            );
            for (node, asked, question) in questions(&mut head, now) {
                let granted = if node == NODES[0] { question.needs } else { 0 };
                head.granted(now, node, 1, asked, answer(granted, node == NODES[1]));
                head.leased(now, node, 1, asked);
            }
        }
        assert_eq!(head.find_room(now, since, 8), Room::Lacking);
        // The next one is asked for anew.
        assert_eq!(head.find_room(now, now.after_ns(1), 8), Room::Awaited);
        let asked = questions(&mut head, now);
        head.granted(now, NODES[1], 1, now, answer(0, false));
        assert_eq!(asked.len(), 1);
        assert_eq!(head.find_room(now, now, 8), Room::Lacking);
    }

    #[test]
    fn at_rest_it_gives_everything_back_and_grants_outlast_connections() {
        let mut head = serving();
        head.find_room(START, START, 8);
        questions(&mut head, START);
        NODES.iter().for_each(|node| head.granted(START, *node, 1, START, answer(20, false)));
        assert_eq!(head.find_room(START, START, 8), Room::Granted);
        head.member_down(START, NODES[1]);
        head.member_up(START, NODES[1]);
        assert_eq!(head.find_room(START, START, 20), Room::Granted);
        head.promised(START, NODES[1], 1, Stamp::default(), 0);
        let now = START.after_ns(crate::replica::LEASE_EVERY_NS);
        head.handle_timeout(now);
        let asked = questions(&mut head, now);
        assert_eq!(asked, NODES.map(|node| (node, now, RoomQuestion::default())));
        // What a member says about an earlier question is of no account.
        head.granted(now, NODES[1], 1, START, answer(20, false));
        assert_eq!(head.find_room(now, now, 1), Room::Awaited);
    }
}
