//! The part of D-Bus that three calls to systemd need (D-Bus specification,
//! "Message Protocol" and "Authentication Protocol"), on a socket where systemd
//! itself is the peer. What comes back is bounded in size and in time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

/// Larger messages are read over; nothing we ask for is that large.
const BODY_MAX: usize = 64 << 10;
/// No message of the bus is larger (D-Bus specification: 128 MiB); one that
/// says so is no message.
const MESSAGE_MAX: usize = 128 << 20;
/// Header fields hold a few names.
const FIELDS_MAX: usize = 8 << 10;

const CALL: u8 = 1;
pub(super) const RETURN: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// Values, each aligned to its size from the start of the body.
#[derive(Debug, Default)]
pub(super) struct Body {
    bytes: Vec<u8>,
}

impl Body {
    pub(super) fn align(&mut self, to: usize) {
        while !self.bytes.len().is_multiple_of(to) {
            self.bytes.push(0);
        }
    }

    pub(super) fn bool(&mut self, value: bool) {
        self.u32(value.into());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.align(8);
        self.bytes.extend(value.to_le_bytes());
    }

    /// A string or an object path.
    pub(super) fn string(&mut self, value: &str) {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    pub(super) fn signature(&mut self, value: &str) {
        self.bytes
            .push(u8::try_from(value.len()).unwrap_or(u8::MAX));
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    pub(super) fn bytes(&mut self, value: &[u8]) {
        self.array(1, |body| body.bytes.extend(value));
    }

    /// An array of elements with this alignment.
    pub(super) fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Body)) {
        self.u32(0);
        let length = self.bytes.len() - 4;
        self.align(alignment);
        let start = self.bytes.len();
        fill(self);
        let size = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(length..length + 4) {
            place.copy_from_slice(&size.to_le_bytes());
        }
    }
}

/// Reads values back. Every read is checked: `None` is a peer that talks rubbish.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big_endian: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let part = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn align(&mut self, to: usize) -> Option<()> {
        let rest = self.at % to;
        if rest != 0 {
            self.take(to - rest)?;
        }
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.align(4)?;
        let bytes = self.take(4)?.try_into().ok()?;
        Some(if self.big_endian {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        })
    }

    pub(super) fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        (self.byte()? == 0).then_some(text)
    }

    pub(super) fn signature(&mut self) -> Option<&'a str> {
        let length = self.byte()?.into();
        let text = std::str::from_utf8(self.take(length)?).ok()?;
        (self.byte()? == 0).then_some(text)
    }
}

/// What a message says of itself, and its body.
#[derive(Debug, Default)]
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) reply_to: u32,
    pub(super) member: String,
    pub(super) error: String,
    signature: String,
    body: Vec<u8>,
    big_endian: bool,
}

impl Message {
    /// The body, if it has this signature.
    pub(super) fn body(&self, signature: &str) -> Option<Reader<'_>> {
        (self.signature == signature).then_some(Reader {
            bytes: &self.body,
            at: 0,
            big_endian: self.big_endian,
        })
    }

    /// What an error says, or its name.
    pub(super) fn reason(&self) -> String {
        let text = self
            .signature
            .starts_with('s')
            .then_some(Reader {
                bytes: &self.body,
                at: 0,
                big_endian: self.big_endian,
            })
            .and_then(|mut body| body.string());
        let text = text.filter(|t| !t.is_empty()).unwrap_or(&self.error);
        text.chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(300)
            .collect()
    }

    fn fields(&mut self, fields: &[u8]) -> Option<()> {
        // The array of (byte, variant) begins at offset 16 of the message, a
        // multiple of 8 as its elements want.
        let mut r = Reader {
            bytes: fields,
            at: 0,
            big_endian: self.big_endian,
        };
        while r.at < fields.len() {
            r.align(8)?;
            let field = r.byte()?;
            match (field, r.signature()?) {
                (3, "s") => self.member = r.string()?.to_owned(),
                (4, "s") => self.error = r.string()?.to_owned(),
                (5, "u") => self.reply_to = r.u32()?,
                (8, "g") => self.signature = r.signature()?.to_owned(),
                (_, "s" | "o") => drop(r.string()?),
                (_, "g") => drop(r.signature()?),
                (_, "u") => drop(r.u32()?),
                // Fields that the specification doesn't know yet may be
                // anything; those that are needed come before them.
                _ => break,
            }
        }
        Some(())
    }
}

/// A connection to systemd that is over at a fixed moment.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    until: Instant,
    serial: u32,
}

fn rubbish(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is no D-Bus"))
}

impl Bus {
    /// Connects to `socket` and says who we are (SASL EXTERNAL: the kernel
    /// vouches for the user id).
    pub(super) fn connect(socket: &Path, patience: Duration) -> io::Result<Bus> {
        let fd = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // A full backlog would otherwise make connect(2) wait for ever.
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(patience))?;
        connect(&fd, &SocketAddrUnix::new(socket)?)?;
        let mut bus = Bus {
            stream: fd.into(),
            until: Instant::now() + patience,
            serial: 0,
        };
        let user: String = rustix::process::geteuid()
            .as_raw()
            .to_string()
            .bytes()
            .map(|digit| format!("{digit:02x}"))
            .collect();
        bus.write(format!("\0AUTH EXTERNAL {user}\r\nBEGIN\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            bus.read(&mut byte)?;
            line.extend(byte);
            if line.len() > 256 {
                return Err(rubbish("a greeting of over 256 bytes"));
            }
        }
        if line.starts_with(b"OK") {
            Ok(bus)
        } else {
            Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "systemd doesn't accept our user id",
            ))
        }
    }

    /// Until when this connection may be used.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(bytes).map_err(late)
    }

    fn read(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => into = into.get_mut(count..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(late(e)),
            }
        }
        Ok(())
    }

    /// Calls a method of systemd; returns the call's number.
    pub(super) fn send(
        &mut self,
        (path, interface, member): (&str, &str, &str),
        signature: &str,
        body: &Body,
    ) -> io::Result<u32> {
        self.serial += 1;
        let size = u32::try_from(body.bytes.len()).map_err(io::Error::other)?;
        let mut head = Body {
            // Little-endian, a call, no flags, version 1.
            bytes: vec![b'l', CALL, 0, 1],
        };
        head.u32(size);
        head.u32(self.serial);
        head.array(8, |head| {
            for (field, kind, value) in [
                (1, "o", path),
                (2, "s", interface),
                (3, "s", member),
                (6, "s", "org.freedesktop.systemd1"),
            ] {
                head.align(8);
                head.bytes.push(field);
                head.signature(kind);
                head.string(value);
            }
            if !signature.is_empty() {
                head.align(8);
                head.bytes.push(8);
                head.signature("g");
                head.signature(signature);
            }
        });
        head.align(8);
        head.bytes.extend(&body.bytes);
        self.write(&head.bytes)?;
        Ok(self.serial)
    }

    /// The next message, whatever it is.
    pub(super) fn next(&mut self) -> io::Result<Message> {
        let mut head = [0; 16];
        self.read(&mut head)?;
        let mut message = Message {
            kind: head[1],
            big_endian: head[0] == b'B',
            ..Message::default()
        };
        if !matches!(head[0], b'l' | b'B') || head[3] != 1 {
            return Err(rubbish("the answer"));
        }
        let mut numbers = Reader {
            bytes: &head,
            at: 4,
            big_endian: message.big_endian,
        };
        let mut number = || numbers.u32().and_then(|n| usize::try_from(n).ok());
        let (Some(body), Some(_serial), Some(fields)) = (number(), number(), number()) else {
            return Err(rubbish("the answer"));
        };
        if fields > FIELDS_MAX || body > MESSAGE_MAX {
            return Err(rubbish("a message of that size"));
        }
        let mut space = vec![0; fields.next_multiple_of(8)];
        self.read(&mut space)?;
        space.truncate(fields);
        message
            .fields(&space)
            .ok_or_else(|| rubbish("a message's header"))?;
        if body <= BODY_MAX {
            message.body = vec![0; body];
            let mut bytes = std::mem::take(&mut message.body);
            self.read(&mut bytes)?;
            message.body = bytes;
        } else {
            let mut left = body;
            let mut space = [0; 4096];
            while left > 0 {
                let part = left.min(space.len());
                self.read(space.get_mut(..part).unwrap_or_default())?;
                left -= part;
            }
            message.signature.clear();
        }
        Ok(message)
    }
}

fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_aligned_and_read_back() {
        let mut body = Body::default();
        body.string("ab");
        body.array(8, |b| {
            for name in ["x", "yy"] {
                b.align(8);
                b.string(name);
                b.signature("t");
                b.u64(7);
            }
        });
        body.array(8, |_| {});
        // By hand from the specification: length, text, NUL; array length, then
        // padding to 8 that doesn't count.
        assert_eq!(
            body.bytes.get(..24).unwrap(),
            [
                2, 0, 0, 0, b'a', b'b', 0, 0, 48, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, b'x', 0, 1, b't'
            ]
        );
        let mut r = Reader {
            bytes: &body.bytes,
            at: 0,
            big_endian: false,
        };
        assert_eq!(r.string(), Some("ab"));
        assert_eq!(r.u32(), Some(48));
    }

    #[test]
    fn rubbish_is_never_read_beyond_its_end() {
        for bytes in [
            &b""[..],
            &[255, 255, 255, 255],
            &[3, 0, 0, 0, b'a'],
            &[1, 0, 0, 0, 0xff, 0],
            &[1, 0, 0, 0, b'a', b'b'],
        ] {
            let mut r = Reader {
                bytes,
                at: 0,
                big_endian: false,
            };
            assert_eq!(r.string(), None, "{bytes:?}");
        }
        let mut message = Message::default();
        assert!(message.fields(&[5, 1, b'u', 0, 1, 0]).is_none());
        assert!(
            message
                .fields(&[3, 1, b's', 0, 200, 0, 0, 0, b'x'])
                .is_none()
        );
    }
}
