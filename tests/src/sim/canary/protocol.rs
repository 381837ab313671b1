//! As much of NBD's server side as the simulator's clients use.

use super::Place;
use crate::sim::bytes::{ByteQueue, Fields};
use crate::to_u32;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const UNSUPPORTED: u32 = 1 << 31 | 1;
const UNKNOWN: u32 = 1 << 31 | 6;
pub(super) const CONTEXT_ID: u32 = 7;
pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const ZEROES: u16 = 6;
pub(super) const STATUS: u16 = 7;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Flags,
    Options,
    Transmission,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

/// A request as it came.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) payload: Vec<u8>,
    /// Decided by the protocol; zero for none.
    pub(super) error: u32,
}

/// One connection's protocol state.
#[derive(Debug)]
pub(super) struct Protocol {
    phase: Phase,
    headers: Headers,
    no_zeroes: bool,
    pub(super) volume: usize,
    pub(super) input: ByteQueue,
    pub(super) output: ByteQueue,
}

impl Protocol {
    pub(super) fn new() -> Protocol {
        let mut output = ByteQueue::default();
        output.push(b"NBDMAGICIHAVEOPT\x00\x03");
        Protocol {
            phase: Phase::Flags,
            headers: Headers::Simple,
            no_zeroes: false,
            volume: 0,
            input: ByteQueue::default(),
            output,
        }
    }

    /// The next request, once it is complete. Options are answered on the way.
    pub(super) fn next(&mut self, places: &[Place]) -> Option<Command> {
        while self.phase != Phase::Transmission {
            let used = match self.phase {
                Phase::Flags => self.take_flags()?,
                _ => self.take_option(places)?,
            };
            self.input.skip(used);
        }
        let (used, mut command) = self.parse_command()?;
        self.input.skip(used);
        let size = places[self.volume].2;
        let outside = command.offset.checked_add(command.length).is_none_or(|end| end > size);
        command.error = match command.kind {
            READ | TRIM | CACHE | STATUS if outside => EINVAL,
            WRITE | ZEROES if outside => ENOSPC,
            READ..=STATUS => 0,
            _ => EINVAL,
        };
        Some(command)
    }

    fn take_flags(&mut self) -> Option<usize> {
        let flags = Fields(self.input.peek()).u32()?;
        self.no_zeroes = flags & 2 != 0;
        self.phase = Phase::Options;
        Some(4)
    }

    fn take_option(&mut self, places: &[Place]) -> Option<usize> {
        let mut fields = Fields(self.input.peek());
        let (magic, option) = (fields.u64()?, fields.u32()?);
        let length = fields.length()?;
        let data = fields.bytes(length)?.to_vec();
        assert_eq!(magic, OPTION_MAGIC, "the client lost its way");
        match option {
            1 => self.choose_old(&data, places),
            3 => {
                for (name, _, _) in places {
                    let mut fact = to_u32(name.len()).to_be_bytes().to_vec();
                    fact.extend_from_slice(name.as_bytes());
                    self.reply_option(option, SERVER, &fact);
                }
                self.reply_option(option, ACK, &[]);
            }
            6 | 7 => self.choose(option, &data, places),
            8 => self.switch(option, Headers::Structured),
            11 => self.switch(option, Headers::Extended),
            10 => {
                let mut fact = CONTEXT_ID.to_be_bytes().to_vec();
                fact.extend_from_slice(b"base:allocation");
                self.reply_option(option, META_CONTEXT, &fact);
                self.reply_option(option, ACK, &[]);
            }
            _ => self.reply_option(option, UNSUPPORTED, b"no"),
        }
        Some(16 + length)
    }

    fn switch(&mut self, option: u32, headers: Headers) {
        self.headers = headers;
        self.reply_option(option, ACK, &[]);
    }

    fn choose_old(&mut self, name: &[u8], places: &[Place]) {
        self.volume = places.iter().position(|place| place.0.as_bytes() == name).expect("a known volume");
        let mut reply = places[self.volume].2.to_be_bytes().to_vec();
        reply.extend_from_slice(&self.transmission_flags().to_be_bytes());
        reply.resize(if self.no_zeroes { 10 } else { 134 }, 0);
        self.output.push(&reply);
        self.phase = Phase::Transmission;
    }

    fn choose(&mut self, option: u32, data: &[u8], places: &[Place]) {
        let mut fields = Fields(data);
        let name = fields.length().and_then(|length| fields.bytes(length)).expect("a name");
        let Some(volume) = places.iter().position(|place| place.0.as_bytes() == name) else {
            return self.reply_option(option, UNKNOWN, b"no such volume");
        };
        let mut fact = vec![0, 0];
        fact.extend_from_slice(&places[volume].2.to_be_bytes());
        fact.extend_from_slice(&self.transmission_flags().to_be_bytes());
        self.reply_option(option, INFO, &fact);
        self.reply_option(option, ACK, &[]);
        if option == 7 {
            self.volume = volume;
            self.phase = Phase::Transmission;
        }
    }

    fn transmission_flags(&self) -> u16 {
        let base = 0b1_0001_0110_1101 & !(1 << 12);
        if self.headers == Headers::Simple { base } else { base | 1 << 7 }
    }

    fn reply_option(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.output.push(&0x0003_e889_0455_65a9_u64.to_be_bytes());
        for field in [option, kind, to_u32(data.len())] {
            self.output.push(&field.to_be_bytes());
        }
        self.output.push(data);
    }

    fn parse_command(&self) -> Option<(usize, Command)> {
        let mut fields = Fields(self.input.peek());
        let available = self.input.len();
        fields.u32()?;
        let (flags, kind, cookie, offset) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u64()?);
        let length = if self.headers == Headers::Extended { fields.u64()? } else { u64::from(fields.u32()?) };
        let payload = if kind == WRITE { fields.bytes(crate::to_usize(length))? } else { &[] };
        let used = available - fields.0.len();
        Some((used, Command { kind, flags, cookie, offset, length, payload: payload.to_vec(), error: 0 }))
    }

    /// Answers a request; `data` is what a read or a status returns.
    pub(super) fn reply(&mut self, command: &Command, error: u32, data: &[u8]) {
        if self.headers == Headers::Simple {
            self.output.push(&0x6744_6698_u32.to_be_bytes());
            self.output.push(&error.to_be_bytes());
            self.output.push(&command.cookie.to_be_bytes());
            return self.output.push(if error == 0 { data } else { &[] });
        }
        match (error, command.kind) {
            (0, READ) if !data.is_empty() => self.reply_read(command, data),
            (0, STATUS) if !data.is_empty() => {
                let kind = if self.headers == Headers::Extended { 6 } else { 5 };
                self.chunk(command, kind, true, &[data]);
            }
            (0, _) => self.chunk(command, 0, true, &[]),
            _ => self.chunk(command, 0x8001, true, &[&error.to_be_bytes(), &[0, 2], b"no"]),
        }
    }

    /// A hole where the head is zero, data for the rest, the end in a chunk of its own: all forms there are.
    fn reply_read(&mut self, command: &Command, data: &[u8]) {
        let zeroes = data.iter().take_while(|byte| **byte == 0).count();
        let one_piece = command.flags & 4 != 0;
        let hole = if one_piece || zeroes < 512 { 0 } else { zeroes };
        if hole > 0 {
            let length = to_u32(hole).to_be_bytes();
            self.chunk(command, 2, false, &[&command.offset.to_be_bytes(), &length]);
        }
        if hole < data.len() {
            let offset = command.offset + hole as u64;
            self.chunk(command, 1, false, &[&offset.to_be_bytes(), &data[hole..]]);
        }
        self.chunk(command, 0, true, &[]);
    }

    /// The payload of a status reply: one extent for all that was asked.
    pub(super) fn status(&self, length: u64, flags: u32) -> Vec<u8> {
        let mut data = CONTEXT_ID.to_be_bytes().to_vec();
        if self.headers == Headers::Extended {
            data.extend_from_slice(&1_u32.to_be_bytes());
            data.extend_from_slice(&length.to_be_bytes());
            data.extend_from_slice(&u64::from(flags).to_be_bytes());
        } else {
            data.extend_from_slice(&to_u32(crate::to_usize(length)).to_be_bytes());
            data.extend_from_slice(&flags.to_be_bytes());
        }
        data
    }

    fn chunk(&mut self, command: &Command, kind: u16, done: bool, parts: &[&[u8]]) {
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let extended = self.headers == Headers::Extended;
        let magic: u32 = if extended { 0x6e8a_278c } else { 0x668e_33ef };
        self.output.push(&magic.to_be_bytes());
        self.output.push(&u16::from(done).to_be_bytes());
        self.output.push(&kind.to_be_bytes());
        self.output.push(&command.cookie.to_be_bytes());
        if extended {
            self.output.push(&command.offset.to_be_bytes());
            self.output.push(&(length as u64).to_be_bytes());
        } else {
            self.output.push(&to_u32(length).to_be_bytes());
        }
        parts.iter().for_each(|part| self.output.push(part));
    }
}
