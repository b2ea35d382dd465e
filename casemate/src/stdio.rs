//! Our own streams to and from the fifos of the container. Blocking copies,
//! one thread each: they end with their stream, or with this program.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread::JoinHandle;

use tokio::sync::mpsc::UnboundedSender;

use crate::error::{RunError, Step};

/// What a copy has to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Our standard input is at its end, and all of it has been handed on.
    InputEnded,
    /// Nobody reads our output any more.
    OutputRefused,
}

/// Copies the fifo at `from` to `to` until its last writer has gone. Call it
/// once the shim has the fifo open; before, it would seem at its end.
pub fn output(
    from: &Path,
    to: BorrowedFd<'_>,
    notices: UnboundedSender<Notice>,
) -> Result<JoinHandle<()>, RunError> {
    let mut source = File::open(from).step("open", from.display())?;
    let mut sink = File::from(to.try_clone_to_owned().step("copy", "a standard stream")?);
    spawn("output", move || {
        if copy(&mut source, &mut sink).is_err() {
            // The listener is gone when the run is over.
            let _late = notices.send(Notice::OutputRefused);
            // A full pipe would hold the workload up for ever.
            let _end = io::copy(&mut source, &mut io::sink());
        }
    })
}

/// Copies our standard input to the fifo at `to`.
pub fn input(to: &Path, notices: UnboundedSender<Notice>) -> Result<(), RunError> {
    let mut sink = OpenOptions::new()
        .write(true)
        .open(to)
        .step("open", to.display())?;
    let stdin = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .step("copy", "standard input")?;
    let mut source = File::from(stdin);
    spawn("input", move || {
        // Both ways to end are the end: a reader that went away wants no more.
        let _end = copy(&mut source, &mut sink);
        drop(sink);
        let _late = notices.send(Notice::InputEnded);
    })
    .map(drop)
}

fn spawn(
    name: &'static str,
    f: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, RunError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(f)
        .step("start the thread for", name)
}

/// What comes is handed on at once. The error is the sink's; a source that
/// fails is at its end.
fn copy(source: &mut File, sink: &mut File) -> io::Result<()> {
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => sink.write_all(buffer.get(..length).unwrap_or_default())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Ok(()),
        }
    }
}
