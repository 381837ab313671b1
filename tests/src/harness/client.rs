//! An NBD client that knows each answer: it keeps requests in flight, and tells the error of every one.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use datapath::wire::nbd_handshake::{
    GREETING_BYTES, OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, client_flag, encode_info_query, option,
    reply_type,
};
use datapath::wire::nbd_transmission::{
    HeaderStyle, ReplyHeader, RequestHeader, SIMPLE_REPLY_BYTES, command,
};

use crate::to_usize;

/// A server that owes an answer for so long is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection to one volume, with simple replies.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    /// Cookies of the requests in flight, and the bytes that a successful answer brings.
    in_flight: BTreeMap<u64, usize>,
    next_cookie: u64,
}

/// An answered request.
#[derive(Debug)]
pub struct Answer {
    /// What [`Client::ask`] named it.
    pub cookie: u64,
    /// The NBD error number, 0 for success.
    pub error: u32,
    /// What a successful read brought.
    pub data: Vec<u8>,
}

impl Client {
    /// Connects to a volume.
    ///
    /// # Errors
    /// When the server is not there, another one leads the volume, or it does not know the volume (yet).
    ///
    /// # Panics
    /// If it breaks the protocol.
    pub fn connect(socket: &Path, volume: &str) -> io::Result<Client> {
        let mut socket = UnixStream::connect(socket)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.read_exact(&mut [0; GREETING_BYTES])?;
        let mut hello = (client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES).to_be_bytes().to_vec();
        encode_info_query(&mut hello, option::GO, volume, &[]);
        socket.write_all(&hello)?;
        loop {
            let mut bytes = [0; OPTION_REPLY_HEADER_BYTES];
            socket.read_exact(&mut bytes)?;
            let header = OptionReplyHeader::decode(&bytes).expect("a reply to GO");
            socket.read_exact(&mut vec![0; header.length_bytes as usize])?;
            match header.reply_type {
                reply_type::ACK => return Ok(Client { socket, in_flight: BTreeMap::new(), next_cookie: 1 }),
                reply_type::INFO => {}
                // Another node leads it, or may still do so.
                reply_type::ERR_POLICY => return Err(io::ErrorKind::PermissionDenied.into()),
                reply_type::ERR_UNKNOWN => return Err(io::ErrorKind::NotFound.into()),
                refused => panic!("{volume} is refused: {refused:#x}"),
            }
        }
    }

    /// Sends a request, and returns the cookie that its answer will carry. `payload` is that of a write.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn ask(
        &mut self,
        command: u16,
        offset_bytes: u64,
        length_bytes: u64,
        payload: &[u8],
    ) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let header = RequestHeader { flags: 0, command, cookie, offset_bytes, length_bytes };
        self.socket.write_all(header.encode(HeaderStyle::Simple).as_slice())?;
        self.socket.write_all(payload)?;
        let data = if command == command::READ { to_usize(length_bytes) } else { 0 };
        self.in_flight.insert(cookie, data);
        Ok(cookie)
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// When the connection is lost.
    ///
    /// # Panics
    /// If the answer belongs to no request, or none comes.
    pub fn answer(&mut self) -> io::Result<Answer> {
        let mut bytes = [0; SIMPLE_REPLY_BYTES];
        let received = self.socket.read_exact(&mut bytes);
        let is_late = received.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        assert!(!is_late, "the server is stuck: no answer within {ANSWER_TIMEOUT:?}");
        received?;
        let Ok(Some((ReplyHeader::Simple { error, cookie }, _))) =
            ReplyHeader::decode(HeaderStyle::Simple, &bytes)
        else {
            panic!("not a simple reply: {bytes:?}");
        };
        let expected = self.in_flight.remove(&cookie).expect("an answer to a request in flight");
        let mut data = vec![0; if error == 0 { expected } else { 0 }];
        self.socket.read_exact(&mut data)?;
        Ok(Answer { cookie, error, data })
    }

    /// Sends a request and waits for its answer. Nothing else may be in flight.
    ///
    /// # Errors
    /// When the connection is lost.
    ///
    /// # Panics
    /// If something is in flight.
    pub fn call(
        &mut self,
        command: u16,
        offset_bytes: u64,
        length_bytes: u64,
        payload: &[u8],
    ) -> io::Result<Answer> {
        assert!(self.in_flight.is_empty(), "{:?} are in flight", self.in_flight);
        self.ask(command, offset_bytes, length_bytes, payload)?;
        self.answer()
    }

    /// Requests without an answer so far.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}
