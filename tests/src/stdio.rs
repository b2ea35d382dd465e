//! The client's side of a task's fifos.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::{Result, file};
use crate::run::until;

/// Makes a fifo at `path`, as containerd's client does.
pub fn make_fifo(path: &Path) -> Result<()> {
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o700), 0)
        .map_err(file("make fifo", path))
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    ended: bool,
}

/// A reader of one output fifo that keeps all it reads.
#[derive(Clone)]
pub struct Reader {
    path: PathBuf,
    kept: Arc<Mutex<Kept>>,
}

impl Reader {
    /// Starts to read; returns at once although nobody writes yet.
    pub fn start(path: &Path) -> Self {
        let reader = Self {
            path: path.to_owned(),
            kept: Arc::default(),
        };
        // Opened before the shim opens its end: a reader that comes when the
        // last writer has gone would wait for the next one.
        let opened = open_reader(path);
        let ours = reader.clone();
        thread::spawn(move || {
            if let Ok(fifo) = opened {
                ours.keep(fifo);
            }
            if let Ok(mut kept) = ours.kept.lock() {
                kept.ended = true;
            }
        });
        reader
    }

    fn keep(&self, mut fifo: File) {
        let mut buffer = vec![0; 65536];
        loop {
            // Neither is there before the first writer.
            let mut fds = [PollFd::new(&fifo, PollFlags::IN)];
            if rustix::event::poll(&mut fds, None).is_err() {
                continue;
            }
            match fifo.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => {
                    if let Ok(mut kept) = self.kept.lock() {
                        kept.bytes.extend_from_slice(&buffer[..n]);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    /// What came so far.
    pub fn so_far(&self) -> Vec<u8> {
        self.kept
            .lock()
            .map(|k| k.bytes.clone())
            .unwrap_or_default()
    }

    /// Waits for the end of the stream and returns all of it.
    pub fn all(&self, limit: Duration) -> Result<Vec<u8>> {
        until(&format!("end of {}", self.path.display()), limit, || {
            self.kept.lock().is_ok_and(|k| k.ended)
        })?;
        Ok(self.so_far())
    }

    /// Waits for the end and returns it as text.
    pub fn text(&self, limit: Duration) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.all(limit)?).into_owned())
    }

    /// Waits until `part` has come.
    pub fn until(&self, part: &str, limit: Duration) -> Result<()> {
        until(
            &format!("{part:?} on {}", self.path.display()),
            limit,
            || String::from_utf8_lossy(&self.so_far()).contains(part),
        )?;
        Ok(())
    }
}

/// Opens the reading end without waiting for a writer.
pub fn open_reader(path: &Path) -> Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(file("open", path))
}

/// Reads from a non-blocking fifo until `part` has come or the time is up.
pub fn read_until(fifo: &mut File, part: &str, limit: Duration) -> Result<String> {
    let mut text = String::new();
    let mut buffer = [0; 4096];
    until(&format!("{part:?}"), limit, || {
        while let Ok(n @ 1..) = fifo.read(&mut buffer) {
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        text.contains(part)
    })?;
    Ok(text)
}

/// Writes `bytes` into a fifo that the shim reads.
pub fn write_all(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut fifo = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(file("open", path))?;
    fifo.write_all(bytes).map_err(file("write", path))
}
