//! A user namespace that somebody else made for a pod: looked at, never lived
//! in. What it is said to map is read from the kernel.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use casemate_sys::namespace::{self, kind};
use casemate_sys::process::{self, Fork};
use casemate_sys::{ident, message};
use rustix::fs::{Mode, OFlags};

use super::Step;
use super::ids::CONTAINER_IDS;
use crate::sandbox::SandboxError;

/// Opens the user namespace at `path`, which must map a pod's ids to those of
/// the host from `first`, and nothing else.
pub fn open(path: &str, first: u32) -> Result<OwnedFd, SandboxError> {
    let object = format!("user namespace {path} (linux.namespaces)");
    // Not blocking, whatever it is that stands there.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let namespace = rustix::fs::open(path, flags, Mode::empty()).step("open", &object)?;
    let found = maps(&namespace).step("look into", &object)?;
    let wanted = [0, first, CONTAINER_IDS];
    for (map, name) in found.iter().zip(["uidMappings", "gidMappings"]) {
        if parse(map).as_deref() != Some(&[wanted]) {
            let is: Vec<&str> = map.split_whitespace().collect();
            return Err(SandboxError::Invalid(format!(
                "{object} maps \"{}\", and linux.{name} say \"0 {first} {CONTAINER_IDS}\"; they \
                 must agree",
                is.join(" ")
            )));
        }
    }
    Ok(namespace)
}

/// `uid_map` and `gid_map` of `namespace`, in ids of the host.
///
/// The kernel shows them of a process only, so one is sent in. It runs nothing
/// there, and nobody there may look into it.
fn maps(namespace: &OwnedFd) -> io::Result<[String; 2]> {
    let (ours, theirs) = message::pair()?;
    match process::fork_into(0, None)? {
        Fork::Child => {
            drop(ours);
            let entered = ident::set_dumpable(false)
                .and_then(|()| namespace::enter(namespace, kind::USER))
                .and_then(|()| ident::set_dumpable(false));
            let word = match entered {
                Ok(()) => "in".to_owned(),
                Err(e) => format!("F{e}"),
            };
            if message::send(&theirs, word.as_bytes(), &[]).is_ok() {
                // Until it has been looked at.
                let _ = message::receive(&theirs, &mut [0u8; 4], true);
            }
            process::exit_now(0)
        }
        Fork::Parent(pid, pidfd) => {
            drop(theirs);
            let mut buffer = [0u8; 256];
            let read = match message::receive(&ours, &mut buffer, true) {
                Ok(Some((n, _))) => match buffer.get(..n) {
                    Some(b"in") => {
                        fs::read_to_string(format!("/proc/{pid}/uid_map")).and_then(|uids| {
                            Ok([uids, fs::read_to_string(format!("/proc/{pid}/gid_map"))?])
                        })
                    }
                    word => Err(io::Error::other(
                        String::from_utf8_lossy(word.unwrap_or_default())
                            .trim_start_matches('F')
                            .to_owned(),
                    )),
                },
                Ok(None) => Err(io::Error::other("the helper died")),
                Err(e) => Err(e),
            };
            drop(ours);
            let _ = process::wait(&pidfd);
            read
        }
    }
}

fn parse(map: &str) -> Option<Vec<[u32; 3]>> {
    map.lines()
        .map(|line| {
            let mut fields = line.split_whitespace().map(|f| f.parse().ok());
            let mut next = || fields.next().flatten();
            Some([next()?, next()?, next()?])
        })
        .collect()
}

/// Whether both descriptors are of one namespace.
pub fn same(one: impl AsFd, other: impl AsFd) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_maps_something_else_is_told_apart() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let pidfd = match process::fork_into(kind::USER, None).unwrap() {
            Fork::Child => {
                std::thread::sleep(std::time::Duration::from_secs(20));
                process::exit_now(0)
            }
            Fork::Parent(pid, pidfd) => {
                for map in ["uid_map", "gid_map"] {
                    fs::write(format!("/proc/{pid}/{map}"), "0 131072 65536\n").unwrap();
                }
                let path = format!("/proc/{pid}/ns/user");
                open(&path, 131_072).unwrap();
                let text = open(&path, 65536).unwrap_err().to_string();
                assert!(text.contains("\"0 131072 65536\""), "{text}");
                pidfd
            }
        };
        process::signal(&pidfd, 9).unwrap();
        process::wait(&pidfd).unwrap();
        let text = open("/proc/self/ns/net", 131_072).unwrap_err().to_string();
        assert!(text.contains("/proc/self/ns/net"), "{text}");
        let host = open("/proc/self/ns/user", 65536).unwrap_err().to_string();
        assert!(host.contains("/proc/self/ns/user"), "{host}");
    }
}
