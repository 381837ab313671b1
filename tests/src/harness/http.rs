//! A client of HTTP/1.1 for tests: one request on each connection.

use std::io::{Read, Write};
use std::net::TcpStream;

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// Sends a request with a JSON body, if there is one.
///
/// # Panics
/// If there is no answer.
#[must_use]
pub fn ask(url: &str, method: &str, path: &str, body: Option<&str>) -> Answer {
    let body = body.unwrap_or_default();
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    let length = body.len();
    send(
        url,
        &format!("{method} {path} HTTP/1.1\r\nHost: ctl\r\n{kind}Content-Length: {length}\r\n"),
        body.as_bytes(),
    )
}

/// Sends these headers, and this body.
///
/// # Panics
/// If there is no answer.
#[must_use]
pub fn send(url: &str, head: &str, body: &[u8]) -> Answer {
    let address = url.strip_prefix("http://").expect("a URL");
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).expect("sent");
    // The server may refuse it before it has come.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Answer { status, body: body.to_owned() }
}
