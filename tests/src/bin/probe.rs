//! The program that tests run inside containers: it says what a workload sees,
//! in a form that can be compared.

use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

#[path = "../probe/attack.rs"]
mod attack;
#[path = "../probe/enter.rs"]
mod enter;
#[path = "../probe/learned.rs"]
mod learned;
#[path = "../probe/ports.rs"]
mod ports;
#[path = "../probe/refused.rs"]
mod refused;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    obey(&words)
}

fn obey(words: &[&str]) -> ExitCode {
    let done = match words {
        ["exit", code] => return ExitCode::from(code.parse().unwrap_or(125)),
        ["sleep"] => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
        ["burst", bytes] => burst(bytes.parse().unwrap_or(0)),
        ["tree", root] => tree(Path::new(root)),
        ["fds"] => fds(),
        ["dial", path] => dial(path),
        ["chmod", mode, path] => chmod(mode, path),
        ["lines", n, pause_ms] => lines(n.parse().unwrap_or(0), pause_ms.parse().unwrap_or(0)),
        ["enter", kinds, pid, then @ ..] => match enter::run(kinds, pid, || obey(then)) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        ["flags", paths @ ..] => attack::flags(paths),
        ["clone-flags", paths @ ..] => attack::clone_flags(paths),
        ["show", paths @ ..] => attack::show(paths),
        ["unmount", paths @ ..] => attack::unmount(paths),
        ["make"] => attack::make(),
        ["namespaces"] => attack::namespaces(),
        ["calls"] => attack::calls(),
        ["call", name] => return ExitCode::from(attack::call(name)),
        ["refused", count, names @ ..] => refused::each(count.parse().unwrap_or(1), names),
        ["refused-time", count] => refused::time(count.parse().unwrap_or(1)),
        ["refused-sorts", count] => refused::sorts(count.parse().unwrap_or(1)),
        ["refused-numbers", numbers @ ..] => refused::numbers(numbers),
        ["forkers", mark] => refused::forkers(0, true, mark.parse().unwrap_or(0)),
        ["forker", place, mark] => {
            let place = place.parse().unwrap_or(usize::MAX - 1);
            refused::forkers(place, false, mark.parse().unwrap_or(0))
        }
        ["deeds", port] => learned::deeds(port.parse().unwrap_or(1)),
        ["price"] => learned::price(),
        ["many", count] => learned::many(count.parse().unwrap_or(1)),
        ["processes", pids @ ..] => attack::processes(pids),
        ["reach", limit] => attack::reach(limit.parse().unwrap_or(0)),
        ["listen", name] => attack::listen(name),
        ["connect", name] => attack::connect(name),
        ["drive", path] => attack::drive(path),
        ["read", path] => read(path),
        // Needs CAP_NET_ADMIN over the network namespace.
        ["loopback"] => casemate_sys::namespace::loopback_up(),
        ["ping", address] => ping(address),
        ["exchange", one, other] => exchange(one, other),
        ["udp", to] => udp(to),
        ["ports", words @ ..] => ports::each(words),
        // As an attacker would: puts an empty table in the guard's place.
        ["unguard"] => casemate_netguard::install(&casemate_netguard::Rules::default())
            .map(drop)
            .map_err(io::Error::other),
        ["hook", path, then @ ..] => match hook(path) {
            Ok(()) => return obey(then),
            Err(error) => Err(error),
        },
        ["clocks"] => clocks(),
        [] => return ExitCode::SUCCESS,
        _ => Err(io::Error::other(format!("unknown words {words:?}"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::from(1)
        }
    }
}

/// Exchanges two names as often as it can.
fn exchange(one: &str, other: &str) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    println!("exchanging");
    loop {
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?;
    }
}

/// Sends one datagram.
fn udp(to: &str) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    socket.send_to(b"question", to).map(|_| ())
}

/// Writes that many bytes, a counter in every 8, and ends at once.
fn burst(bytes: u64) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    for n in 0..bytes / 8 {
        out.write_all(&n.to_le_bytes())?;
    }
    out.flush()
}

/// Writes numbered lines, one every so many milliseconds.
fn lines(n: u32, pause_ms: u64) -> io::Result<()> {
    for i in 1..=n {
        writeln!(io::stdout(), "line {i}")?;
        std::thread::sleep(Duration::from_millis(pause_ms));
    }
    Ok(())
}

/// One line a file: path, type, mode, uid, gid, size, links, target or content
/// sum, attributes. Other file systems are not entered.
fn tree(root: &Path) -> io::Result<()> {
    let device = fs::symlink_metadata(root)?.dev();
    let mut lines = Vec::new();
    walk(root, device, &mut lines)?;
    lines.sort();
    let mut out = BufWriter::new(io::stdout().lock());
    for line in lines {
        writeln!(out, "{line}")?;
    }
    out.flush()
}

fn walk(path: &Path, device: u64, lines: &mut Vec<String>) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.dev() != device {
        return Ok(());
    }
    let kind = meta.file_type();
    let letter = match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () => 'f',
    };
    let extra = match letter {
        'l' => fs::read_link(path)?.display().to_string(),
        // A file that the mode bits close to us is compared by its metadata.
        'f' => {
            fs::read(path).map_or_else(|e| e.kind().to_string(), |b| format!("{:016x}", fnv(&b)))
        }
        'c' | 'b' => format!("{:x}", meta.rdev()),
        _ => String::new(),
    };
    // A directory's size is the file system's affair.
    let size = if letter == 'd' { 0 } else { meta.size() };
    let links = if letter == 'd' { 0 } else { meta.nlink() };
    lines.push(format!(
        "{} {letter} {:04o} {}:{} size={size} links={links} {extra} {}",
        path.display(),
        meta.mode() & 0o7777,
        meta.uid(),
        meta.gid(),
        attributes(path)
    ));
    if letter == 'd' {
        for entry in fs::read_dir(path)? {
            walk(&entry?.path(), device, lines)?;
        }
    }
    Ok(())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn attributes(path: &Path) -> String {
    let mut names = vec![0u8; 65536];
    let Ok(length) = rustix::fs::llistxattr(path, names.as_mut_slice()) else {
        return "xattrs=none".to_owned();
    };
    let mut found: Vec<String> = names[..length]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0u8; 65536];
            let name = std::ffi::OsStr::from_bytes(name);
            let read = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap_or(0);
            format!("{}={:02x?}", name.display(), &value[..read])
        })
        .collect();
    found.sort();
    format!("xattrs={}", found.join(","))
}

/// Numbers and targets of the open descriptors, the listing's own left out.
fn fds() -> io::Result<()> {
    let mut lines: Vec<String> = fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            let own = target.starts_with("/proc") && target.ends_with("fd");
            (!own).then(|| format!("{} {}", entry.file_name().display(), target.display()))
        })
        .collect();
    lines.sort();
    println!("{}", lines.join("\n"));
    Ok(())
}

/// Connects to a unix socket and says whether the other side keeps it open.
fn dial(path: &str) -> io::Result<()> {
    let mut socket = std::os::unix::net::UnixStream::connect(path)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    // A whole, valid ttrpc header of a request without a body.
    let mut buffer = [0; 10];
    let answer = socket
        .write_all(&[0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
        .and_then(|()| socket.read(&mut buffer));
    match answer {
        Ok(0) => println!("closed"),
        Ok(_) => println!("answered"),
        Err(e) => match e.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => println!("closed"),
            _ => println!("open: {e}"),
        },
    }
    Ok(())
}

/// One echo request from an unprivileged ICMP socket (icmp(7)), and its answer.
fn ping(address: &str) -> io::Result<()> {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
    let address: std::net::Ipv4Addr = address.parse().map_err(io::Error::other)?;
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP))?;
    sockopt::set_socket_timeout(
        &socket,
        sockopt::Timeout::Recv,
        Some(Duration::from_secs(10)),
    )?;
    // Type 8, echo; the kernel fills in checksum and identifier.
    let request = [8, 0, 0, 0, 0, 0, 0, 1, b'h', b'i'];
    let to = std::net::SocketAddrV4::new(address, 0);
    rustix::net::sendto(&socket, &request, SendFlags::empty(), &to)?;
    let mut answer = [0; 64];
    let (_, length, _) = rustix::net::recvfrom(&socket, &mut answer, RecvFlags::empty())?;
    if length != request.len() || answer[0] != 0 {
        return Err(io::Error::other(format!("answer {:?}", &answer[..length])));
    }
    println!("answered");
    Ok(())
}

/// Copies a file to standard output.
fn read(path: &str) -> io::Result<()> {
    io::stdout().write_all(&fs::read(path)?)
}

/// As an OCI hook: writes down, in one line of JSON at the end of `path`, what it
/// was given and where it runs.
fn hook(path: &str) -> io::Result<()> {
    let mut input = String::new();
    io::stdin().read_to_string(&mut input)?;
    let namespaces = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup"].map(|kind| {
        let link = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
        format!("{kind:?}: \"{}\"", link.display())
    });
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    // Asked of the kernel: proc is not for every hook to read.
    let caps = rustix::thread::capabilities(None).map_or(0, |sets| sets.effective.bits());
    let locks = (
        rustix::thread::no_new_privs()?,
        rustix::thread::secure_computing_mode().map_or(0, |mode| mode as i32),
    );
    let words: Vec<String> = std::env::args().collect();
    let variables: Vec<String> = std::env::vars().map(|(k, v)| format!("{k}={v}")).collect();
    let cwd = std::env::current_dir().unwrap_or_default();
    let mut file = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)?;
    writeln!(
        file,
        "{{{}, \"args\": {words:?}, \"env\": {variables:?}, \"cwd\": {:?}, \"status\": {status:?}, \"caps\": {caps}, \"no_new_privs\": {}, \"seccomp\": {}, \
         \"sees\": {:?}, \"state\": {}}}",
        namespaces.join(", "),
        cwd.display().to_string(),
        locks.0,
        locks.1,
        names("/"),
        if input.is_empty() { "null" } else { &input },
    )
}

/// What is in a directory; nothing if it can't be read.
fn names(path: &str) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Seconds of the clocks that a time namespace can shift.
fn clocks() -> io::Result<()> {
    use rustix::time::{ClockId, clock_gettime};
    for (name, id) in [
        ("monotonic", ClockId::Monotonic),
        ("boottime", ClockId::Boottime),
        ("realtime", ClockId::Realtime),
    ] {
        println!("{name} {}", clock_gettime(id).tv_sec);
    }
    Ok(())
}

fn chmod(mode: &str, path: &str) -> io::Result<()> {
    let mode = u32::from_str_radix(mode, 8).map_err(io::Error::other)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}
