//! What a learner sees: a few calls of known kinds, addresses and paths.

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendFlags, SocketType, bind, connect, listen, sendmsg_addr,
    sendto, socket,
};

/// Binds `port`, connects to it, sends to the next two; opens, looks at and removes
/// files of /etc, /opt, /tmp, /var, /srv and /mnt. What becomes of it isn't looked at.
pub fn deeds(port: u16) -> io::Result<()> {
    let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let server = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&server, &address(port))?;
    listen(&server, 1)?;
    let client = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let _refused = connect(&client, &address(port));
    let datagrams = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let _refused = sendto(&datagrams, b"x", SendFlags::empty(), &address(port + 1));
    let to = address(port + 2);
    let _refused = sendmsg_addr(
        &datagrams,
        &to,
        &[IoSlice::new(b"x")],
        &mut SendAncillaryBuffer::default(),
        SendFlags::empty(),
    );
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let _none = rustix::fs::openat(CWD, "/etc/none", flags, Mode::empty());
    // From the root, from elsewhere, and from there back.
    rustix::process::chdir("/")?;
    let _none = rustix::fs::openat(CWD, "opt/none", flags, Mode::empty());
    let tmp = rustix::fs::openat(CWD, "/tmp", flags | OFlags::DIRECTORY, Mode::empty())?;
    let _none = rustix::fs::openat(&tmp, "none", flags, Mode::empty());
    rustix::process::chdir("/tmp")?;
    let _none = rustix::fs::openat(CWD, "../var/none", flags, Mode::empty());
    let _none = rustix::fs::statat(CWD, "/srv/none", AtFlags::empty());
    let _none = rustix::fs::unlinkat(CWD, "/mnt/none", AtFlags::empty());
    println!("done");
    Ok(())
}

/// More sorts of calls, ports and directories than anybody keeps.
pub fn many(count: u16) -> io::Result<()> {
    let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    for n in 1..=count {
        let _refused = connect(&socket, &address(n));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let _none = rustix::fs::openat(CWD, format!("/{n}/x"), flags, Mode::empty());
        let _none = rustix::fs::openat(CWD, "/\u{1b}[31m/x", flags, Mode::empty());
        // A request that nobody knows.
        let _invalid = casemate_sys::attempt::number(16, [0, usize::from(n) + 1000, 0]);
    }
    println!("done");
    Ok(())
}

/// Nanoseconds of calls of several sorts, each the median of many: one that nobody
/// asks about, one without pointers, one with a path.
pub fn price() -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let zero = rustix::fs::openat(CWD, "/dev/zero", flags, Mode::empty())?;
    let mut buffer = [0; 1];
    let read = median(|| rustix::io::read(&zero, &mut buffer).map(drop))?;
    let mut buffer = [0; 1];
    let pread = median(|| rustix::io::pread(&zero, &mut buffer, 0).map(drop))?;
    let open = median(|| rustix::fs::openat(CWD, "/etc/passwd", flags, Mode::empty()).map(drop))?;
    println!("{read} {pread} {open}");
    Ok(())
}

fn median(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<u128> {
    let mut times = Vec::new();
    for _ in 0..10_000 {
        let begun = Instant::now();
        call()?;
        times.push(begun.elapsed().as_nanos());
    }
    times.sort_unstable();
    Ok(times.get(times.len() / 2).copied().unwrap_or(0))
}
