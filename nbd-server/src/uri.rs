//! The NBD URIs under which clients find a volume, as the URI specification of the NBD project has them:
//! `nbd://host:port/NAME` and `nbd+unix:///NAME?socket=PATH`.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use std::os::unix::ffi::OsStrExt;

use crate::volume_name::VolumeName;

/// IANA's port for NBD; left out of URIs.
pub const PORT_DEFAULT: u16 = 10809;

/// The URI of a volume on a TCP listener. A listener on all addresses is named by the loopback.
#[must_use]
pub fn tcp_uri(address: SocketAddr, volume: &VolumeName) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let host = match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let port = match address.port() {
        PORT_DEFAULT => String::new(),
        port => format!(":{port}"),
    };
    format!("nbd://{host}{port}/{}", percent_encoded(volume.as_str().as_bytes(), b""))
}

/// The URI of a volume on a unix socket.
#[must_use]
pub fn unix_uri(socket: &Path, volume: &VolumeName) -> String {
    let socket = percent_encoded(socket.as_os_str().as_bytes(), b"/");
    format!("nbd+unix:///{}?socket={socket}", percent_encoded(volume.as_str().as_bytes(), b""))
}

/// RFC 3986, section 2: all but the unreserved characters, and those of `also_plain`, as %XX.
fn percent_encoded(bytes: &[u8], also_plain: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || also_plain.contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{tcp_uri, unix_uri};

    #[test]
    fn names_what_a_client_connects_to() {
        let volume = "db-1".parse().expect("a name");
        for (address, uri) in [
            ("127.0.0.1:10809", "nbd://127.0.0.1/db-1"),
            ("0.0.0.0:7000", "nbd://127.0.0.1:7000/db-1"),
            ("[::1]:7000", "nbd://[::1]:7000/db-1"),
            ("[::]:10809", "nbd://[::1]/db-1"),
        ] {
            assert_eq!(tcp_uri(address.parse().expect("an address"), &volume), uri);
        }
        let uri = unix_uri("/run/berth/a b&c%.sock".as_ref(), &volume);
        assert_eq!(uri, "nbd+unix:///db-1?socket=/run/berth/a%20b%26c%25.sock");
    }
}
