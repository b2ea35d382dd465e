//! Packets and sealed plans.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use casemate_sys::message;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{MAX_PACKET, MAX_PLAN};

/// Why a message didn't get through.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The socket itself.
    #[error("channel: {0}")]
    Io(#[from] io::Error),
    /// Not one of the messages of this protocol.
    #[error("malformed message: {0}")]
    Malformed(#[from] postcard::Error),
    /// Over a limit.
    #[error("{what} of {size} bytes, limit {limit}")]
    TooLarge {
        /// Message or plan.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
}

/// One end of a channel.
pub struct Channel(OwnedFd);

impl Channel {
    /// Wraps one end of a SEQPACKET pair.
    pub fn new(fd: OwnedFd) -> Channel {
        Channel(fd)
    }

    /// Sends a message with descriptors.
    pub fn send<M: Serialize>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TransportError> {
        Ok(message::send(&self.0, &packet(message)?, fds)?)
    }

    /// As [`Channel::send`], but an error of kind `WouldBlock` rather than a
    /// wait where the peer has stopped to read: for the shim, which must not
    /// wait for anybody inside.
    pub fn send_now<M: Serialize>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TransportError> {
        Ok(message::send_now(&self.0, &packet(message)?, fds)?)
    }

    /// Receives a message; `None` when the peer is gone. With `wait` false, an
    /// empty channel is an error of kind `WouldBlock`.
    pub fn receive<M: DeserializeOwned>(
        &self,
        wait: bool,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, TransportError> {
        let mut buffer = [0u8; MAX_PACKET];
        let Some((size, fds)) = message::receive(&self.0, &mut buffer, wait)? else {
            return Ok(None);
        };
        let (value, rest) = postcard::take_from_bytes(&buffer[..size])?;
        if !rest.is_empty() {
            return Err(postcard::Error::DeserializeBadEncoding.into());
        }
        Ok(Some((value, fds)))
    }
}

fn packet<M: Serialize>(message: &M) -> Result<Vec<u8>, TransportError> {
    let bytes = postcard::to_stdvec(message)?;
    if bytes.len() > MAX_PACKET {
        return Err(TransportError::TooLarge {
            what: "message",
            size: bytes.len() as u64,
            limit: MAX_PACKET as u64,
        });
    }
    Ok(bytes)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Puts a plan into a memfd that nobody can change any more.
pub fn seal_plan<P: Serialize>(plan: &P) -> Result<OwnedFd, TransportError> {
    let bytes = postcard::to_stdvec(plan)?;
    if bytes.len() as u64 > MAX_PLAN {
        return Err(TransportError::TooLarge {
            what: "plan",
            size: bytes.len() as u64,
            limit: MAX_PLAN,
        });
    }
    let fd = rustix::fs::memfd_create(
        "casemate-plan",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(io::Error::from)?;
    let mut file = File::from(fd);
    file.write_all(&bytes)?;
    let fd = OwnedFd::from(file);
    rustix::fs::fcntl_add_seals(
        &fd,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )
    .map_err(io::Error::from)?;
    Ok(fd)
}

/// Reads a plan back.
pub fn read_plan<P: DeserializeOwned>(fd: OwnedFd) -> Result<P, TransportError> {
    let mut file = File::from(fd);
    // fstat(2): the standard library would take statx(2), which a profile may refuse.
    let size = rustix::fs::fstat(&file)
        .map_err(std::io::Error::from)?
        .st_size as u64;
    if size > MAX_PLAN {
        return Err(TransportError::TooLarge {
            what: "plan",
            size,
            limit: MAX_PLAN,
        });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    file.rewind()?;
    file.take(MAX_PLAN).read_to_end(&mut bytes)?;
    Ok(postcard::from_bytes(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FromForker, ToForker};

    fn channels() -> (Channel, Channel) {
        let (a, b) = message::pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = channels();
        let file = File::open("/dev/null").unwrap();
        a.send(
            &ToForker::Spawn {
                key: 7,
                parked: true,
            },
            &[file.as_fd(), file.as_fd()],
        )
        .unwrap();
        let (message, fds) = b.receive::<ToForker>(true).unwrap().unwrap();
        assert!(matches!(
            message,
            ToForker::Spawn {
                key: 7,
                parked: true
            }
        ));
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn garbage_trailing_bytes_and_oversize_are_errors_and_not_panics() {
        let (a, b) = channels();
        for bytes in [
            &[0xffu8; 40][..],
            &[3, 1, 1, 9, 9, 9][..],
            &[0u8; 20 * 1024][..],
        ] {
            message::send(&a, bytes, &[]).unwrap();
            assert!(b.receive::<FromForker>(true).is_err());
        }
    }

    #[test]
    fn a_peer_that_does_not_read_is_an_error_and_not_a_wait() {
        let (a, _b) = channels();
        let mut sent = 0;
        let error = loop {
            match a.send_now(&ToForker::Go { key: 1 }, &[]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(sent > 10);
        assert!(
            matches!(&error, TransportError::Io(e) if e.kind() == io::ErrorKind::WouldBlock),
            "{error}"
        );
    }

    #[test]
    fn the_end_of_the_peer_is_not_an_error() {
        let (a, b) = channels();
        drop(a);
        assert!(b.receive::<FromForker>(true).unwrap().is_none());
    }

    #[test]
    fn a_plan_survives_and_is_sealed() {
        let fd = seal_plan(&vec!["x".repeat(100_000)]).unwrap();
        let copy = fd.try_clone().unwrap();
        assert!(File::from(copy).write_all(b"no").is_err());
        let back: Vec<String> = read_plan(fd).unwrap();
        assert_eq!(back[0].len(), 100_000);
    }
}
