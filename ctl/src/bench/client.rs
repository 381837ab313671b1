//! An NBD client for one thread: queue requests, send what the socket takes, take the answers that are there.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use datapath::wire::WireError;
use datapath::wire::nbd_handshake::{
    GREETING_BYTES, Greeting, Info, OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, client_flag,
    encode_info_query, encode_option, handshake_flag, info_type, option, reply_type, transmission_flag,
};
use datapath::wire::nbd_transmission::{
    Chunk, HeaderStyle, ReplyHeader, RequestHeader, chunk_kind, command, command_flag,
};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::time::TimeSpec;

use super::report::Kind;
use super::uri::{NbdUri, Server};

/// A server that says nothing for so long during the handshake is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A blocking receive returns after this time, so that its caller can look around.
const RECEIVE_PAUSE: Duration = Duration::from_millis(100);
/// Received at once. Payloads may be longer; they pass through.
const INPUT_BYTES: usize = 512 << 10;
/// No chunk but data may be longer.
const CHUNK_BYTES_MAX: u64 = 64 << 10;
/// No reply to an option may be longer.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server is not there, or went away.
    #[error("connection lost: {0}")]
    Lost(#[from] io::Error),
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// The server does not want us.
    #[error("the server refused: {0}")]
    Refused(String),
}

impl From<WireError> for ClientError {
    fn from(error: WireError) -> ClientError {
        ClientError::Protocol(error.to_string())
    }
}

impl From<nix::Error> for ClientError {
    fn from(error: nix::Error) -> ClientError {
        ClientError::Lost(error.into())
    }
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn connect(server: &Server, patience: Duration) -> io::Result<Socket> {
        Ok(match server {
            Server::Tcp(address) => {
                let stream = connect_tcp(address, patience)?;
                stream.set_nodelay(true)?;
                Socket::Tcp(stream)
            }
            Server::Unix(path) => Socket::Unix(UnixStream::connect(path)?),
        })
    }

    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
            Socket::Unix(stream) => stream.set_read_timeout(Some(timeout)),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
        }
    }

    fn raw_fd(&self) -> RawFd {
        self.fd().as_raw_fd()
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.read_exact(bytes),
            Socket::Unix(stream) => stream.read_exact(bytes),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.write_all(bytes),
            Socket::Unix(stream) => stream.write_all(bytes),
        }
    }
}

/// The kernel tries for minutes to reach a machine that does not answer at all.
fn connect_tcp(address: &str, patience: Duration) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// What a request asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) kind: Kind,
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u32,
    pub(super) fua: bool,
}

/// A request that was answered.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) ask: Ask,
    /// What the caller gave with the request.
    pub(super) tag: T,
    /// The server's error number, if it failed.
    pub(super) error: Option<u32>,
    /// The bytes of a successful read, if the client keeps data; hand it back with [`Client::recycle`].
    pub(super) data: Vec<u8>,
}

struct Sent<T> {
    ask: Ask,
    tag: T,
    error: Option<u32>,
    covered_bytes: u64,
    data: Vec<u8>,
}

/// The payload that comes next on the socket.
struct Incoming {
    slot: usize,
    at: usize,
    remaining: usize,
    last: bool,
}

/// One connection to one export.
pub(super) struct Client<T> {
    socket: Socket,
    style: HeaderStyle,
    /// Size of the export.
    pub(super) size_bytes: u64,
    /// The export's transmission flags.
    pub(super) flags: u16,
    /// The server's limit for one payload.
    pub(super) payload_bytes_max: u32,
    keep_data: bool,
    slots: Vec<Option<Sent<T>>>,
    free: Vec<usize>,
    /// Counts requests: the upper half of a cookie, so that a late or doubled answer is recognised.
    serial: u32,
    cookies: Vec<u64>,
    output: Vec<u8>,
    output_sent: usize,
    input: Vec<u8>,
    input_start: usize,
    input_end: usize,
    incoming: Option<Incoming>,
    spare: Vec<Vec<u8>>,
}

impl<T> Client<T> {
    /// Connects and negotiates. `wish` is the best header style to ask for; a server may know only lesser ones. One that
    /// says nothing for as long as `patience` is given up.
    pub(super) fn connect(
        uri: &NbdUri,
        wish: HeaderStyle,
        depth: usize,
        keep_data: bool,
        patience: Duration,
    ) -> Result<Client<T>, ClientError> {
        let patience = patience.min(HANDSHAKE_TIMEOUT);
        let mut socket = Socket::connect(&uri.server, patience)?;
        socket.set_timeout(patience)?;
        let agreed = negotiate(&mut socket, &uri.export, wish)?;
        socket.set_timeout(RECEIVE_PAUSE)?;
        Ok(Client {
            socket,
            style: agreed.style,
            size_bytes: agreed.size_bytes,
            flags: agreed.flags,
            payload_bytes_max: agreed.payload_bytes_max,
            keep_data,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            serial: 0,
            cookies: vec![0; depth],
            output: Vec::new(),
            output_sent: 0,
            input: vec![0; INPUT_BYTES],
            input_start: 0,
            input_end: 0,
            incoming: None,
            spare: Vec::new(),
        })
    }

    /// Does the export offer this transmission flag?
    pub(super) fn offers(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Requests that were queued and not answered.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Can another request be queued?
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a request; `fill` writes the payload of a write. There must be room.
    pub(super) fn queue(&mut self, ask: Ask, tag: T, fill: impl FnOnce(&mut [u8])) {
        let slot = self.free.pop().expect("the caller checked that there is room");
        self.serial = self.serial.wrapping_add(1);
        let cookie = u64::from(self.serial) << 32 | slot as u64;
        self.cookies[slot] = cookie;
        let mut flags = if ask.fua { command_flag::FUA } else { 0 };
        let command = match ask.kind {
            Kind::Read => command::READ,
            Kind::Write => command::WRITE,
            Kind::Trim => command::TRIM,
            Kind::Zeroes => command::WRITE_ZEROES,
            Kind::Flush => command::FLUSH,
        };
        if ask.kind == Kind::Write && self.style == HeaderStyle::Extended {
            flags |= command_flag::PAYLOAD_LEN;
        }
        let length_bytes = u64::from(ask.length_bytes);
        let header = RequestHeader { flags, command, cookie, offset_bytes: ask.offset_bytes, length_bytes };
        self.output.extend_from_slice(header.encode(self.style).as_slice());
        if ask.kind == Kind::Write {
            let start = self.output.len();
            self.output.resize(start + ask.length_bytes as usize, 0);
            fill(&mut self.output[start..]);
        }
        let mut data = Vec::new();
        if self.keep_data && ask.kind == Kind::Read {
            data = self.spare.pop().unwrap_or_default();
            data.resize(ask.length_bytes as usize, 0);
        }
        self.slots[slot] = Some(Sent { ask, tag, error: None, covered_bytes: 0, data });
    }

    /// Gives the memory of an answer back for later ones.
    pub(super) fn recycle(&mut self, data: Vec<u8>) {
        if data.capacity() > 0 {
            self.spare.push(data);
        }
    }

    /// Sends what the socket takes without waiting. True if everything queued is on its way.
    pub(super) fn send_some(&mut self) -> Result<bool, ClientError> {
        while self.output_sent < self.output.len() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.raw_fd(), &self.output[self.output_sent..], flags) {
                Ok(sent) => self.output_sent += sent,
                Err(nix::Error::EAGAIN) => return Ok(false),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        self.output_sent = 0;
        Ok(true)
    }

    /// Waits until the socket can go on, or `until`, or a short pause has passed.
    pub(super) fn wait(&self, now: Instant, until: Option<Instant>) -> Result<(), ClientError> {
        let mut events = PollFlags::POLLIN;
        if self.output_sent < self.output.len() {
            events |= PollFlags::POLLOUT;
        }
        let pause =
            until.map_or(RECEIVE_PAUSE, |until| until.saturating_duration_since(now).min(RECEIVE_PAUSE));
        let mut polled = [PollFd::new(self.socket.fd(), events)];
        match ppoll(&mut polled, Some(TimeSpec::from_duration(pause)), None) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives what is there; with `block`, waits for it for a short pause.
    pub(super) fn receive_some(&mut self, block: bool) -> Result<(), ClientError> {
        self.input.copy_within(self.input_start..self.input_end, 0);
        self.input_end -= self.input_start;
        self.input_start = 0;
        let flags = if block { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        match recv(self.socket.raw_fd(), &mut self.input[self.input_end..], flags) {
            Ok(0) => {
                Err(ClientError::Lost(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the server")))
            }
            Ok(received) => {
                self.input_end += received;
                Ok(())
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next answer among the bytes received, if one is complete.
    pub(super) fn next_answer(&mut self) -> Result<Option<Answer<T>>, ClientError> {
        loop {
            if let Some(incoming) = &mut self.incoming {
                let here = incoming.remaining.min(self.input_end - self.input_start);
                let bytes = &self.input[self.input_start..self.input_start + here];
                let sent = self.slots[incoming.slot].as_mut().expect("payload belongs to a request");
                if self.keep_data {
                    sent.data[incoming.at..incoming.at + here].copy_from_slice(bytes);
                }
                self.input_start += here;
                incoming.at += here;
                incoming.remaining -= here;
                if incoming.remaining > 0 {
                    return Ok(None);
                }
                let (slot, last) = (incoming.slot, incoming.last);
                self.incoming = None;
                if last {
                    return self.complete(slot).map(Some);
                }
                continue;
            }
            let bytes = &self.input[self.input_start..self.input_end];
            let Some((header, header_len)) = ReplyHeader::decode(self.style, bytes)? else { return Ok(None) };
            let finished = match header {
                ReplyHeader::Simple { error, cookie } => self.take_simple(error, cookie, header_len)?,
                ReplyHeader::Chunk(chunk) => {
                    let slot = self.slot_of(chunk.cookie)?;
                    match self.take_chunk(
                        slot,
                        chunk.kind,
                        chunk.length_bytes,
                        chunk.is_last(),
                        header_len,
                    )? {
                        Step::Incomplete => return Ok(None),
                        Step::Taken if chunk.is_last() => Some(slot),
                        Step::Taken | Step::Payload => None,
                    }
                }
            };
            if let Some(slot) = finished {
                return self.complete(slot).map(Some);
            }
        }
    }

    fn take_simple(
        &mut self,
        error: u32,
        cookie: u64,
        header_len: usize,
    ) -> Result<Option<usize>, ClientError> {
        let slot = self.slot_of(cookie)?;
        let sent = self.slots[slot].as_mut().expect("checked by slot_of");
        if sent.ask.kind == Kind::Read && self.style != HeaderStyle::Simple {
            return Err(protocol("a simple reply to a read, though structured replies were agreed on"));
        }
        self.input_start += header_len;
        if error == 0 && sent.ask.kind == Kind::Read {
            let remaining = sent.ask.length_bytes as usize;
            sent.covered_bytes = u64::from(sent.ask.length_bytes);
            self.incoming = Some(Incoming { slot, at: 0, remaining, last: true });
            return Ok(None);
        }
        sent.error = (error != 0).then_some(error);
        Ok(Some(slot))
    }

    fn take_chunk(
        &mut self,
        slot: usize,
        kind: u16,
        length_bytes: u64,
        last: bool,
        header_len: usize,
    ) -> Result<Step, ClientError> {
        let available = &self.input[self.input_start + header_len..self.input_end];
        let sent = self.slots[slot].as_mut().expect("checked by slot_of");
        if kind == chunk_kind::OFFSET_DATA {
            let Some(offset) = available.first_chunk::<8>() else { return Ok(Step::Incomplete) };
            let data_len = length_bytes.checked_sub(8).ok_or(WireError::Truncated)?;
            let at = part_of_read(&sent.ask, u64::from_be_bytes(*offset), data_len)?;
            sent.covered_bytes += data_len;
            self.input_start += header_len + 8;
            let remaining = usize::try_from(data_len).expect("checked against the request");
            self.incoming = Some(Incoming { slot, at, remaining, last });
            return Ok(Step::Payload);
        }
        if length_bytes > CHUNK_BYTES_MAX {
            return Err(protocol("a chunk without data is too long"));
        }
        let length = usize::try_from(length_bytes).expect("checked against the limit");
        let Some(payload) = available.get(..length) else { return Ok(Step::Incomplete) };
        match Chunk::decode(kind, payload)? {
            Chunk::None => {}
            Chunk::Hole { offset_bytes, length_bytes } => {
                let at = part_of_read(&sent.ask, offset_bytes, u64::from(length_bytes))?;
                sent.covered_bytes += u64::from(length_bytes);
                if self.keep_data {
                    sent.data[at..at + length_bytes as usize].fill(0);
                }
            }
            Chunk::Error { error, .. } => sent.error = Some(error),
            Chunk::Data { .. } | Chunk::Status { .. } => {
                return Err(protocol("a chunk that was not asked for"));
            }
        }
        self.input_start += header_len + length;
        Ok(Step::Taken)
    }

    fn slot_of(&self, cookie: u64) -> Result<usize, ClientError> {
        let slot = usize::try_from(cookie & u64::from(u32::MAX)).expect("32 bits");
        let known = self.slots.get(slot).is_some_and(Option::is_some) && self.cookies[slot] == cookie;
        if known { Ok(slot) } else { Err(protocol("an answer to a request that is not in flight")) }
    }

    fn complete(&mut self, slot: usize) -> Result<Answer<T>, ClientError> {
        let Sent { ask, tag, error, covered_bytes, data } = self.slots[slot].take().expect("in flight");
        self.free.push(slot);
        if ask.kind == Kind::Read && error.is_none() && covered_bytes != u64::from(ask.length_bytes) {
            return Err(protocol("a read was answered with too few or too many bytes"));
        }
        Ok(Answer { ask, tag, error, data })
    }

    /// Takes leave, as the protocol wants; nothing is in flight.
    pub(super) fn disconnect(mut self) {
        let (flags, command, cookie, offset_bytes, length_bytes) = (0, command::DISC, 0, 0, 0);
        let header = RequestHeader { flags, command, cookie, offset_bytes, length_bytes };
        // The server may be gone already, and then needs no farewell.
        let _ = self.socket.write_all(header.encode(self.style).as_slice());
    }
}

/// How far a chunk got.
enum Step {
    Incomplete,
    Payload,
    Taken,
}

fn protocol(what: &str) -> ClientError {
    ClientError::Protocol(what.to_owned())
}

/// Where in the read's memory this part belongs.
fn part_of_read(ask: &Ask, offset_bytes: u64, length_bytes: u64) -> Result<usize, ClientError> {
    let at = offset_bytes.checked_sub(ask.offset_bytes);
    let inside =
        at.and_then(|at| at.checked_add(length_bytes)).is_some_and(|end| end <= u64::from(ask.length_bytes));
    match at {
        Some(at) if inside && ask.kind == Kind::Read => Ok(usize::try_from(at).expect("inside the request")),
        _ => Err(protocol("data outside of what was asked for")),
    }
}

struct Agreed {
    style: HeaderStyle,
    size_bytes: u64,
    flags: u16,
    payload_bytes_max: u32,
}

fn negotiate(socket: &mut Socket, export: &str, wish: HeaderStyle) -> Result<Agreed, ClientError> {
    let mut greeting = [0; GREETING_BYTES];
    socket.read_exact(&mut greeting)?;
    let offered = Greeting::decode(&greeting)?.flags;
    if offered & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(protocol("the server does not negotiate (fixed newstyle)"));
    }
    let flags = client_flag::FIXED_NEWSTYLE
        | if offered & handshake_flag::NO_ZEROES == 0 { 0 } else { client_flag::NO_ZEROES };
    socket.write_all(&flags.to_be_bytes())?;
    let mut style = HeaderStyle::Simple;
    if wish == HeaderStyle::Extended && ask_option(socket, option::EXTENDED_HEADERS)? {
        style = HeaderStyle::Extended;
    } else if wish != HeaderStyle::Simple && ask_option(socket, option::STRUCTURED_REPLY)? {
        style = HeaderStyle::Structured;
    }
    let mut message = Vec::new();
    encode_info_query(&mut message, option::GO, export, &[info_type::BLOCK_SIZE]);
    socket.write_all(&message)?;
    // Without a word from the server, this is what every server must take.
    let mut agreed = Agreed { style, size_bytes: 0, flags: 0, payload_bytes_max: 32 << 20 };
    loop {
        let (header, payload) = option_reply(socket)?;
        match header.reply_type {
            reply_type::INFO => match Info::decode(&payload)? {
                Info::Export { size_bytes, flags } => (agreed.size_bytes, agreed.flags) = (size_bytes, flags),
                Info::BlockSize { payload_bytes_max, .. } => agreed.payload_bytes_max = payload_bytes_max,
                _ => {}
            },
            reply_type::ACK if agreed.flags & transmission_flag::HAS_FLAGS == 0 => {
                return Err(protocol("no facts about the export before the end of the handshake"));
            }
            reply_type::ACK => return Ok(agreed),
            _ => {
                let text = String::from_utf8_lossy(&payload).into_owned();
                return Err(ClientError::Refused(format!(
                    "export `{export}`: {text} ({:#x})",
                    header.reply_type
                )));
            }
        }
    }
}

fn ask_option(socket: &mut Socket, number: u32) -> Result<bool, ClientError> {
    let mut message = Vec::new();
    encode_option(&mut message, number, &[]);
    socket.write_all(&message)?;
    let (header, _) = option_reply(socket)?;
    Ok(header.reply_type == reply_type::ACK)
}

fn option_reply(socket: &mut Socket) -> Result<(OptionReplyHeader, Vec<u8>), ClientError> {
    let mut bytes = [0; OPTION_REPLY_HEADER_BYTES];
    socket.read_exact(&mut bytes)?;
    let header = OptionReplyHeader::decode(&bytes)?;
    if header.length_bytes > OPTION_REPLY_BYTES_MAX {
        return Err(protocol("the reply to an option is too long"));
    }
    let mut payload = vec![0; header.length_bytes as usize];
    socket.read_exact(&mut payload)?;
    Ok((header, payload))
}
