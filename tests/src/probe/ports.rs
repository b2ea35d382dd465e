//! TCP's ports: what can be connected to and listened on.

use std::io;
use std::net::SocketAddr;

use rustix::net::{AddressFamily, SendFlags, SocketType, bind, connect, ipproto, sendto, socket};

/// `MSG_FASTOPEN`: connects with the first packet.
const FASTOPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);

/// Does each, as `connect:127.0.0.1:80`; prints it and 0 or the error's number.
pub fn each(words: &[&str]) -> io::Result<()> {
    for word in words {
        let (how, address) = word.split_once(':').unwrap_or((word, ""));
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        let answer = one(how, &address)?.map_or_else(rustix::io::Errno::raw_os_error, |()| 0);
        println!("{word} {answer}");
    }
    Ok(())
}

fn one(how: &str, address: &SocketAddr) -> io::Result<rustix::io::Result<()>> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let protocol = (how == "mptcp").then_some(ipproto::MPTCP);
    let socket = match socket(family, SocketType::STREAM, protocol) {
        Ok(socket) => socket,
        Err(error) => return Ok(Err(error)),
    };
    match how {
        "mptcp" => Ok(connect(&socket, address)),
        "connect" => Ok(connect(&socket, address)),
        "bind" => Ok(bind(&socket, address)),
        "fastopen" => Ok(sendto(&socket, b"x", FASTOPEN, address).map(|_| ())),
        _ => Err(io::Error::other(format!("unknown word {how}"))),
    }
}
