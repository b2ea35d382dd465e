//! `checks reach`: what can be reached by making the calls, with every argument that
//! counts. A line for each that got past whatever refuses: kind, tab, name.
//!
//! Of what is refused nothing is told apart: a filter, a capability that is missing
//! and a kernel that has no such thing are one. So it can be counted beside another
//! runtime on the same kernel. Not for a host's root: some requests, let through with
//! every capability, would act.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use casemate_sys::attempt::{self, Arg};
use casemate_sys::process::{self, Fork};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily as Family, SocketType as Type, ipproto};
use rustix::pty::OpenptFlags;

/// What headers of Linux name: kind, name, number.
const REQUESTS: &str = include_str!("../../../../seccomp-profiles/tests/data/requests.txt");

/// Numbers of socket families and of netlink's protocols.
const FAMILIES: usize = 46;
const NETLINK: usize = 32;
const AF_NETLINK: usize = 16;

/// Kinds of namespaces, CLONE_NEW*.
const NAMESPACES: [(&str, usize); 8] = [
    ("time", 0x80),
    ("mount", 0x2_0000),
    ("cgroup", 0x200_0000),
    ("uts", 0x400_0000),
    ("ipc", 0x800_0000),
    ("user", 0x1000_0000),
    ("pid", 0x2000_0000),
    ("network", 0x4000_0000),
];

fn requests() -> impl Iterator<Item = (&'static str, &'static str, usize)> {
    let lines = REQUESTS.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| {
        let (rest, number) = line.rsplit_once(" 0x")?;
        let (kind, name) = rest.rsplit_once(' ')?;
        Some((kind, name, usize::from_str_radix(number, 16).ok()?))
    })
}

/// Past all that refuses.
fn passed(result: io::Result<(i64, Vec<Vec<u8>>)>) -> bool {
    match result {
        Ok(_) => true,
        Err(error) => !matches!(
            Errno::from_io_error(&error),
            None | Some(
                Errno::PERM
                    | Errno::ACCESS
                    | Errno::NOSYS
                    | Errno::NOTTY
                    | Errno::NOPROTOOPT
                    | Errno::OPNOTSUPP
                    | Errno::AFNOSUPPORT
                    | Errno::PROTONOSUPPORT
                    | Errno::SOCKTNOSUPPORT
            )
        ),
    }
}

fn tell(kind: &str, name: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{kind}\t{name}")
}

fn number(fd: &OwnedFd) -> Arg<'static> {
    Arg::Int(usize::try_from(fd.as_raw_fd()).unwrap_or(usize::MAX))
}

/// Whether it succeeds in a process of its own, in time.
fn apart(what: impl FnOnce() -> bool) -> io::Result<bool> {
    match process::fork()? {
        Fork::Child => process::exit_now(if what() { 0 } else { 1 }),
        Fork::Parent(_, child) => {
            if !super::ends(&child)? {
                process::signal(&child, 9)?;
                // It waits for something: behind all that could have refused it.
                process::wait(&child)?;
                return Ok(true);
            }
            Ok(process::wait(&child)?.status == 0)
        }
    }
}

fn socket(family: usize, kind: usize, protocol: usize) -> io::Result<bool> {
    let args = [family, kind, protocol].map(Arg::Int);
    apart(|| attempt::raw("socket", &args).is_ok())
}

/// One of each sort that every container can have. No random device: that one answers
/// EINVAL to any request.
struct Things {
    sockets: Vec<OwnedFd>,
    others: Vec<OwnedFd>,
}

impl Things {
    fn new() -> io::Result<Self> {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        rustix::pty::unlockpt(&master)?;
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let open = |path: &str, flags| {
            rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
        };
        let slave = name.to_str().map_err(io::Error::other)?;
        let (ro, rw) = (OFlags::RDONLY, OFlags::RDWR);
        let (reader, writer) = rustix::pipe::pipe()?;
        let others = vec![
            open(slave, rw | OFlags::NOCTTY)?,
            master,
            open("/tmp/reach", rw | OFlags::CREATE)?,
            open("/tmp", ro)?,
            open("/bin/checks", ro)?,
            open("/bin", ro)?,
            open("/proc/self/stat", ro)?,
            open("/dev/null", rw)?,
            open("/dev/zero", rw)?,
            reader,
            writer,
        ];
        let mut sockets = Vec::new();
        for (family, kind, protocol) in [
            (Family::INET, Type::STREAM, None),
            (Family::INET, Type::DGRAM, None),
            (Family::INET6, Type::STREAM, None),
            (Family::INET6, Type::DGRAM, None),
            (Family::UNIX, Type::STREAM, None),
            (Family::UNIX, Type::DGRAM, None),
            (Family::NETLINK, Type::RAW, None),
            // Not in strict.
            (Family::INET, Type::DGRAM, Some(ipproto::ICMP)),
        ] {
            sockets.extend(rustix::net::socket(family, kind, protocol).ok());
        }
        for socket in &sockets {
            rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok(Self { sockets, others })
    }

    fn takes_option(&self, level: usize, option: usize) -> io::Result<bool> {
        let set = |socket: &OwnedFd| {
            let value = [0; 4];
            let args = [
                number(socket),
                Arg::Int(level),
                Arg::Int(option),
                Arg::Bytes(&value),
                Arg::Int(value.len()),
            ];
            passed(attempt::raw("setsockopt", &args))
        };
        apart(|| self.sockets.iter().any(set))
    }

    fn takes_request(&self, request: usize) -> io::Result<bool> {
        let ask = |fd: &OwnedFd| {
            let args = [number(fd), Arg::Int(request), Arg::Null];
            passed(attempt::raw("ioctl", &args))
        };
        apart(|| self.others.iter().chain(&self.sockets).any(ask))
    }
}

/// Says all that is reached.
pub fn run() -> io::Result<()> {
    for family in 0..FAMILIES {
        for kind in [1, 2, 3, 5] {
            if socket(family, kind, 0)? {
                tell("family", &family.to_string())?;
                break;
            }
        }
    }
    for protocol in 0..NETLINK {
        if socket(AF_NETLINK, 3, protocol)? {
            tell("netlink", &protocol.to_string())?;
        }
    }
    let things = Things::new()?;
    for (kind, name, request) in requests() {
        let (reached, kind, name) = match kind.strip_prefix("option ") {
            Some(level) => {
                let at = level.parse().map_err(io::Error::other)?;
                let reached = things.takes_option(at, request)?;
                (reached, "option", format!("{level} {name}"))
            }
            None => (things.takes_request(request)?, kind, name.to_owned()),
        };
        if reached {
            tell(kind, &name)?;
        }
    }
    for (name, flag) in NAMESPACES {
        // clone(2) without a stack is a fork, whose child says as its parent. Its lowest
        // byte is a signal, so it makes no namespace of times.
        let cloned = [flag | 17, 0, 0, 0, 0].map(Arg::Int);
        if apart(|| attempt::raw("unshare", &[Arg::Int(flag)]).is_ok())?
            || flag > 0xff && apart(|| attempt::raw("clone", &cloned).is_ok())?
        {
            tell("namespace", name)?;
        }
    }
    tell("end", "")
}
