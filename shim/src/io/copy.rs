//! Moving bytes: `splice` between pipes, a small buffer for terminals and files.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use tokio::io::unix::AsyncFd;

use super::target::Output;

/// A pipe's default capacity (pipe(7)).
const CHUNK: usize = 64 * 1024;
/// Terminals hand out at most a page at a time.
const TTY_CHUNK: usize = 4096;

/// First and longest pause between two looks at a fifo that isn't read.
const LINGER: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(64));

/// Copies a pipe to wherever its output goes, until its last writer closes it.
pub async fn pipe_to(source: &AsyncFd<OwnedFd>, sink: &mut Output) -> io::Result<()> {
    match sink {
        Output::Fifo(fifo) => splice_all(source, &fifo.write).await,
        other => read_all(source, other, CHUNK).await,
    }
}

/// Copies a terminal's output until it hangs up.
pub async fn terminal_to(master: &AsyncFd<OwnedFd>, sink: &mut Output) -> io::Result<()> {
    read_all(master, sink, TTY_CHUNK).await
}

/// Keeps a fifo's write end until a reader has come and has read all: without a
/// writer, a reader that opens now would wait for one (fifo(7)), for ever, and never
/// see what was written. containerd opens its end at leisure, so a short process may
/// be over by then, often with an empty error output. Closing earlier loses output,
/// or the end of file; closing later withholds the latter.
pub async fn linger(sink: Output) {
    let Output::Fifo(mut fifo) = sink else { return };
    let (mut pause, longest) = LINGER;
    while rustix::io::ioctl_fionread(&*fifo.write).is_ok_and(|unread| unread > 0)
        || !fifo.has_had_reader()
    {
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

/// Moves everything from one pipe to another.
pub async fn splice_all(source: &AsyncFd<OwnedFd>, sink: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut readable = source.readable().await?;
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = rustix::pipe::splice(source, None, sink, None, CHUNK, flags);
        match moved {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            // Which end? Only the kernel knows now; a change after this look
            // comes as an event of its own.
            Err(Errno::AGAIN) if is_ready(source, PollFlags::IN)? => {
                let mut writable = sink.writable().await?;
                if !is_ready(sink, PollFlags::OUT)? {
                    writable.clear_ready();
                }
            }
            Err(Errno::AGAIN) => readable.clear_ready(),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Types a fifo's bytes into a terminal.
pub async fn to_terminal(source: &AsyncFd<OwnedFd>, master: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; TTY_CHUNK];
    loop {
        let count = read_some(source, &mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        write_all(master, &buffer[..count]).await?;
    }
}

async fn read_all(source: &AsyncFd<OwnedFd>, sink: &mut Output, chunk: usize) -> io::Result<()> {
    let mut buffer = vec![0; chunk];
    let mut lost = 0;
    loop {
        let count = read_some(source, &mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let bytes = &buffer[..count];
        match sink {
            Output::Fifo(fifo) => write_all(&fifo.write, bytes).await?,
            Output::File(file) => write_or_lose(file, bytes, &mut lost),
            Output::Null => {}
        }
    }
}

/// A log that can't be written (a full disk) is no reason to stop reading: the
/// workload would be ended by SIGPIPE, or wait for ever.
fn write_or_lose(file: &mut File, bytes: &[u8], lost: &mut u64) {
    match file.write_all(bytes) {
        Ok(()) if *lost > 0 => {
            log::warn!("the log file can be written again; {lost} bytes of output were lost");
            *lost = 0;
        }
        Ok(()) => {}
        Err(error) => {
            if *lost == 0 {
                log::error!("write the log file: {error}; output is lost until that works");
            }
            *lost += bytes.len() as u64;
        }
    }
}

/// Bytes read; 0 at the end, which for a terminal is EIO: no slave is open.
async fn read_some(source: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut readable = source.readable().await?;
        match rustix::io::read(source, &mut *buffer) {
            Ok(count) => return Ok(count),
            Err(Errno::IO) => return Ok(0),
            Err(Errno::AGAIN) => readable.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn write_all(sink: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut writable = sink.writable().await?;
        match rustix::io::write(sink, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::AGAIN) => writable.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_ready(fd: &AsyncFd<OwnedFd>, what: PollFlags) -> io::Result<bool> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(fd, what)];
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::target::{Fifo, Target};
    use super::*;
    use crate::io::watch;
    use rustix::pipe::PipeFlags;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::io::Interest;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    fn fifo() -> std::path::PathBuf {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("casemate-fifo-{}-{n}", std::process::id()));
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        path
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn every_byte_passes_a_slow_reader_and_then_the_end() {
        const TOTAL: usize = 5 << 20;
        runtime().block_on(async {
            let (source_read, source_write) = pipe();
            let (sink_read, sink_write) = pipe();
            let source = watch(source_read, Interest::READABLE).unwrap();
            let sink = watch(sink_write, Interest::WRITABLE).unwrap();
            let copy = tokio::spawn(async move { splice_all(&source, &sink).await });
            let writer = watch(source_write, Interest::WRITABLE).unwrap();
            let produce = tokio::spawn(async move {
                let bytes: Vec<u8> = (0..TOTAL).map(|n| (n % 251) as u8).collect();
                write_all(&writer, &bytes).await.unwrap();
            });
            let reader = watch(sink_read, Interest::READABLE).unwrap();
            let mut seen = 0;
            let mut buffer = vec![0; 100_000];
            loop {
                let count = read_some(&reader, &mut buffer).await.unwrap();
                if count == 0 {
                    break;
                }
                for byte in &buffer[..count] {
                    assert_eq!(*byte, (seen % 251) as u8);
                    seen += 1;
                }
                if seen % 7 == 0 {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            }
            assert_eq!(seen, TOTAL);
            produce.await.unwrap();
            copy.await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_fifo_ends_when_it_has_been_read_not_before() {
        runtime().block_on(async {
            let (read, write) = pipe();
            rustix::io::write(&write, b"late").unwrap();
            let write = watch(write, Interest::WRITABLE).unwrap();
            let sink = Output::Fifo(Fifo::to_known_reader(write));
            let kept = tokio::spawn(linger(sink));
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!kept.is_finished());
            let mut buffer = [0; 8];
            assert_eq!(rustix::io::read(&read, &mut buffer), Ok(4));
            kept.await.unwrap();
            assert_eq!(rustix::io::read(&read, &mut buffer), Ok(0));
        });
    }

    #[test]
    fn an_empty_fifo_ends_when_its_reader_has_come_not_before() {
        let path = fifo();
        runtime().block_on(async {
            let sink = Target::Fifo(path.clone()).open_output().unwrap().unwrap();
            let kept = tokio::spawn(linger(sink));
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(!kept.is_finished());
            // As containerd does: this waits where there is no writer.
            let there = path.clone();
            let late = std::thread::spawn(move || std::fs::read(there).unwrap());
            kept.await.unwrap();
            assert_eq!(late.join().unwrap(), b"");
            std::fs::remove_file(path).unwrap();
        });
    }

    #[test]
    fn an_empty_fifo_whose_reader_was_there_first_ends_at_once() {
        let path = fifo();
        runtime().block_on(async {
            let there = path.clone();
            let reader = std::thread::spawn(move || std::fs::read(there).unwrap());
            tokio::time::sleep(Duration::from_millis(50)).await;
            let sink = Target::Fifo(path.clone()).open_output().unwrap().unwrap();
            std::fs::remove_file(path).unwrap();
            let Output::Fifo(fifo) = &sink else { panic!() };
            // It has seen no end yet.
            tokio::time::sleep(Duration::from_millis(50)).await;
            write_all(&fifo.write, b"here").await.unwrap();
            let ends = tokio::time::timeout(Duration::from_secs(5), linger(sink));
            assert!(ends.await.is_ok());
            assert_eq!(reader.join().unwrap(), b"here");
        });
    }

    #[test]
    fn a_full_sink_costs_no_processor_time() {
        runtime().block_on(async {
            let (source_read, source_write) = pipe();
            let (sink_read, sink_write) = pipe();
            let source = watch(source_read, Interest::READABLE).unwrap();
            let sink = watch(sink_write, Interest::WRITABLE).unwrap();
            let writer = watch(source_write, Interest::WRITABLE).unwrap();
            let copy = tokio::spawn(async move { splice_all(&source, &sink).await });
            let fill = tokio::spawn(async move { write_all(&writer, &[1; 1 << 20]).await });
            let before = cpu();
            tokio::time::sleep(Duration::from_millis(300)).await;
            let spent = cpu() - before;
            assert!(spent < 0.1, "{spent} s of processor time while blocked");
            assert!(!copy.is_finished() && !fill.is_finished());
            copy.abort();
            fill.abort();
            drop(sink_read);
        });
    }

    fn cpu() -> f64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
    }
}
