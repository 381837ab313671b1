//! Sockets that the process was born with (systemd's socket activation).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{getsockopt, sockopt};

/// A duplicate of the listening socket that the parent left under this number.
///
/// # Errors
/// If there is no such file, or it is not a listening socket.
pub fn listening_socket(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is not -1. The borrow lasts for this function only, in which the number is asked about
    // and duplicated; whether it is open at all is the kernel's to say, and EBADF comes back as an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if !getsockopt(&borrowed, sockopt::AcceptConn)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a listening socket"));
    }
    borrowed.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::listening_socket;

    #[test]
    fn takes_listening_sockets_only() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let again = TcpListener::from(listening_socket(listener.as_raw_fd()).expect("it listens"));
        assert_eq!(again.local_addr().expect("bound"), address);
        let client = TcpStream::connect(address).expect("a connection");
        assert!(listening_socket(client.as_raw_fd()).is_err());
        assert!(listening_socket(-1).is_err());
        assert!(listening_socket(1_000_000).is_err());
    }
}
