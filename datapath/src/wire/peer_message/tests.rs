use super::*;
use crate::wire::random::Xorshift;

const STAMP: Stamp = Stamp { epoch: 3, sequence: 0x0102_0304_0506 };
const CHANGE: ChangeHeader = ChangeHeader {
    kind: ChangeKind::Data,
    block: 100,
    count: 2,
    stamp: STAMP,
    previous: Stamp { epoch: 2, sequence: STAMP.sequence - 1 },
    new_blocks: 1,
};

const COPY: CopyHeader = CopyHeader { data: true, block: 1022, count: 2 };

const DIGEST: CheckMessage = CheckMessage::Digest {
    epoch: 4,
    check: 0x5_0000_0006,
    block: 1022,
    count: 2,
    damaged: 0b10,
    next_leaf: Some(7),
};

fn frame(message: PeerMessage) -> PeerFrame {
    PeerFrame { volume: VolumeNumber(9), message }
}

fn all_messages() -> Vec<(PeerFrame, Vec<u32>)> {
    let released = ChangeHeader { kind: ChangeKind::Trim, count: 500, new_blocks: 0, ..CHANGE };
    let question = Some(RoomQuestion { keeps: 1, needs: 2, wants: 3 });
    let answer = |may_grow| Some(RoomAnswer { granted: 2, may_grow });
    let plain = [
        PeerMessage::Promise { epoch: 4 },
        PeerMessage::Promised { epoch: 4, last: STAMP, granted_ns: 7 },
        PeerMessage::Refused { promised: 5 },
        PeerMessage::Change { epoch: 4, change: released, committed: 8 },
        PeerMessage::Ack { epoch: 4, through: 8 },
        PeerMessage::Gap { epoch: 4, last: STAMP },
        PeerMessage::Fetch { epoch: 4, sequence: 8 },
        PeerMessage::FetchGone { epoch: 4, sequence: 8 },
        PeerMessage::Lease { epoch: 4, asked_ns: 99, committed: 98, room: None },
        PeerMessage::Lease { epoch: 4, asked_ns: 99, committed: 98, room: question },
        PeerMessage::Leased { epoch: 4, asked_ns: 99, room: None },
        PeerMessage::Leased { epoch: 4, asked_ns: 99, room: answer(false) },
        PeerMessage::Leased { epoch: 4, asked_ns: 99, room: answer(true) },
        PeerMessage::NoRoom { epoch: 4 },
        PeerMessage::Compare { epoch: 4, fill: 6, base: STAMP },
        PeerMessage::Surplus { epoch: 4, fill: 6, block: 1000, count: 24 },
        PeerMessage::Compared { epoch: 4, fill: 6, known: true },
        PeerMessage::ListChanged { epoch: 4, fill: 6, base: STAMP },
        PeerMessage::Changed { epoch: 4, fill: 6, if_holes: true, block: 512, count: 512 },
        PeerMessage::Changed { epoch: 4, fill: 6, if_holes: false, block: 1023, count: 1 },
        PeerMessage::Listed { epoch: 4, fill: 6, known: false },
        PeerMessage::Fill { epoch: 4, after: STAMP, fill: 6 },
        PeerMessage::Filling { epoch: 4, fill: 6 },
        PeerMessage::Copy { epoch: 4, fill: 6, copy: CopyHeader { data: false, block: 512, count: 512 } },
        PeerMessage::Copied { epoch: 4, fill: 6, copies: 77 },
        PeerMessage::Filled { epoch: 4, fill: 6 },
        PeerMessage::Complete { epoch: 4, fill: 6 },
        PeerMessage::Read { epoch: 4, read: 6, block: 1022, count: 256 },
        PeerMessage::Holes { epoch: 4, read: 6, block: 1022, count: 256 },
        PeerMessage::Unreadable { epoch: 4, read: 6 },
        CheckMessage::Ask { epoch: 4, check: 6, block: 448, count: 64 }.into(),
        CheckMessage::Unknown { epoch: 4, check: 6, next_leaf: None }.into(),
        CheckMessage::Mended { epoch: 4, check: 6, block: 500, count: 1 }.into(),
    ];
    let hello = Hello { node: NodeId(3), boot: 0x1122, features: 1 };
    let mut all: Vec<_> = plain.map(|message| (frame(message), Vec::new())).into();
    all.push((PeerFrame { volume: VolumeNumber(0), message: PeerMessage::Hello(hello) }, Vec::new()));
    all.push((frame(PeerMessage::Change { epoch: 4, change: CHANGE, committed: 8 }), vec![0xaabb, 0xccdd]));
    all.push((frame(PeerMessage::Copy { epoch: 4, fill: 6, copy: COPY }), vec![1, 2]));
    all.push((frame(PeerMessage::Fetched { epoch: 4, change: CHANGE }), vec![1, 2]));
    all.push((frame(PeerMessage::Blocks { epoch: 4, read: 6, block: 1022, count: 2 }), vec![1, 2]));
    let mend = CheckMessage::Mend { epoch: 4, check: 6, block: 1022, count: 2 };
    all.push((frame(mend.into()), vec![1, 2]));
    all.push((frame(DIGEST.into()), vec![1, 2]));
    all
}

fn encoded(frame: PeerFrame, checksums: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(checksums, &mut bytes);
    bytes
}

#[test]
fn every_message_is_read_back() {
    for (frame, checksums) in all_messages() {
        let bytes = encoded(frame, &checksums);
        let header = bytes.first_chunk().unwrap();
        assert_eq!(PeerFrame::body_length(header).unwrap() as usize, bytes.len() - PEER_HEADER_BYTES);
        assert_eq!(PeerFrame::decode(&bytes), Ok(frame));
        if frame.payload_blocks() > 0 {
            assert_eq!(PeerFrame::checksums(&bytes).collect::<Vec<_>>(), checksums);
        }
    }
}

#[test]
fn a_change_keeps_its_bytes() {
    let change = frame(PeerMessage::Change { epoch: 4, change: CHANGE, committed: 8 });
    let bytes = encoded(change, &[0xaabb, 0xccdd]);
    let golden = [
        &b"BRTP\x02\x05\x01\0"[..],
        &bytes[8..12],
        &[0, 0, 0, 8, 0, 0, 0x20, 0, 0, 0, 0, 9, 0, 0, 0, 4, 0, 0, 0, 100, 0, 0, 0, 2, 0, 0, 0, 3],
        &[0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 8],
        &[0, 0, 0xaa, 0xbb, 0, 0, 0xcc, 0xdd],
    ];
    assert_eq!(bytes, golden.concat());
    assert_eq!(bytes[8..12], 0xa9bf_1e3c_u32.to_be_bytes());
}

/// A message of epoch 4 about volume 9 has this kind and kind of change, these lengths, and these words from the first
/// block on.
fn golden(message: PeerMessage, checksums: &[u32], kind: u8, change: u8, lengths: [u32; 2], rest: [u32; 9]) {
    let bytes = encoded(frame(message), checksums);
    let mut expected = b"BRTP\x02".to_vec();
    expected.extend([kind, change, 0]);
    expected.extend(&bytes[8..12]);
    [&lengths[..], &[9, 4], &rest, checksums]
        .concat()
        .iter()
        .for_each(|word| expected.extend(word.to_be_bytes()));
    assert_eq!(bytes, expected, "{message:?}");
}

#[test]
fn messages_of_a_read_keep_their_bytes() {
    let read = 0x5_0000_0006;
    let words = |block, count| [block, count, 0, 0, 0, 0, 0, 5, 6];
    golden(PeerMessage::Read { epoch: 4, read, block: 1022, count: 9 }, &[], 19, 0, [0, 0], words(1022, 9));
    golden(
        PeerMessage::Blocks { epoch: 4, read, block: 1022, count: 2 },
        &[0xaabb, 0xccdd],
        20,
        0,
        [8, 8192],
        words(1022, 2),
    );
    golden(PeerMessage::Unreadable { epoch: 4, read }, &[], 21, 0, [0, 0], words(0, 0));
    golden(PeerMessage::Holes { epoch: 4, read, block: 1022, count: 9 }, &[], 23, 0, [0, 0], words(1022, 9));
}

#[test]
fn messages_of_a_search_keep_their_bytes() {
    let fill = 0x5_0000_0006;
    let base = Stamp { epoch: 3, sequence: 0x7_0000_0008 };
    let list = PeerMessage::ListChanged { epoch: 4, fill, base };
    golden(list, &[], 33, 0, [0, 0], [0, 0, 3, 7, 8, 0, 0, 5, 6]);
    for (if_holes, code) in [(false, 1), (true, 3)] {
        let changed = PeerMessage::Changed { epoch: 4, fill, if_holes, block: 1000, count: 24 };
        golden(changed, &[], 34, code, [0, 0], [1000, 24, 0, 0, 0, 0, 0, 5, 6]);
    }
    golden(
        PeerMessage::Listed { epoch: 4, fill, known: true },
        &[],
        35,
        0,
        [0, 0],
        [0, 1, 0, 0, 0, 0, 0, 5, 6],
    );
}

#[test]
fn messages_about_room_keep_their_bytes() {
    let room = Some(RoomQuestion { keeps: 7, needs: 9, wants: 11 });
    let lease = PeerMessage::Lease { epoch: 4, asked_ns: 0x5_0000_0006, committed: 8, room };
    golden(lease, &[], 11, 1, [0, 0], [7, 9, 0, 0, 8, 0, 11, 5, 6]);
    for (may_grow, code) in [(false, 1), (true, 3)] {
        let room = Some(RoomAnswer { granted: 9, may_grow });
        let leased = PeerMessage::Leased { epoch: 4, asked_ns: 6, room };
        golden(leased, &[], 12, code, [0, 0], [0, 9, 0, 0, 0, 0, 0, 0, 6]);
    }
    golden(PeerMessage::NoRoom { epoch: 4 }, &[], 22, 0, [0, 0], [0; 9]);
}

#[test]
fn a_change_takes_no_more_than_it_writes() {
    let taking = |kind, new_blocks| {
        let change = ChangeHeader { kind, new_blocks, ..CHANGE };
        let checksums = if kind == ChangeKind::Data { &[1, 2][..] } else { &[] };
        encoded(frame(PeerMessage::Change { epoch: 4, change, committed: 8 }), checksums)
    };
    assert!(PeerFrame::decode(&taking(ChangeKind::Data, 2)).is_ok());
    assert_eq!(PeerFrame::decode(&taking(ChangeKind::Data, 3)), Err(WireError::Range));
    assert_eq!(PeerFrame::decode(&taking(ChangeKind::Trim, 1)), Err(WireError::Range));
}

#[test]
fn messages_of_a_check_keep_their_bytes() {
    let check = 0x5_0000_0006;
    let words = |block, count| [block, count, 0, 0, 0, 0, 0, 5, 6];
    let ask = CheckMessage::Ask { epoch: 4, check, block: 448, count: 64 };
    golden(ask.into(), &[], 40, 0, [0, 0], words(448, 64));
    golden(DIGEST.into(), &[0xaabb, 0xccdd], 41, 0, [8, 0], [1022, 2, 7, 0, 2, 0, 0, 5, 6]);
    let unknown = CheckMessage::Unknown { epoch: 4, check, next_leaf: None };
    golden(unknown.into(), &[], 42, 0, [0, 0], [0, 0, u32::MAX, 0, 0, 0, 0, 5, 6]);
    let mend = CheckMessage::Mend { epoch: 4, check, block: 1022, count: 2 };
    golden(mend.into(), &[0xaabb, 0xccdd], 43, 0, [8, 8192], words(1022, 2));
    let mended = CheckMessage::Mended { epoch: 4, check, block: 1022, count: 2 };
    golden(mended.into(), &[], 44, 0, [0, 0], words(1022, 2));
}

#[test]
fn fields_of_a_check_that_cannot_be_are_refused() {
    let ask = frame(CheckMessage::Ask { epoch: 4, check: 6, block: 448, count: 64 }.into());
    // No blocks, too many, two leaves, and damage of what was not asked for.
    for edits in [&[(32, 0)][..], &[(32, 65)], &[(28, 449)], &[(28, u32::MAX)]] {
        assert_eq!(PeerFrame::decode(&forged(ask, &[], edits)), Err(WireError::Range), "{edits:?}");
    }
    let digest = frame(DIGEST.into());
    for edits in [&[(44, 0b100)][..], &[(40, 1)], &[(32, 1)], &[(32, 3)], &[(16, BLOCK_BYTES)]] {
        assert_eq!(PeerFrame::decode(&forged(digest, &[1, 2], edits)), Err(WireError::Range), "{edits:?}");
    }
    let mend = frame(CheckMessage::Mend { epoch: 4, check: 6, block: 100, count: 2 }.into());
    for edits in [&[(32, 3)][..], &[(16, 0)], &[(28, 511)]] {
        assert_eq!(PeerFrame::decode(&forged(mend, &[1, 2], edits)), Err(WireError::Range), "{edits:?}");
    }
}

#[test]
fn messages_of_a_fill_keep_their_bytes() {
    let fill = 0x5_0000_0006;
    golden(
        PeerMessage::Fill { epoch: 4, after: STAMP, fill },
        &[],
        13,
        0,
        [0, 0],
        [0, 0, 3, 0x0102, 0x0304_0506, 0, 0, 5, 6],
    );
    let plain = |count| [0, count, 0, 0, 0, 0, 0, 5, 6];
    golden(PeerMessage::Filling { epoch: 4, fill }, &[], 14, 0, [0, 0], plain(0));
    golden(
        PeerMessage::Copy { epoch: 4, fill, copy: COPY },
        &[0xaabb, 0xccdd],
        15,
        1,
        [8, 8192],
        [1022, 2, 0, 0, 0, 0, 0, 5, 6],
    );
    golden(PeerMessage::Copied { epoch: 4, fill, copies: 77 }, &[], 16, 0, [0, 0], plain(77));
    golden(PeerMessage::Filled { epoch: 4, fill }, &[], 17, 0, [0, 0], plain(0));
    golden(PeerMessage::Complete { epoch: 4, fill }, &[], 18, 0, [0, 0], plain(0));
}

#[test]
fn every_flipped_bit_is_noticed() {
    for (frame, checksums) in all_messages() {
        let bytes = encoded(frame, &checksums);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(PeerFrame::decode(&damaged).is_err(), "bit {bit} of {frame:?}");
        }
        for end in 0..bytes.len() {
            assert!(PeerFrame::decode(&bytes[..end]).is_err());
        }
    }
}

/// Writes fields and makes the checksum right again, as an attacker would.
fn forged(frame: PeerFrame, checksums: &[u32], edits: &[(usize, u32)]) -> Vec<u8> {
    let mut bytes = encoded(frame, checksums);
    for (at, value) in edits {
        bytes[*at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    bytes[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    let crc = crc32c(&bytes);
    bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_be_bytes());
    bytes
}

#[test]
fn fields_that_cannot_be_are_refused() {
    let change = frame(PeerMessage::Change { epoch: 4, change: CHANGE, committed: 8 });
    let released = ChangeHeader { kind: ChangeKind::Zero, new_blocks: 0, ..CHANGE };
    let released = frame(PeerMessage::Change { epoch: 4, change: released, committed: 8 });
    let data: [&[(usize, u32)]; 7] = [
        &[(32, 0)],               // no blocks
        &[(32, 3)],               // more blocks than came
        &[(28, u32::MAX)],        // beyond the last block
        &[(48, 4)],               // after a later epoch
        &[(40, 0), (44, 0)],      // sequence 0
        &[(16, 3 * BLOCK_BYTES)], // a payload longer than the blocks
        &[(16, BLOCK_BYTES / 2)], // no whole blocks
    ];
    for edits in data {
        assert_eq!(PeerFrame::decode(&forged(change, &[1, 2], edits)), Err(WireError::Range), "{edits:?}");
    }
    for edits in [&[(32, RELEASED_BLOCKS_MAX + 1)][..], &[(16, BLOCK_BYTES)]] {
        assert_eq!(PeerFrame::decode(&forged(released, &[], edits)), Err(WireError::Range), "{edits:?}");
    }
    let plain = frame(PeerMessage::Leased { epoch: 4, asked_ns: 6, room: None });
    // Room that is not said to be any, and another kind of it.
    for edits in [&[(32, 1)][..], &[(4, 0x020c_0200)]] {
        assert_eq!(PeerFrame::decode(&forged(plain, &[], edits)), Err(WireError::Range), "{edits:?}");
    }
    let copy = frame(PeerMessage::Copy { epoch: 4, fill: 6, copy: COPY });
    let zeroes = CopyHeader { data: false, ..COPY };
    let zeroes = frame(PeerMessage::Copy { epoch: 4, fill: 6, copy: zeroes });
    let fill = frame(PeerMessage::Fill { epoch: 4, after: STAMP, fill: 6 });
    // No blocks, more than came, two leaves, and beyond the last block.
    for edits in [&[(32, 0)][..], &[(32, 3)], &[(28, 1023)], &[(28, u32::MAX)]] {
        assert_eq!(PeerFrame::decode(&forged(copy, &[1, 2], edits)), Err(WireError::Range), "{edits:?}");
    }
    // More than a leaf, and a trim.
    for edits in [&[(28, 512), (32, 513)][..], &[(32, u32::MAX)], &[(4, 0x020f_0400)]] {
        assert_eq!(PeerFrame::decode(&forged(zeroes, &[], edits)), Err(WireError::Range), "{edits:?}");
    }
    assert_eq!(PeerFrame::decode(&forged(fill, &[], &[(36, 5)])), Err(WireError::Range), "a later epoch");
    let read = frame(PeerMessage::Read { epoch: 4, read: 6, block: 100, count: 2 });
    let blocks = frame(PeerMessage::Blocks { epoch: 4, read: 6, block: 100, count: 2 });
    // No blocks, more than a piece, and beyond the last block.
    for edits in [&[(32, 0)][..], &[(32, PIECE_BLOCKS_MAX + 1)], &[(28, u32::MAX)]] {
        assert_eq!(PeerFrame::decode(&forged(read, &[], edits)), Err(WireError::Range), "{edits:?}");
    }
    // A question with a payload, and fewer or more blocks than came.
    assert_eq!(PeerFrame::decode(&forged(read, &[], &[(16, BLOCK_BYTES)])), Err(WireError::Range));
    for edits in [&[(32, 1)][..], &[(32, 3)], &[(16, BLOCK_BYTES)]] {
        assert_eq!(PeerFrame::decode(&forged(blocks, &[1, 2], edits)), Err(WireError::Range), "{edits:?}");
    }
    let mut header = *encoded(change, &[1, 2]).first_chunk::<PEER_HEADER_BYTES>().unwrap();
    for (at, value, error) in
        [(0, 0, WireError::Magic), (4, 1 << 24, WireError::Kind), (12, u32::MAX, WireError::Range)]
    {
        let right: [u8; 4] = header[at..at + 4].try_into().unwrap();
        header[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
        assert_eq!(PeerFrame::body_length(&header), Err(error));
        header[at..at + 4].copy_from_slice(&right);
    }
    assert_eq!(PeerFrame::decode(&forged(change, &[1, 2], &[(4, 0x0180_0100)])), Err(WireError::Kind));
}

#[test]
fn noise_makes_nothing_panic() {
    let mut random = Xorshift::new(7);
    let messages = all_messages();
    for _ in 0..20_000 {
        let (frame, checksums) = &messages[random.below(messages.len())];
        let at = 12 + 4 * random.below(13);
        let value = u32::try_from(random.number() & 0xffff_ffff).unwrap();
        let _ = PeerFrame::decode(&forged(*frame, checksums, &[(at, value)]));
    }
}
