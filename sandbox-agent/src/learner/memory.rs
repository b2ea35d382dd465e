//! What pointers of a waiting call lead to. The caller's memory says anything: what is
//! read of it is short, and checked.

use std::os::fd::OwnedFd;

use casemate_protocol::MAX_DIRECTORY;
use rustix::fs::{CWD, Mode, OFlags};

/// Longest beginning of a path that is looked at.
const PATH: usize = 128;
/// AF_INET and AF_INET6.
const INTERNET: [u16; 2] = [2, 10];

/// The beginning of a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Path {
    /// Absolute, below this directory of the root; the root itself is "".
    Below(String),
    /// Not absolute.
    Relative,
    /// Absolute, with a name that can't be told: too long, or no text.
    Odd,
}

/// Why nothing was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// Who asks is the forker, or a child of it before its execve: no program of the
    /// container's.
    Runtime,
    /// There is nothing at that address, or the memory can't be looked at.
    Nothing,
}

/// Reads callers' memory.
pub struct Reader {
    /// The name of the agent's process, which its children have until they take
    /// another one.
    runtime: Vec<u8>,
}

impl Reader {
    /// `runtime` is the name of the agent's process.
    pub fn new(runtime: &[u8]) -> Reader {
        Reader {
            runtime: runtime.to_owned(),
        }
    }

    /// What is there, as far as there is something.
    fn read<'a>(&self, pid: u32, address: u64, into: &'a mut [u8]) -> Result<&'a [u8], Unread> {
        if pid == 0 {
            return Err(Unread::Nothing);
        }
        let Ok(memory) = open(&format!("/proc/{pid}/mem")) else {
            return Err(self.why(pid));
        };
        match rustix::io::pread(&memory, &mut *into, address) {
            Ok(length) if length > 0 => into.get(..length).ok_or(Unread::Nothing),
            _ => Err(Unread::Nothing),
        }
    }

    /// Memory of the runtime's own is A's, and out of reach. (So is that of a program
    /// whose file nobody may read. It could give itself that name, and not be counted.)
    fn why(&self, pid: u32) -> Unread {
        let mut name = [0; 17];
        let read = open(&format!("/proc/{pid}/comm"))
            .and_then(|file| rustix::io::pread(&file, &mut name, 0));
        let name = read.ok().and_then(|length| name.get(..length));
        match name.and_then(|name| name.strip_suffix(b"\n")) {
            Some(name) if name == self.runtime => Unread::Runtime,
            _ => Unread::Nothing,
        }
    }

    /// The path at `address`.
    pub fn path(&self, pid: u32, address: u64) -> Result<Path, Unread> {
        let mut buffer = [0; PATH];
        self.read(pid, address, &mut buffer).map(parse_path)
    }

    /// The port of the internet socket address at `address`; 0 for one of another
    /// family.
    pub fn port(&self, pid: u32, address: u64) -> Result<u16, Unread> {
        let mut buffer = [0; 4];
        let [f0, f1, p0, p1] = *self.read(pid, address, &mut buffer)? else {
            return Err(Unread::Nothing);
        };
        let is_internet = INTERNET.contains(&u16::from_ne_bytes([f0, f1]));
        Ok(match is_internet {
            true => u16::from_be_bytes([p0, p1]),
            false => 0,
        })
    }
}

fn open(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    // openat(2), of which the learner's filter lets this form alone pass.
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

fn parse_path(bytes: &[u8]) -> Path {
    let end = bytes.iter().position(|byte| *byte == 0);
    let whole = end.is_some();
    let bytes = end.map_or(bytes, |end| &bytes[..end]);
    if bytes.first() != Some(&b'/') {
        return Path::Relative;
    }
    let mut parts = bytes.split(|byte| *byte == b'/').peekable();
    while let Some(part) = parts.next() {
        // The last one may have been cut.
        let is_complete = whole || parts.peek().is_some();
        match part {
            // Nothing is above the root.
            b"" | b"." | b".." if is_complete => {}
            _ if !is_complete || part.len() > MAX_DIRECTORY => return Path::Odd,
            _ => {
                let text = std::str::from_utf8(part).ok();
                let text = text.filter(|text| !text.chars().any(char::is_control));
                return text.map_or(Path::Odd, |text| Path::Below(text.to_owned()));
            }
        }
    }
    Path::Below(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(name: &str) -> Path {
        Path::Below(name.to_owned())
    }

    #[test]
    fn the_first_directory_of_a_path_is_found() {
        for (text, wanted) in [
            (&b"/etc/passwd\0junk"[..], below("etc")),
            (b"/etc\0", below("etc")),
            (b"//etc//x\0", below("etc")),
            (b"/./../usr/lib\0", below("usr")),
            (b"/\0", below("")),
            (b"/..\0", below("")),
            (b"etc/passwd\0", Path::Relative),
            (b"\0", Path::Relative),
            (b"", Path::Relative),
            (b"./etc\0", Path::Relative),
            (b"/caf\xc3\xa9/x\0", below("caf\u{e9}")),
        ] {
            assert_eq!(parse_path(text), wanted, "{text:?}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_odd() {
        let long = [&b"/"[..], &[b'x'; 64], b"/y\0"].concat();
        let cut = [&b"/"[..], &[b'x'; 20]].concat();
        let slashes = [b'/'; PATH];
        for text in [
            &b"/\xff\xfe/x\0"[..],
            b"/a\x1b[31m/x\0",
            b"/a\nb/x\0",
            &long,
            &cut,
            &slashes,
        ] {
            assert_eq!(parse_path(text), Path::Odd, "{text:?}");
        }
    }

    #[test]
    fn memory_is_read_as_far_as_it_goes() {
        let me = std::process::id();
        let reader = Reader::new(b"casemate-agent");
        let path = |pid, address| reader.path(pid, address);
        let port = |pid, address| reader.port(pid, address);
        let name = c"/srv/www/index.html";
        assert_eq!(path(me, name.as_ptr() as u64), Ok(below("srv")));
        let address = [2u16.to_ne_bytes(), 8080u16.to_be_bytes()].concat();
        assert_eq!(port(me, address.as_ptr() as u64), Ok(8080));
        let unix = [1u16.to_ne_bytes(), *b"/r"].concat();
        assert_eq!(port(me, unix.as_ptr() as u64), Ok(0));
        for nowhere in [0, 1, u64::MAX, 1 << 63, 0x7fff_ffff_f000] {
            assert_eq!(path(me, nowhere), Err(Unread::Nothing), "{nowhere:x}");
            assert_eq!(port(me, nowhere), Err(Unread::Nothing), "{nowhere:x}");
        }
        assert_eq!(path(0, name.as_ptr() as u64), Err(Unread::Nothing));
    }
}
