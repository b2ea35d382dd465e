//! Sends messages and takes the answers. The kernel answers before the call that
//! sends returns, so nothing here waits.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

use crate::GuardError;
use crate::wire::{DONE, ERROR, Messages, answers};

/// More than the kernel puts into one answer.
const BUFFER: usize = 64 * 1024;
/// More answers than the largest table needs.
const ANSWERS: usize = 1024;

pub struct Socket(OwnedFd);

impl Socket {
    pub fn open() -> Result<Socket, GuardError> {
        let opened = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::NETFILTER),
        );
        match opened {
            Ok(fd) => Ok(Socket(fd)),
            Err(e @ (Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT)) => {
                Err(GuardError::Missing(e.into()))
            }
            Err(e) => Err(GuardError::Io(e.into())),
        }
    }

    fn send(&self, messages: &Messages) -> Result<(), GuardError> {
        let sent = send(&self.0, messages.bytes(), SendFlags::empty()).map_err(io::Error::from)?;
        if sent == messages.bytes().len() {
            Ok(())
        } else {
            Err(GuardError::Unexpected("a part was sent"))
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>, GuardError> {
        loop {
            match recv(&self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((length, _)) => return Ok(Some(length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(GuardError::Io(e.into())),
            }
        }
    }

    /// One transaction: all of it, or an error and nothing.
    pub fn transact(&self, messages: &Messages) -> Result<(), Failed> {
        self.send(messages).map_err(Failed::Other)?;
        let mut buffer = vec![0; BUFFER];
        let mut done = false;
        for _ in 0..ANSWERS {
            let Some(length) = self.receive(&mut buffer).map_err(Failed::Other)? else {
                break;
            };
            for answer in answers(buffer.get(..length).unwrap_or_default()) {
                match answer.error() {
                    Some(0) => done |= answer.number == messages.last(),
                    Some(code) => {
                        return Err(Failed::Refused {
                            what: messages.name(answer.number).to_owned(),
                            code,
                        });
                    }
                    None => {}
                }
            }
        }
        if done {
            Ok(())
        } else {
            Err(Failed::Other(GuardError::Unexpected(
                "the transaction isn't acknowledged",
            )))
        }
    }

    /// Asks for one thing, and takes the kernel's word that it is done.
    pub fn ask(&self, message: &Messages) -> Result<(), GuardError> {
        self.send(message)?;
        let mut buffer = [0; 1024];
        let Some(length) = self.receive(&mut buffer)? else {
            return Err(GuardError::Unexpected("no answer"));
        };
        let said = answers(buffer.get(..length).unwrap_or_default()).find_map(|a| a.error());
        match said {
            Some(0) => Ok(()),
            Some(code) => Err(GuardError::Io(io::Error::from_raw_os_error(code))),
            None => Err(GuardError::Unexpected("an answer to something else")),
        }
    }

    /// Asks for a list; `each` gets the body of each answer.
    pub fn list(
        &self,
        messages: &Messages,
        mut each: impl FnMut(&crate::wire::Answer<'_>),
    ) -> Result<(), GuardError> {
        self.send(messages)?;
        let mut buffer = vec![0; BUFFER];
        for _ in 0..ANSWERS {
            let Some(length) = self.receive(&mut buffer)? else {
                break;
            };
            for answer in answers(buffer.get(..length).unwrap_or_default()) {
                match (answer.kind, answer.error()) {
                    (ERROR | DONE, Some(0) | None) => return Ok(()),
                    (_, Some(code)) => {
                        return Err(GuardError::Io(io::Error::from_raw_os_error(code)));
                    }
                    (_, None) => each(&answer),
                }
            }
        }
        Err(GuardError::Unexpected("a list without an end"))
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> OwnedFd {
        socket.0
    }
}

/// Why a transaction failed.
pub enum Failed {
    /// The kernel refused this message, with this error number.
    Refused {
        what: String,
        code: i32,
    },
    Other(GuardError),
}
