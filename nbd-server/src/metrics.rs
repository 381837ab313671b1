//! An HTTP/1.0 endpoint for Prometheus: one page, one client at a time, everything bounded.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A client that is silent for longer is dropped.
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// Longest request head that is read.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// Pieces in which it may arrive. With [`SILENCE_MAX`] this bounds how long one client can keep the others out.
const REQUEST_READS_MAX: usize = 8;
/// What Prometheus calls its text format, and what its client library writes.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Starts a thread that answers `GET /metrics` with what `render` returns. It ends with the process. Returns the
/// address.
///
/// # Errors
/// If no thread can be started.
pub fn start_metrics(
    listener: TcpListener,
    render: impl Fn() -> String + Send + 'static,
) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        for stream in listener.incoming() {
            let answered = stream.and_then(|mut stream| answer(&mut stream, &render));
            if let Err(error) = answered {
                tracing::debug!(%error, "metrics client");
            }
        }
    })?;
    Ok(address)
}

fn answer(stream: &mut TcpStream, render: &impl Fn() -> String) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let head = read_head(stream)?;
    let (status, body) = match request_path(&head) {
        Some((b"GET" | b"HEAD", b"/metrics")) => ("200 OK", render()),
        Some((b"GET" | b"HEAD", _)) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        Some(_) => ("405 Method Not Allowed", "only GET is known here\n".to_owned()),
        None => ("400 Bad Request", "not an HTTP request\n".to_owned()),
    };
    let content_type = if status == "200 OK" { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.0 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    if !head.starts_with(b"HEAD ") {
        stream.write_all(body.as_bytes())?;
    }
    Ok(())
}

/// Reads up to the empty line. What does not end in time or space is taken as it is, and found wanting.
fn read_head(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = vec![0; REQUEST_BYTES_MAX];
    let mut len = 0;
    for _ in 0..REQUEST_READS_MAX {
        let count = stream.read(&mut head[len..])?;
        len += count;
        if count == 0 || head[..len].windows(4).any(|window| window == b"\r\n\r\n") {
            break;
        }
    }
    head.truncate(len);
    Ok(head)
}

/// Method and path (without the query) of a whole request head.
fn request_path(head: &[u8]) -> Option<(&[u8], &[u8])> {
    if !head.windows(4).any(|window| window == b"\r\n\r\n") {
        return None;
    }
    let line = head.split(|byte| *byte == b'\r').next()?;
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if words.next().is_some() || !version.starts_with(b"HTTP/1.") {
        return None;
    }
    Some((method, target.split(|byte| *byte == b'?').next()?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

    use super::start_metrics;

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.write_all(request).expect("sent");
        stream.shutdown(Shutdown::Write).expect("open");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    #[test]
    fn answers_scrapes_and_survives_everything_else() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = start_metrics(listener, || "berth_up 1\n# EOF\n".to_owned()).expect("a thread");
        let good = ask(address, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            good.starts_with("HTTP/1.0 200 OK\r\n") && good.ends_with("\r\n\r\nberth_up 1\n# EOF\n"),
            "{good}"
        );
        assert!(good.contains("Content-Length: 17\r\n"), "{good}");
        assert!(ask(address, b"HEAD /metrics HTTP/1.0\r\n\r\n").ends_with("\r\n\r\n"));
        assert!(ask(address, b"GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404 "));
        assert!(ask(address, b"POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 405 "));
        for nonsense in [&b"GET /metrics"[..], b"", b"\xff\r\n\r\n", b"GET /metrics FTP/1.0\r\n\r\n"] {
            assert!(ask(address, nonsense).starts_with("HTTP/1.0 400 "), "{nonsense:?}");
        }
        assert!(ask(address, b"GET /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 200 "));
    }
}
