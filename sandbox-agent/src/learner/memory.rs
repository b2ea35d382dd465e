//! What pointers of a waiting call lead to. The caller's memory says anything: what is
//! read of it is short, and checked.

use std::os::fd::OwnedFd;

use casemate_protocol::MAX_DIRECTORY;
use rustix::fs::{CWD, Mode, OFlags};

/// Longest beginning of a path that is looked at.
const PATH: usize = 128;
/// What stands for the working directory in place of a descriptor.
const AT_CWD: i32 = -100;
/// Messages of one call that are looked at.
const MESSAGES: usize = 8;
/// Length of a `struct mmsghdr`; it begins with a `struct msghdr`.
const MESSAGE: usize = 64;
/// Shortest address with a port.
pub const SHORTEST: u64 = 4;
/// AF_INET and AF_INET6.
const INTERNET: [u16; 2] = [2, 10];

/// The beginning of a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Path {
    /// Below this directory of the root; the root itself is "".
    Below(String),
    /// None: empty, or of something that is no directory.
    Nowhere,
    /// With a name that can't be told: too long, or no text.
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

    /// The path at `address`, which starts from this descriptor if it is relative;
    /// from the working directory without one.
    pub fn path(&self, pid: u32, address: u64, start: Option<i32>) -> Result<Path, Unread> {
        let mut buffer = [0; PATH];
        let path = self.read(pid, address, &mut buffer)?;
        match path.first() {
            None | Some(0) => return Ok(Path::Nowhere),
            Some(b'/') => return Ok(parse_path(&[], path)),
            Some(_) => {}
        }
        let start = match start {
            None | Some(AT_CWD) => format!("/proc/{pid}/cwd"),
            Some(fd) => format!("/proc/{pid}/fd/{fd}"),
        };
        let mut buffer = [0; PATH];
        // No such descriptor, mostly: the call will say so.
        let length = rustix::fs::readlinkat_raw(CWD, &start, &mut buffer).unwrap_or(0);
        Ok(match buffer.get(..length) {
            Some(start @ [b'/', ..]) => parse_path(start, path),
            _ => Path::Nowhere,
        })
    }

    /// Ports of the messages at `address`, of which there are this many, with 0 for
    /// each that names none. Of many the first few are looked at.
    pub fn ports_of_messages(
        &self,
        pid: u32,
        address: u64,
        count: usize,
    ) -> Result<Vec<u16>, Unread> {
        let mut buffer = [0; MESSAGES * MESSAGE];
        let wanted = buffer.get_mut(..count.min(MESSAGES) * MESSAGE);
        let read = self.read(pid, address, wanted.unwrap_or_default())?;
        // The last one's length of what was sent, and the padding before it, may lie
        // behind the end.
        let heads = read.chunks(MESSAGE).filter_map(|head| head.first_chunk());
        let ports = heads.map(|head: &[u8; 12]| {
            let (name, length) = head.split_at(8);
            let name = name.try_into().map_or(0, u64::from_ne_bytes);
            let length = length.try_into().map_or(0, u32::from_ne_bytes);
            match name != 0 && u64::from(length) >= SHORTEST {
                true => self.port(pid, name),
                false => Ok(0),
            }
        });
        ports.collect()
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

/// The directory below the root where a path leads that begins so, from a directory
/// whose own path, absolute, begins like `start`; without looking at links.
fn parse_path(start: &[u8], path: &[u8]) -> Path {
    let end = path.iter().position(|byte| *byte == 0);
    let whole = [start.len() < PATH, end.is_some()];
    let path = end.map_or(path, |end| &path[..end]);
    let mut depth = 0_usize;
    let mut top: &[u8] = b"";
    for (text, is_whole) in [start, path].into_iter().zip(whole) {
        let mut parts = text.split(|byte| *byte == b'/').peekable();
        while let Some(part) = parts.next() {
            // The last one may have been cut.
            let is_complete = is_whole || parts.peek().is_some();
            match part {
                b"" | b"." if is_complete => {}
                // Nothing is above the root.
                b".." if is_complete => depth = depth.saturating_sub(1),
                _ if depth == 0 && (!is_complete || part.len() > MAX_DIRECTORY) => {
                    return Path::Odd;
                }
                _ => {
                    if depth == 0 {
                        top = part;
                    }
                    depth += 1;
                }
            }
        }
    }
    if depth == 0 {
        top = b"";
    }
    let text = std::str::from_utf8(top).ok();
    let text = text.filter(|text| !text.chars().any(char::is_control));
    text.map_or(Path::Odd, |text| Path::Below(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn below(name: &str) -> Path {
        Path::Below(name.to_owned())
    }

    #[test]
    fn the_directory_below_the_root_is_found() {
        for (start, text, wanted) in [
            (&b""[..], &b"/etc/passwd\0junk"[..], below("etc")),
            (b"", b"/etc\0", below("etc")),
            (b"", b"//etc//x\0", below("etc")),
            (b"", b"/./../usr/lib\0", below("usr")),
            (b"", b"/etc/../usr/lib\0", below("usr")),
            (b"", b"/etc/x/../../..\0", below("")),
            (b"", b"/\0", below("")),
            (b"", b"/..\0", below("")),
            (b"", b"/caf\xc3\xa9/x\0", below("caf\u{e9}")),
            (b"/", b"etc/passwd\0", below("etc")),
            (b"/", b"./.\0", below("")),
            (b"/srv/www", b"index.html\0", below("srv")),
            (b"/srv/www", b"../../etc/passwd\0", below("etc")),
            (b"/srv/www", b"../x\0", below("srv")),
            (b"/srv", b"../../../var\0", below("var")),
        ] {
            assert_eq!(parse_path(start, text), wanted, "{start:?} {text:?}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_odd() {
        let long = [&b"/"[..], &[b'x'; 64], b"/y\0"].concat();
        let cut = [&b"/"[..], &[b'x'; 20]].concat();
        let cut_start = [&b"/"[..], &[b'x'; PATH - 1]].concat();
        let slashes = [b'/'; PATH];
        for (start, text) in [
            (&b""[..], &b"/\xff\xfe/x\0"[..]),
            (b"", b"/a\x1b[31m/x\0"),
            (b"", b"/a\nb/x\0"),
            (b"", &long),
            (b"", &cut),
            (b"", &slashes),
            (b"/a\x1b[31m", b"x\0"),
            (&cut_start, b"x\0"),
        ] {
            assert_eq!(parse_path(start, text), Path::Odd, "{start:?} {text:?}");
        }
    }

    #[test]
    fn memory_is_read_as_far_as_it_goes() {
        let me = std::process::id();
        let reader = Reader::new(b"casemate-agent");
        let path = |pid, address| reader.path(pid, address, None);
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

    #[test]
    fn relative_paths_start_somewhere() {
        use std::os::fd::AsRawFd;
        let me = std::process::id();
        let reader = Reader::new(b"casemate-agent");
        let name = c"x/y";
        let path = |start| reader.path(me, name.as_ptr() as u64, start);
        let proc = std::fs::File::open("/proc/self").unwrap();
        assert_eq!(path(Some(proc.as_raw_fd())), Ok(below("proc")));
        let here = std::env::current_dir().unwrap();
        let first = here.components().nth(1).unwrap();
        let first = below(first.as_os_str().to_str().unwrap());
        assert_eq!(path(None), Ok(first));
        assert_eq!(path(Some(AT_CWD)), path(None));
        let (pipe, _other) = std::io::pipe().unwrap();
        for none in [i32::MAX, -1, i32::MIN, pipe.as_raw_fd()] {
            assert_eq!(path(Some(none)), Ok(Path::Nowhere), "{none}");
        }
        let empty = reader.path(me, c"".as_ptr() as u64, None);
        assert_eq!(empty, Ok(Path::Nowhere));
    }

    #[test]
    fn messages_are_read_as_far_as_they_go() {
        let me = std::process::id();
        let reader = Reader::new(b"casemate-agent");
        let address = |port: u16| [2u16.to_ne_bytes(), port.to_be_bytes()].concat();
        let (one, two) = (address(53), address(54));
        let message = |name: &[u8], length: u32| {
            let mut message = vec![0xee; MESSAGE];
            message[..8].copy_from_slice(&(name.as_ptr() as u64).to_ne_bytes());
            message[8..12].copy_from_slice(&length.to_ne_bytes());
            message
        };
        let none = [0; MESSAGE].to_vec();
        let all = [message(&one, 16), none, message(&two, 16), message(&two, 2)].concat();
        let ports = |address: u64, count| reader.ports_of_messages(me, address, count);
        let at = all.as_ptr() as u64;
        assert_eq!(ports(at, 1), Ok(vec![53]));
        assert_eq!(ports(at, 4), Ok(vec![53, 0, 54, 0]));
        let many = message(&one, 16).repeat(MESSAGES + 3);
        let at = many.as_ptr() as u64;
        assert_eq!(ports(at, usize::MAX), Ok(vec![53; MESSAGES]));
        assert_eq!(ports(at, 0), Err(Unread::Nothing));
        assert_eq!(ports(1, 1), Err(Unread::Nothing));
        let mut wild = message(&one, 16);
        wild[..8].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert_eq!(ports(wild.as_ptr() as u64, 1), Err(Unread::Nothing));
    }
}
