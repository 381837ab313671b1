//! The floor of the wire: an NBD server that answers from memory and touches no disk.
//!
//! One connection at a time, simple replies, blocking reads and writes. What it sends and receives has the
//! same form as with a real server, so a client that gets more I/O out of a server than out of this one has found
//! a server with fewer system calls, not a faster disk. Not for untrusted clients: it trusts every length.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const REQUEST_BYTES: usize = 28;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Holds many requests, or one large one: a whole burst of the client is taken with one `read`.
const BUFFER_BYTES: usize = 1 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

/// Serves a volume of `size_bytes` until the process ends.
///
/// # Errors
/// When the socket breaks; a client that misbehaves only loses its connection.
pub fn serve(listener: &UnixListener, size_bytes: u64) -> io::Result<()> {
    loop {
        let (mut client, _) = listener.accept()?;
        // However it ends: the next client gets its turn.
        let _ =
            handshake(&mut client, size_bytes).and_then(|go| if go { answer(&mut client) } else { Ok(()) });
    }
}

/// Fixed newstyle negotiation: accepts any export with GO, refuses every other option. False if the client left.
fn handshake(client: &mut UnixStream, size_bytes: u64) -> io::Result<bool> {
    client.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut flags = [0; 4];
    client.read_exact(&mut flags)?;
    loop {
        let mut header = [0; 16];
        client.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into().expect("four bytes"));
        let len = u32::from_be_bytes(header[12..16].try_into().expect("four bytes"));
        io::copy(&mut Read::by_ref(client).take(u64::from(len)), &mut io::sink())?;
        let mut reply = |kind: u32, payload: &[u8]| {
            let len = u32::try_from(payload.len()).expect("short payload");
            let mut message = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            for word in [option, kind, len] {
                message.extend(word.to_be_bytes());
            }
            message.extend(payload);
            client.write_all(&message)
        };
        match option {
            2 => {
                reply(1, &[])?;
                return Ok(false);
            }
            6 | 7 => {
                // NBD_INFO_EXPORT; HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES.
                let flags: u16 = 0b110_1101;
                let info = [&[0, 0][..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat();
                reply(3, &info)?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(true);
                }
            }
            _ => reply((1 << 31) | 1, &[])?,
        }
    }
}

/// Answers requests until the client leaves. All that one `read` brought is answered with one `write`.
fn answer(client: &mut UnixStream) -> io::Result<()> {
    let mut input = vec![0; BUFFER_BYTES];
    let mut output = Vec::with_capacity(2 * BUFFER_BYTES);
    let mut filled = 0;
    loop {
        let received = client.read(&mut input[filled..])?;
        if received == 0 {
            return Ok(());
        }
        filled += received;
        let mut used = 0;
        while let Some(header) = input[used..filled].first_chunk::<REQUEST_BYTES>() {
            assert_eq!(header[..4], REQUEST_MAGIC.to_be_bytes(), "the client lost its place");
            let kind = u16::from_be_bytes([header[6], header[7]]);
            let len = u32::from_be_bytes(header[24..28].try_into().expect("four bytes")) as usize;
            let payload = if kind == WRITE { len } else { 0 };
            assert!(REQUEST_BYTES + payload <= BUFFER_BYTES, "request too long for this server");
            if kind == DISCONNECT {
                return Ok(());
            }
            if filled - used < REQUEST_BYTES + payload {
                break;
            }
            used += REQUEST_BYTES + payload;
            output.extend(REPLY_MAGIC.to_be_bytes());
            output.extend([0; 4]);
            output.extend(&header[8..16]);
            if kind == READ {
                output.resize(output.len() + len, 0);
            }
        }
        client.write_all(&output)?;
        output.clear();
        input.copy_within(used..filled, 0);
        filled -= used;
    }
}
