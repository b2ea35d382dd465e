//! Two pods: one plants what others should not find, the other looks (T19).

use std::io::{self, Write};
use std::time::Duration;

use casemate_sys::attempt::{Arg, raw};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

/// A key of System V IPC out of a name.
fn key(name: &str) -> usize {
    name.bytes()
        .fold(7usize, |sum, b| (sum * 31 + usize::from(b)) & 0x3fff_ffff)
}

fn port(name: &str) -> u16 {
    20_000 + u16::try_from(key(name) % 10_000).unwrap_or(0)
}

fn abstract_name(name: &str) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
}

const MADE: usize = 0o1000 | 0o666;

/// Names the step that failed.
fn step<T>(what: &str, done: io::Result<T>) -> io::Result<T> {
    done.map_err(|e| io::Error::other(format!("{what}: {e}")))
}

/// Plants, says `planted`, and stays.
pub fn plant(name: &str) -> io::Result<()> {
    let id = Arg::Int(key(name));
    let made = Arg::Int(MADE);
    step("shmget", raw("shmget", &[id, Arg::Int(4096), made]))?;
    step("msgget", raw("msgget", &[id, made]))?;
    step("semget", raw("semget", &[id, Arg::Int(1), made]))?;
    // O_RDWR | O_CREAT; the name without its slash, as mq_open(3) passes it.
    let queue = [name.as_bytes(), &[0]].concat();
    let new = [
        Arg::Bytes(&queue),
        Arg::Int(0o102),
        Arg::Int(0o666),
        Arg::Null,
    ];
    step("mq_open", raw("mq_open", &new))?;
    step("/dev/shm", std::fs::write(format!("/dev/shm/{name}"), "x"))?;
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    rustix::net::bind(&socket, &abstract_name(name)?)?;
    rustix::net::listen(&socket, 8)?;
    let listener = std::net::TcpListener::bind(("127.0.0.1", port(name)));
    let _listener = step("listen", listener)?;
    println!("planted");
    io::stdout().flush()?;
    std::thread::sleep(Duration::from_secs(120));
    Ok(())
}

fn say<T>(id: &str, found: io::Result<T>) {
    match found {
        Ok(_) => println!("T19.{id}\tok\t"),
        Err(error) => println!("T19.{id}\trefused {}\t", error.raw_os_error().unwrap_or(0)),
    }
}

/// Looks for what was planted under that name.
pub fn look(name: &str) -> io::Result<()> {
    say(
        "shm",
        raw("shmget", &[Arg::Int(key(name)), Arg::Int(0), Arg::Int(0)]),
    );
    say("msg", raw("msgget", &[Arg::Int(key(name)), Arg::Int(0)]));
    say(
        "sem",
        raw("semget", &[Arg::Int(key(name)), Arg::Int(0), Arg::Int(0)]),
    );
    let queue = [name.as_bytes(), &[0]].concat();
    let opened = [Arg::Bytes(&queue), Arg::Int(0), Arg::Int(0), Arg::Null];
    say("mqueue", raw("mq_open", &opened));
    say("dev-shm", std::fs::metadata(format!("/dev/shm/{name}")));
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    let connected = rustix::net::connect(&socket, &abstract_name(name)?);
    say("abstract-socket", connected.map_err(io::Error::from));
    say(
        "loopback",
        std::net::TcpStream::connect(("127.0.0.1", port(name))),
    );
    Ok(())
}
