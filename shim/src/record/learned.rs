//! What was learned from the pod's containers, and where it is kept. What comes in is
//! a learner's word, which may be a lie: it is bounded, and names calls and nothing
//! that is acted upon.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_protocol::{MAX_DIRECTORY, MAX_SEEN, Seen};
use rustix::fs::{AtFlags, Mode, OFlags};
use seccomp_profiles::recording::{Base, Container, Lost, Pod};
use seccomp_profiles::{Recording, observed, table};
use tokio::sync::{Notify, watch};

/// Kinds of calls kept of a pod, all containers together.
const KINDS: usize = 16_384;
/// More than this at a time is no honest number.
const COUNT_MAX: u64 = 1 << 32;
/// From something new to the file that has it.
const WRITE_AFTER: Duration = Duration::from_secs(2);
/// Recordings in the directory, and their bytes.
const FILES: usize = 256;
const BYTES: u64 = 64 << 20;

/// What was learned from one pod.
#[derive(Debug)]
pub struct Learned {
    book: Mutex<Book>,
    store: Store,
    news: Notify,
    living: watch::Sender<usize>,
    /// By call, the bits that its arguments may have.
    masks: BTreeMap<u32, Vec<(u8, u32)>>,
}

#[derive(Debug)]
struct Book {
    ended: Recording,
    living: BTreeMap<u32, (String, Container)>,
    next: u32,
    kinds: usize,
}

impl Learned {
    /// Of a pod from which nothing is known yet.
    pub fn new(pod: Pod, store: Store) -> Arc<Learned> {
        let learned = Arc::new(Learned {
            book: Mutex::new(Book {
                ended: Recording::new(pod),
                living: BTreeMap::new(),
                next: 0,
                kinds: 0,
            }),
            store,
            news: Notify::new(),
            living: watch::Sender::new(0),
            masks: observed::told_apart().collect(),
        });
        // The pod's end is the shim's, and so this one's.
        let kept = learned.clone();
        tokio::spawn(async move {
            loop {
                kept.news.notified().await;
                tokio::time::sleep(WRITE_AFTER).await;
                kept.keep();
            }
        });
        learned
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container is learned from; the number that it has here.
    pub fn begin(&self, id: &str, name: &str, base: Base) -> u32 {
        let mut book = self.book();
        book.next += 1;
        let (number, container) = (book.next, Container::new(id, base));
        book.living.insert(number, (name.to_owned(), container));
        self.living.send_replace(book.living.len());
        number
    }

    /// Takes a learner's word. An error is a lie that can be told from the truth;
    /// what comes before it in the list is taken.
    pub fn seen(&self, number: u32, list: &[Seen]) -> Result<(), &'static str> {
        if list.len() > MAX_SEEN {
            return Err("more than goes into a message");
        }
        let mut book = self.book();
        let book = &mut *book;
        let Some((_, container)) = book.living.get_mut(&number) else {
            return Ok(());
        };
        let mut new = false;
        for seen in list {
            new |= self.one(container, &mut book.kinds, seen)?;
        }
        if new {
            self.news.notify_one();
        }
        Ok(())
    }

    fn one(
        &self,
        container: &mut Container,
        kinds: &mut usize,
        seen: &Seen,
    ) -> Result<bool, &'static str> {
        match seen {
            Seen::Call { nr, args, count } => {
                if table::name(*nr).is_none() {
                    return Err("a call that can't be");
                }
                if *count == 0 || *count > COUNT_MAX {
                    return Err("a count that can't be");
                }
                let args = self.restore(*nr, *args)?;
                if *kinds >= KINDS {
                    container.lose(&Lost {
                        calls: *count,
                        ..Lost::default()
                    });
                    return Ok(false);
                }
                let new = container.call(*nr, &args, *count);
                *kinds += usize::from(new);
                Ok(new)
            }
            Seen::Bound(0) | Seen::Connected(0) => Err("a port that can't be"),
            Seen::Bound(port) => Ok(container.bound(*port)),
            Seen::Connected(port) => Ok(container.connected(*port)),
            Seen::Directory(name) => {
                let plain = |c: char| !c.is_control() && c != '/';
                if name.len() > MAX_DIRECTORY || !name.chars().all(plain) {
                    return Err("a directory that can't be");
                }
                Ok(container.path(&format!("/{name}")))
            }
            Seen::Lost {
                calls,
                ports,
                directories,
                unread,
            } => {
                if [calls, ports, directories, unread]
                    .into_iter()
                    .any(|n| *n > COUNT_MAX)
                {
                    return Err("a count that can't be");
                }
                container.lose(&Lost {
                    calls: *calls,
                    ports: *ports,
                    directories: *directories,
                    unread: *unread,
                });
                Ok(false)
            }
        }
    }

    /// The six arguments, as far as they are known.
    fn restore(&self, nr: u32, told: [u32; 3]) -> Result<[u64; 6], &'static str> {
        let masks = self.masks.get(&nr).map_or(&[][..], Vec::as_slice);
        let mut all = [0; 6];
        for (n, value) in told.into_iter().enumerate() {
            let (at, mask) = masks.get(n).copied().unwrap_or((0, 0));
            if value & !mask != 0 {
                return Err("arguments that don't count");
            }
            if let Some(place) = all.get_mut(usize::from(at))
                && mask != 0
            {
                *place = u64::from(value);
            }
        }
        Ok(all)
    }

    /// Nothing more comes of a container.
    pub fn end(&self, number: u32) {
        {
            let mut book = self.book();
            if let Some((name, container)) = book.living.remove(&number) {
                match book.ended.add(&name, container) {
                    Ok(true) => {}
                    Ok(false) => log::warn!("container {name}: no room for what was learned"),
                    Err(error) => log::warn!("{error}"),
                }
            }
            self.living.send_replace(book.living.len());
        }
        self.keep();
    }

    /// Resolves when nothing more comes of any.
    pub async fn all_ended(&self) {
        let mut living = self.living.subscribe();
        // Its sender lives in `self`.
        let _never = living.wait_for(|living| *living == 0).await;
    }

    /// All that is known by now.
    pub fn recording(&self) -> Recording {
        let book = self.book();
        let mut all = book.ended.clone();
        for (name, container) in book.living.values() {
            if let Err(error) = all.add(name, container.clone()) {
                log::warn!("{error}");
            }
        }
        all
    }

    /// Writes it into its file.
    pub fn keep(&self) {
        let written = self
            .recording()
            .to_json()
            .map_err(io::Error::from)
            .and_then(|json| self.store.write(json.as_bytes()));
        if let Err(error) = written {
            log::error!("keep what was learned in {}: {error}", self.store.place());
        }
    }
}

/// The place of one pod's recording: a file in the node's directory for them.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    directory: OwnedFd,
    name: String,
}

impl Store {
    /// Opens the directory, or makes it.
    ///
    /// # Errors
    /// It can't be, or others than root can get at it.
    pub fn open(path: &Path, namespace: &str, pod: &str) -> io::Result<Store> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut builder = std::fs::DirBuilder::new();
        if let Some(above) = path.parent() {
            builder.recursive(true).mode(0o755).create(above)?;
        }
        builder.recursive(true).mode(0o700).create(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&directory)?;
        if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            let mode = stat.st_mode & 0o777;
            return Err(io::Error::other(format!(
                "it is of user {} and mode {mode:o}, so that others could read or change what is \
                 in it; chown it to root and chmod it 700",
                stat.st_uid
            )));
        }
        Ok(Store {
            path: path.to_owned(),
            directory,
            name: format!("{}_{}.json", plain(namespace), plain(pod)),
        })
    }

    /// Where it is.
    pub fn place(&self) -> String {
        self.path.join(&self.name).display().to_string()
    }

    /// Puts it there, all at once for whoever reads.
    fn write(&self, content: &[u8]) -> io::Result<()> {
        self.make_room(content.len() as u64)?;
        let next = format!(".{}.new", self.name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, &next, flags, Mode::from(0o600))?;
        let written = std::fs::File::from(file).write_all(content);
        if let Err(error) = written {
            let _half = rustix::fs::unlinkat(&self.directory, &next, AtFlags::empty());
            return Err(error);
        }
        rustix::fs::renameat(&self.directory, &next, &self.directory, &self.name)?;
        Ok(())
    }

    /// The oldest recordings go, where there are too many.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let mut others: Vec<(i64, i64, u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.path)?.flatten() {
            let path = entry.path();
            let is_recording = path.extension().is_some_and(|e| e == "json");
            if let (true, Ok(about)) = (is_recording, entry.metadata())
                && entry.file_name() != self.name.as_str()
            {
                others.push((about.mtime(), about.mtime_nsec(), about.len(), path));
            }
        }
        others.sort();
        let mut count = others.len() + 1;
        let mut size = others.iter().fold(bytes, |sum, (.., len, _)| sum + len);
        for (.., len, path) in others {
            if count <= FILES && size <= BYTES {
                break;
            }
            log::warn!("{}: removed, for newer recordings", path.display());
            // Another pod's shim may have done so.
            let _gone = std::fs::remove_file(&path);
            count -= 1;
            size -= len;
        }
        Ok(())
    }
}

/// Ids are plain as containerd has them; be sure that they name a file.
fn plain(id: &str) -> String {
    let keep = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' => c,
        _ => '-',
    };
    id.chars().take(100).map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Base {
        Base {
            name: "default".into(),
            hash: "0".repeat(64),
        }
    }

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("learned-{}-{name}", std::process::id()));
        let _none = std::fs::remove_dir_all(&path);
        path
    }

    fn learned(path: &Path) -> Arc<Learned> {
        Learned::new(Pod::default(), Store::open(path, "k8s.io", "p").unwrap())
    }

    fn call(name: &str, args: [u32; 3]) -> Seen {
        Seen::Call {
            nr: table::number(name).unwrap(),
            args,
            count: 1,
        }
    }

    #[tokio::test]
    async fn what_is_seen_is_kept_in_a_file_of_roots() {
        let path = scratch("kept");
        let learned = learned(&path);
        let number = learned.begin("c", "web", base());
        let seen = [
            call("openat", [0; 3]),
            call("socket", [2, 1, 6]),
            Seen::Bound(80),
            Seen::Connected(5432),
            Seen::Directory("etc".into()),
            Seen::Directory(String::new()),
        ];
        learned.seen(number, &seen).unwrap();
        let living = learned.recording();
        learned.end(number);
        learned.all_ended().await;
        assert_eq!(learned.recording(), living);
        let file = path.join("k8s.io_p.json");
        assert_eq!(Recording::read(&file).unwrap(), living);
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let web = living.container("web").unwrap();
        let kinds: Vec<String> = web.calls().map(|(kind, _)| kind.to_string()).collect();
        assert_eq!(kinds, ["socket(family 2, type 1, protocol 6)", "openat"]);
        // A second container of the name adds to it.
        let number = learned.begin("d", "web", base());
        learned.seen(number, &[call("listen", [0; 3])]).unwrap();
        learned.end(number);
        assert_eq!(
            Recording::read(&file)
                .unwrap()
                .container("web")
                .unwrap()
                .calls()
                .count(),
            3
        );
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[tokio::test]
    async fn lies_are_refused_and_the_rest_is_bounded() {
        let path = scratch("lies");
        let learned = learned(&path);
        let number = learned.begin("c", "c", base());
        for lie in [
            Seen::Call {
                nr: 9999,
                args: [0; 3],
                count: 1,
            },
            Seen::Call {
                nr: 0,
                args: [0; 3],
                count: 0,
            },
            Seen::Call {
                nr: 0,
                args: [0; 3],
                count: u64::MAX,
            },
            call("read", [1, 0, 0]),
            call("socket", [2, 0x10, 0]),
            Seen::Bound(0),
            Seen::Connected(0),
            Seen::Directory("a/b".into()),
            Seen::Directory("\u{1b}[31m".into()),
            Seen::Directory("x".repeat(100)),
            Seen::Lost {
                calls: 0,
                ports: u64::MAX,
                directories: 0,
                unread: 0,
            },
        ] {
            learned
                .seen(number, std::slice::from_ref(&lie))
                .unwrap_err();
        }
        learned
            .seen(number, &vec![Seen::Bound(1); MAX_SEEN + 1])
            .unwrap_err();
        // Of one that isn't, or is no more.
        learned.seen(77, &[Seen::Bound(1)]).unwrap();
        assert_eq!(
            learned
                .recording()
                .container("c")
                .unwrap()
                .ports_bound()
                .len(),
            0
        );
        for n in 0..10_000u32 {
            learned.seen(number, &[call("ioctl", [n, 0, 0])]).unwrap();
            learned
                .seen(number, &[Seen::Directory(n.to_string())])
                .unwrap();
            learned.seen(number, &[Seen::Bound(n as u16 + 1)]).unwrap();
        }
        let all = learned.recording();
        let one = all.container("c").unwrap();
        assert_eq!(one.calls().count(), 512);
        assert_eq!(one.ports_bound().len(), Container::PORTS);
        assert_eq!(one.directories().len(), Container::DIRECTORIES);
        assert!(one.lost().calls > 9000 && one.lost().ports > 9000);
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_read_is_none() {
        use std::os::unix::fs::PermissionsExt as _;
        let path = scratch("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = Store::open(&path, "n", "p").unwrap_err().to_string();
        assert!(error.contains("chmod it 700"), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        Store::open(&path, "n", "p").unwrap();
        let link = scratch("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        Store::open(&link, "n", "p").unwrap_err();
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn the_oldest_go_where_there_are_too_many() {
        let path = scratch("many");
        let store = |pod: &str| Store::open(&path, "n", pod).unwrap();
        let names = || std::fs::read_dir(&path).unwrap().count();
        for n in 0..FILES + 3 {
            store(&format!("p{n}")).write(b"{}").unwrap();
            let at = std::time::UNIX_EPOCH + Duration::from_secs(n as u64 + 1);
            let name = path.join(format!("n_p{n}.json"));
            let file = std::fs::File::options().write(true).open(name).unwrap();
            file.set_modified(at).unwrap();
        }
        assert_eq!(names(), FILES);
        assert!(!path.join("n_p2.json").exists() && path.join("n_p3.json").exists());
        // Written again it takes no other's place.
        store("p9").write(b"{}").unwrap();
        assert_eq!(names(), FILES);
        // By size, too.
        let big = std::fs::File::create(path.join("n_p4.json")).unwrap();
        big.set_len(BYTES).unwrap();
        store("last").write(b"{}").unwrap();
        assert!(!path.join("n_p3.json").exists() && path.join("n_last.json").exists());
        std::fs::remove_dir_all(&path).unwrap();
    }
}
