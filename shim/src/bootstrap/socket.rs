//! The shim's listening socket: its name, and binding it exactly once per pod.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sha2::{Digest, Sha256};

/// Where containerd before 2.3 wants shim sockets.
pub const DEFAULT_DIR: &str = "/run/containerd/s";

/// `sun_path` is 108 bytes with its NUL (unix(7)).
const PATH_MAX: usize = 107;

/// The socket of a group: `<dir>/hex(sha256(path.Join(address, namespace, group)))`.
pub fn path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let digest = Sha256::digest(join(&[address, namespace, group]));
    let mut name = String::with_capacity(64);
    for byte in digest {
        name.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
        name.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
    }
    dir.join(name)
}

/// Go's `path.Join`: what isn't empty, joined by `/` and cleaned lexically.
fn join(parts: &[&str]) -> String {
    let parts: Vec<&str> = parts.iter().copied().filter(|p| !p.is_empty()).collect();
    let joined = parts.join("/");
    let rooted = joined.starts_with('/');
    let mut clean: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if clean.last().is_some_and(|last| *last != "..") => {
                clean.pop();
            }
            ".." if rooted => {}
            other => clean.push(other),
        }
    }
    match (rooted, clean.is_empty()) {
        (true, _) => format!("/{}", clean.join("/")),
        (false, true) => String::from(if joined.is_empty() { "" } else { "." }),
        (false, false) => clean.join("/"),
    }
}

/// What [`claim`] found.
pub enum Claim {
    /// Nobody served the group: here is its socket, listening.
    Ours(UnixListener),
    /// A shim serves it already.
    Theirs,
}

/// Binds `path`, or finds that somebody listens there. A socket that nobody
/// listens on any more is replaced.
pub fn claim(path: &Path) -> io::Result<Claim> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path has more than {PATH_MAX} bytes: choose a shorter socket_dir"),
        ));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    if !dir.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // Between bind and listen a socket looks abandoned, and two that replace
    // the same abandoned one would unlink each other's: one at a time.
    let _lock = lock(dir)?;
    match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map(Claim::Ours),
    }
    if answers(path) {
        return Ok(Claim::Theirs);
    }
    std::fs::remove_file(path)?;
    bind(path).map(Claim::Ours)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = bound?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether somebody listens. A full backlog is somebody.
fn answers(path: &Path) -> bool {
    matches!(try_connect(path), Ok(_) | Err(Errno::AGAIN))
}

fn try_connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Connects within `limit`. A blocking connect(2) would wait for ever for a
/// listener that is stopped and whose backlog is full.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + limit;
    loop {
        match try_connect(path) {
            Err(Errno::AGAIN) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
            Ok(socket) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
        }
    }
}

/// Removes a socket that nobody listens on any more; its path may be the next
/// shim's already. A missing one is fine.
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let Some(dir) = path.parent().filter(|dir| dir.is_dir()) else {
        return Ok(());
    };
    // Whoever is about to listen there holds it.
    let _lock = lock(dir)?;
    if answers(path) {
        return Ok(());
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Holds the directory's lock for the life of the answer. A holder that is
/// stopped for a second is not waited for.
fn lock(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::WOULDBLOCK) => return Ok(file),
            Err(error) => return Err(error.into()),
        }
    }
}

/// `unix://` and the path.
pub fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Writes `<bundle>/address` so that a reader sees all of it or nothing.
pub fn write_address(bundle: &Path, address: &str) -> io::Result<()> {
    let temporary = bundle.join(format!(".address.{}", std::process::id()));
    std::fs::write(&temporary, address)?;
    std::fs::set_permissions(&temporary, Permissions::from_mode(0o644))?;
    std::fs::rename(&temporary, bundle.join("address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_join_as_go_joins_them() {
        assert_eq!(
            join(&["/run/c.sock", "k8s.io", "a"]),
            "/run/c.sock/k8s.io/a"
        );
        assert_eq!(join(&["", "ns", "a"]), "ns/a");
        assert_eq!(join(&["/run//x/", "./ns", "../b"]), "/run/x/b");
        assert_eq!(join(&["", "", ""]), "");
        assert_eq!(join(&["/", "..", "a"]), "/a");
    }

    #[test]
    fn the_name_is_the_hash_of_address_namespace_and_group() {
        // sha256 of "/run/containerd/containerd.sock/default/abc"
        let path = path(
            Path::new(DEFAULT_DIR),
            "/run/containerd/containerd.sock",
            "default",
            "abc",
        );
        assert_eq!(path.to_str().unwrap(), format!("{DEFAULT_DIR}/{HASH}"));
    }

    const HASH: &str = "8cb244a719603fe00870d5ce1d8e1f1db43a654cb993d107df1f1ae23ddffa59";

    #[test]
    fn a_socket_is_ours_then_theirs_and_a_stale_one_is_replaced() {
        let dir = std::env::temp_dir().join(format!("casemate-claim-{}", std::process::id()));
        let path = dir.join("s");
        let Claim::Ours(listener) = claim(&path).unwrap() else {
            panic!("nobody else is here");
        };
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(&dir), 0o700);
        assert!(matches!(claim(&path).unwrap(), Claim::Theirs));
        drop(listener);
        assert!(matches!(claim(&path).unwrap(), Claim::Ours(_)));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_before_anything_is_made() {
        let dir = Path::new("/tmp").join("x".repeat(100));
        assert!(claim(&dir.join("s123456")).is_err());
        assert!(!dir.exists());
    }
}
