//! Run a program with a time limit and keep all that it says.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Failure, Result};

/// A finished program.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// How it ended; `None` when the time limit struck.
    pub status: Option<ExitStatus>,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
    /// From spawn to the end of both pipes.
    pub elapsed: Duration,
}

impl Output {
    /// Exit code, or 128 + signal, or −1 after a time-out.
    pub fn code(&self) -> i32 {
        self.status.map_or(-1, |s| {
            s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0))
        })
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Turns an exit code other than 0 into an error.
    pub fn ok(self) -> Result<Self> {
        if self.code() == 0 {
            return Ok(self);
        }
        let output = format!("{} {}", self.out().trim(), self.err().trim());
        Err(Failure::Command {
            outcome: match self.status {
                Some(status) => status.to_string(),
                None => format!("not finished after {} s", self.elapsed.as_secs()),
            },
            command: self.command,
            output: output.replace('\n', " | ").chars().take(600).collect(),
        })
    }
}

/// Runs `command` with `stdin`, at most for `limit`.
///
/// The program gets a process group of its own, which is killed at the limit,
/// so nothing that it started outlives the call unseen. The call returns when
/// both output pipes are closed: a daemon that keeps them open is found out.
pub fn run(command: &mut Command, stdin: &[u8], limit: Duration) -> Result<Output> {
    let shown = format!("{command:?}").replace('"', "");
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|source| Failure::Spawn {
            program: shown.clone(),
            source,
        })?;
    if let Some(mut pipe) = child.stdin.take() {
        let stdin = stdin.to_vec();
        // A program that does not read its input must not block the test.
        thread::spawn(move || {
            let _ = pipe.write_all(&stdin);
        });
    }
    let (send, receive) = mpsc::channel();
    drain(child.stdout.take(), 0, &send);
    drain(child.stderr.take(), 1, &send);
    drop(send);
    let mut kept = [Vec::new(), Vec::new()];
    let mut open = 2;
    while open > 0 {
        let left = limit.saturating_sub(begun.elapsed());
        match receive.recv_timeout(left) {
            Ok((_, None)) => open -= 1,
            Ok((which, Some(bytes))) => {
                if let Some(buffer) = kept.get_mut(which) {
                    buffer.extend_from_slice(&bytes);
                }
            }
            Err(_) => break,
        }
    }
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) if open == 0 => break Some(status),
            Ok(_) if begun.elapsed() < limit => thread::sleep(Duration::from_millis(2)),
            _ => {
                crate::procs::kill_group(child.id());
                let _ = child.wait();
                break None;
            }
        }
    };
    let [stdout, stderr] = kept;
    Ok(Output {
        command: shown,
        status,
        stdout,
        stderr,
        elapsed: begun.elapsed(),
    })
}

type Chunk = (usize, Option<Vec<u8>>);

fn drain<R: Read + Send + 'static>(pipe: Option<R>, which: usize, send: &mpsc::Sender<Chunk>) {
    let send = send.clone();
    thread::spawn(move || {
        if let Some(mut pipe) = pipe {
            let mut buffer = [0; 65536];
            while let Ok(n) = pipe.read(&mut buffer) {
                if n == 0 || send.send((which, Some(buffer[..n].to_vec()))).is_err() {
                    break;
                }
            }
        }
        let _ = send.send((which, None));
    });
}

/// Calls `probe` until it says true, for at most `limit`.
pub fn until(what: &str, limit: Duration, mut probe: impl FnMut() -> bool) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        if probe() {
            return Ok(begun.elapsed());
        }
        if begun.elapsed() > limit {
            return Err(Failure::Timeout {
                what: what.to_owned(),
                seconds: limit.as_secs(),
            });
        }
        thread::sleep(Duration::from_millis(5));
    }
}
