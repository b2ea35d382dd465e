//! How long a program takes, with no polling in the figure.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::error::{Failure, Result};
use casemate_tests::procs;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Runs of one machine are this far apart: starts in a row hide the RCU grace
/// period that a lone cgroup attach waits for, and no node starts pods in a row.
const GAP: Duration = Duration::from_millis(25);

/// Lets the kernel's deferred work of the last run pass.
pub fn gap() {
    std::thread::sleep(GAP);
}

/// Milliseconds of `step`.
pub fn time<T>(step: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let begun = Instant::now();
    let value = step()?;
    Ok((milliseconds(begun), value))
}

/// Milliseconds since `begun`.
pub fn milliseconds(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// Runs a program until it has ended and nobody holds its output any more, as
/// containerd waits for a shim; milliseconds and the output.
pub fn run(mut command: Command, limit: Duration) -> Result<(f64, Vec<u8>)> {
    let shown = format!("{command:?}").replace('"', "");
    let failed = |source| Failure::Spawn {
        program: shown.clone(),
        source,
    };
    let (mut reader, writer) = std::io::pipe().map_err(failed)?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().map_err(failed)?)
        .stderr(writer)
        .process_group(0);
    let begun = Instant::now();
    let mut child = command.spawn().map_err(failed)?;
    // The command keeps the pipe's ends open as long as it lives.
    drop(command);
    let mut kept = Vec::new();
    let mut buffer = [0; 8192];
    let mut late = false;
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        let wait = Timespec::try_from(left).unwrap_or_default();
        let ready = poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&wait));
        if !matches!(ready, Ok(n) if n > 0) {
            procs::kill_group(child.id());
            late = true;
            break;
        }
        match reader.read(&mut buffer) {
            Ok(n) if n > 0 => kept.extend_from_slice(&buffer[..n]),
            _ => break,
        }
    }
    let status = child.wait().map_err(failed)?;
    let took = milliseconds(begun);
    if status.success() && !late {
        return Ok((took, kept));
    }
    let text = String::from_utf8_lossy(&kept).trim().replace('\n', " | ");
    Err(Failure::Command {
        command: shown,
        outcome: if late {
            format!("not finished after {} s", limit.as_secs())
        } else {
            status.to_string()
        },
        output: text.chars().take(600).collect(),
    })
}
