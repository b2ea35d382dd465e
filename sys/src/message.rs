//! One message with descriptors over a SOCK_SEQPACKET pair (unix(7)).

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use crate::marked;

/// The most descriptors one message may carry.
pub const MAX_FDS: usize = 32;

/// Room for them, aligned as `struct cmsghdr` is.
type Control = [u64; 32];

/// A connected pair, both ends close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends: [RawFd; 2] = [0; 2];
    let arguments = [libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0]
        .map(|n| u64::from(n.cast_unsigned()));
    let [family, kind, protocol] = arguments;
    // SAFETY: the kernel writes two ints to the live array.
    unsafe {
        marked::call(
            libc::SYS_socketpair,
            [family, kind, protocol, ends.as_mut_ptr() as u64, 0],
        )
    }?;
    // SAFETY: the kernel has just made these two, and nobody else owns them.
    let [one, other] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((one, other))
}

/// A message without name, of one piece.
fn header(bytes: &mut libc::iovec, control: &mut Control, used: usize) -> libc::msghdr {
    // SAFETY: all of it are integers and pointers, which may be null.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = bytes;
    header.msg_iovlen = 1;
    if used > 0 {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = used;
    }
    header
}

/// What sendmsg(2) or recvmsg(2) answers; once more if a signal came.
fn transfer(
    number: libc::c_long,
    socket: BorrowedFd<'_>,
    header: &mut libc::msghdr,
    flags: libc::c_int,
) -> io::Result<usize> {
    let arguments = [
        marked::number(socket),
        ptr::from_mut(header) as u64,
        flags.cast_unsigned().into(),
        0,
        0,
    ];
    loop {
        // SAFETY: `header` has been made by `header`: its pointers are to live buffers
        // of the lengths that it has, which the caller may write to.
        match unsafe { marked::call(number, arguments) } {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|n| usize::try_from(n).unwrap_or(0)),
        }
    }
}

/// Sends one packet, waiting for room if the peer doesn't read. Never raises
/// SIGPIPE.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket.as_fd(), bytes, fds, libc::MSG_NOSIGNAL)
}

/// As [`send`], but `WouldBlock` where that would wait.
pub fn send_now(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    send_with(socket.as_fd(), bytes, fds, flags)
}

fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors in a message",
        ));
    }
    let size = (fds.len() * size_of::<RawFd>()) as u32;
    // SAFETY: arithmetic.
    let (space, length) = unsafe { (libc::CMSG_SPACE(size), libc::CMSG_LEN(size)) };
    let used = if fds.is_empty() { 0 } else { space as usize };
    let mut control: Control = [0; 32];
    let mut piece = libc::iovec {
        // Only read (sendmsg(2)).
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut header = header(&mut piece, &mut control, used);
    if used > 0 {
        // SAFETY: `control` has room for one header and MAX_FDS descriptors, of which
        // there are no more, and is aligned for the header.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = length as usize;
            let data = libc::CMSG_DATA(first).cast::<RawFd>();
            for (n, fd) in fds.iter().enumerate() {
                data.add(n).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    let sent = transfer(libc::SYS_sendmsg, socket, &mut header, flags)?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives one packet into `buffer`; `None` at the end of the stream. A packet
/// that doesn't fit, or more descriptors than allowed, is an error (and the
/// descriptors are closed). With `wait` false an empty queue is `WouldBlock`.
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    wait: bool,
) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut control: Control = [0; 32];
    let mut piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: arithmetic.
    let space = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
    let mut header = header(&mut piece, &mut control, space);
    let mut flags = libc::MSG_CMSG_CLOEXEC;
    if !wait {
        flags |= libc::MSG_DONTWAIT;
    }
    let bytes = match transfer(libc::SYS_recvmsg, socket.as_fd(), &mut header, flags) {
        // The peer died with our messages unread: the end, all the same.
        Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => return Ok(None),
        other => other?,
    };
    let fds = received(&header);
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "message over the size limit",
        ));
    }
    if bytes == 0 && fds.is_empty() {
        return Ok(None);
    }
    Ok(Some((bytes, fds)))
}

/// The descriptors that came with a message.
fn received(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has written whole headers into the control buffer, of which
    // `header` has the length that is used, and with each SCM_RIGHTS descriptors that
    // are new and nobody else's.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(next).cast::<RawFd>();
                let size = message.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for n in 0..size / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(n).read_unaligned()));
                }
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    fds
}
