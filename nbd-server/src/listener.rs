//! What the server listens on: TCP addresses, unix sockets, and sockets that systemd hands over.

use std::fmt;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use datapath::reactor::inherited::listening_socket;
use nix::sys::socket::sockopt::TcpUserTimeout;
use nix::sys::socket::{SockaddrLike, SockaddrStorage, getsockname, setsockopt};
use thiserror::Error;

use crate::uri::{tcp_uri, unix_uri};
use crate::volume_name::VolumeName;

/// Who may connect to a unix socket: the owner and the group.
const SOCKET_MODE: u32 = 0o660;
/// The first file that systemd hands over (sd_listen_fds(3)).
const ACTIVATION_FIRST: RawFd = 3;
/// More sockets than this are taken for a mistake.
const ACTIVATION_MAX: i32 = 64;

/// Where to listen, as given on the command line: `ADDR:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A host name or address, with a port.
    Tcp(String),
    /// A path.
    Unix(PathBuf),
}

/// Not an address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not an address to listen on; write ADDR:PORT or unix:PATH")]
pub struct ListenAddressError(String);

/// Why the server cannot listen.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Another server answers on the socket.
    #[error("unix:{0}: a living server listens there already")]
    Occupied(PathBuf),
    /// Something else has the name.
    #[error("unix:{0}: exists and is not a socket; it is left alone")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("{address}: cannot listen: {source}")]
    Bind {
        /// Where.
        address: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// What systemd handed over makes no sense.
    #[error("socket activation: {0}")]
    Activation(String),
}

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ListenAddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong()) } else { Ok(ListenAddress::Unix(path.into())) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || port.parse::<u16>().is_err() || (host.contains(':') && !bracketed) {
            return Err(wrong());
        }
        Ok(ListenAddress::Tcp(text.to_owned()))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => f.write_str(address),
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens. A unix socket that this server made is removed with it.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<OwnedFd>,
    place: Place,
    /// The socket's file as it was made: somebody may have put another one there since.
    owned: Option<FileIdentity>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    fn of(path: &Path) -> io::Result<FileIdentity> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(FileIdentity { device: metadata.dev(), inode: metadata.ino() })
    }
}

impl Listener {
    /// Begins to listen.
    ///
    /// # Errors
    /// If the address is taken, unknown or not allowed.
    pub fn bind(address: &ListenAddress) -> Result<Listener, ListenError> {
        let failed = |source| ListenError::Bind { address: address.to_string(), source };
        match address {
            ListenAddress::Tcp(text) => {
                let addresses: Vec<SocketAddr> = text.to_socket_addrs().map_err(failed)?.collect();
                let listener = TcpListener::bind(&*addresses).map_err(failed)?;
                let place = Place::Tcp(listener.local_addr().map_err(failed)?);
                Ok(Listener { socket: Arc::new(listener.into()), place, owned: None })
            }
            ListenAddress::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                let owned = FileIdentity::of(path).map_err(failed)?;
                fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
                let place = Place::Unix(std::path::absolute(path).map_err(failed)?);
                Ok(Listener { socket: Arc::new(listener.into()), place, owned: Some(owned) })
            }
        }
    }

    /// The sockets that systemd hands over, if it does: `LISTEN_PID` names this process.
    ///
    /// # Errors
    /// If they are not listening sockets.
    pub fn activated() -> Result<Vec<Listener>, ListenError> {
        let variable = |name: &str| std::env::var(name).ok();
        let count = activated_count(variable("LISTEN_PID"), variable("LISTEN_FDS"), std::process::id())?;
        (ACTIVATION_FIRST..ACTIVATION_FIRST + count)
            .map(|number| {
                let failed = |error: io::Error| ListenError::Activation(format!("file {number}: {error}"));
                let socket = listening_socket(number).map_err(failed)?;
                let place = place_of(&socket).ok_or_else(|| {
                    ListenError::Activation(format!("file {number} is neither a TCP nor a named unix socket"))
                })?;
                Ok(Listener { socket: Arc::new(socket), place, owned: None })
            })
            .collect()
    }

    /// For the reactors.
    #[must_use]
    pub fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }

    /// The URI under which a client finds a volume here.
    #[must_use]
    pub fn uri(&self, volume: &VolumeName) -> String {
        match &self.place {
            Place::Tcp(address) => tcp_uri(*address, volume),
            Place::Unix(path) => unix_uri(path, volume),
        }
    }

    /// Where it listens, for people: `ADDR:PORT` or `unix:PATH`.
    #[must_use]
    pub fn place(&self) -> String {
        match &self.place {
            Place::Tcp(address) => address.to_string(),
            Place::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// The TCP address, with the port that the kernel chose for port 0.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self.place {
            Place::Tcp(address) => Some(address),
            Place::Unix(_) => None,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let (Place::Unix(path), Some(owned)) = (&self.place, self.owned)
            && FileIdentity::of(path).is_ok_and(|found| found == owned)
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// A socket that a dead server left behind is in the way of `bind`; one that answers is not ours to take.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Bind { address: format!("unix:{}", path.display()), source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Also one that we may not talk to.
        _ => Err(ListenError::Occupied(path.to_owned())),
    }
}

fn activated_count(pid: Option<String>, count: Option<String>, own_pid: u32) -> Result<i32, ListenError> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(0) };
    // Meant for another process: the variables are inherited by children.
    if pid.parse() != Ok(own_pid) {
        return Ok(0);
    }
    let number = count.parse().ok().filter(|number| (0..=ACTIVATION_MAX).contains(number));
    number.ok_or_else(|| ListenError::Activation(format!("LISTEN_FDS={count:?}")))
}

/// Has the kernel give up a TCP connection when what was sent has not arrived for so long. Connections that a listening
/// socket accepts take it over.
///
/// # Errors
/// If it is no TCP socket.
pub(crate) fn limit_undelivered(socket: &impl AsFd, most: Duration) -> io::Result<()> {
    let most_ms = u32::try_from(most.as_millis()).unwrap_or(u32::MAX);
    Ok(setsockopt(socket, TcpUserTimeout, &most_ms)?)
}

fn place_of(socket: &impl AsFd) -> Option<Place> {
    use std::os::fd::AsRawFd;
    let address: SockaddrStorage = getsockname(socket.as_fd().as_raw_fd()).ok()?;
    if let Some(address) = address.as_sockaddr_in() {
        return Some(Place::Tcp(SocketAddr::new(address.ip().into(), address.port())));
    }
    if let Some(address) = address.as_sockaddr_in6() {
        return Some(Place::Tcp(SocketAddr::new(address.ip().into(), address.port())));
    }
    let path = address.as_unix_addr()?.path()?;
    (address.len() > 0).then(|| Place::Unix(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};

    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use nix::sys::socket::getsockopt;
    use nix::sys::socket::sockopt::TcpUserTimeout;

    use super::{ListenAddress, ListenError, Listener, activated_count, limit_undelivered, place_of};

    #[test]
    fn an_accepted_connection_is_given_up_as_soon_as_its_listener_says() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        limit_undelivered(&listener, Duration::from_secs(2)).expect("a TCP socket");
        let _client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (accepted, _) = listener.accept().expect("a client");
        assert_eq!(getsockopt(&accepted, TcpUserTimeout), Ok(2000));
    }

    fn scratch(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("berth-listener-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a scratch directory");
        directory.join(name)
    }

    fn bind(path: &Path) -> Result<Listener, ListenError> {
        Listener::bind(&ListenAddress::Unix(path.to_owned()))
    }

    #[test]
    fn parses_addresses() {
        for text in ["127.0.0.1:10809", "localhost:0", "[::1]:10809", "unix:/run/x.sock"] {
            assert_eq!(text.parse::<ListenAddress>().expect("an address").to_string(), text);
        }
        for text in ["", "10809", ":10809", "localhost", "::1:10809", "host:99999", "unix:"] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_refused() {
        let path = scratch("stale");
        drop(UnixListener::bind(&path).expect("a socket, left behind by its maker"));
        let listener = bind(&path).expect("nobody answers there");
        assert_eq!(fs::metadata(&path).expect("made").permissions().mode() & 0o777, 0o660);
        UnixStream::connect(&path).expect("somebody answers");
        assert!(matches!(bind(&path), Err(ListenError::Occupied(_))));
        drop(listener);
        assert!(!path.exists(), "removed with its server");
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let path = scratch("file");
        fs::write(&path, "precious").expect("written");
        assert!(matches!(bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");

        let path = scratch("taken-over");
        let listener = bind(&path).expect("a socket");
        fs::rename(&path, scratch("moved")).expect("moved away");
        fs::write(&path, "another's").expect("written");
        drop(listener);
        assert!(path.exists(), "only the server's own socket is removed");
    }

    #[test]
    fn tcp_port_zero_is_told_in_the_uri() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().expect("an address")).expect("a port");
        let port = listener.tcp_address().expect("TCP").port();
        assert_eq!(listener.uri(&"v".parse().expect("a name")), format!("nbd://127.0.0.1:{port}/v"));
        assert_eq!(place_of(&listener.socket().as_fd()), Some(listener.place.clone()));
    }

    #[test]
    fn activation_is_for_the_named_process_only() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(activated_count(some("7"), some("2"), 7).expect("two"), 2);
        assert_eq!(activated_count(some("8"), some("2"), 7).expect("another's"), 0);
        assert_eq!(activated_count(None, some("2"), 7).expect("nobody's"), 0);
        for wrong in ["-1", "x", "1000000"] {
            assert!(activated_count(some("7"), some(wrong), 7).is_err(), "{wrong}");
        }
    }
}
