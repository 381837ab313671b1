//! NBD URIs, as the NBD project's `doc/uri.md` defines them: `nbd://HOST[:PORT]/EXPORT` and
//! `nbd+unix:///EXPORT?socket=PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port that IANA gave to NBD.
const NBD_PORT: u16 = 10809;

/// Where a volume is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// The server's address.
    pub server: Server,
    /// The volume's name there; empty for the default one.
    pub export: String,
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// TCP, as `HOST:PORT`; an IPv6 address is in brackets.
    Tcp(String),
    /// A unix socket.
    Unix(PathBuf),
}

impl FromStr for NbdUri {
    type Err = String;

    fn from_str(uri: &str) -> Result<NbdUri, String> {
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| format!("`{uri}` is not a URI"))?;
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = address.split_once('/').unwrap_or((address, ""));
        let export = percent_decode(path)?;
        let server = match scheme {
            "nbd" if authority.is_empty() => return Err(format!("`{uri}` names no host")),
            "nbd" => Server::Tcp(with_port(authority)),
            "nbd+unix" => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                let socket = socket.ok_or_else(|| format!("`{uri}` has no ?socket=PATH"))?;
                Server::Unix(PathBuf::from(percent_decode(socket)?))
            }
            "nbds" | "nbds+unix" => return Err("TLS (nbds://) is not spoken by this client".to_owned()),
            _ => return Err(format!("unknown scheme `{scheme}`; use nbd:// or nbd+unix://")),
        };
        Ok(NbdUri { server, export })
    }
}

fn with_port(authority: &str) -> String {
    let after_address = authority.rfind(']').map_or(authority, |end| &authority[end..]);
    if after_address.contains(':') { authority.to_owned() } else { format!("{authority}:{NBD_PORT}") }
}

fn percent_decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = digits.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(byte.ok_or_else(|| format!("bad percent sign in `{text}`"))?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| format!("`{text}` is not UTF-8"))
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            Server::Tcp(address) => write!(f, "nbd://{address}/{}", self.export),
            Server::Unix(path) => write!(f, "nbd+unix:///{}?socket={}", self.export, path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_read() {
        let tcp = |address: &str, export: &str| {
            Ok(NbdUri { server: Server::Tcp(address.to_owned()), export: export.to_owned() })
        };
        assert_eq!("nbd://host/vol1".parse(), tcp("host:10809", "vol1"));
        assert_eq!("nbd://host:99".parse(), tcp("host:99", ""));
        assert_eq!("nbd://[::1]/a%20b".parse(), tcp("[::1]:10809", "a b"));
        assert_eq!("nbd://[::1]:7/a/b".parse(), tcp("[::1]:7", "a/b"));
        assert_eq!(
            "nbd+unix:///v?x=1&socket=/tmp/x%2by.sock".parse(),
            Ok(NbdUri { server: Server::Unix("/tmp/x+y.sock".into()), export: "v".to_owned() })
        );
        for bad in
            ["vol", "nbd:///v", "nbd+unix:///v", "nbds://h/v", "http://h/v", "nbd://h/%zz", "nbd://h/%"]
        {
            assert!(bad.parse::<NbdUri>().is_err(), "{bad}");
        }
    }
}
