//! One run: bundle, shim, container, streams, end. Whatever happens in
//! between, what was made is removed.

use std::io;
use std::os::fd::AsFd;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::Run;
use crate::bundle::Bundle;
use crate::elsewhere::{WAY_OUT, is_elsewhere};
use crate::error::{RunError, Step};
use crate::shim::Shim;
use crate::stdio::{self, Notice};
use crate::terminal::{self, Raw};

const SIGKILL: i32 = 9;
const SIGPIPE: i32 = 13;
/// So many requests to end are passed on; the next one kills.
const PATIENCE: u32 = 2;

/// Runs the command; what comes back is its exit status.
pub fn run(options: &Run) -> Result<i32, RunError> {
    if !rustix::process::geteuid().is_root() {
        return Err(RunError::Refused(
            "run: needs root, as a sandbox has ids, namespaces and cgroups of its own: use sudo"
                .to_owned(),
        ));
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .step("make", "the event loop")?
        .block_on(in_bundle(options))
}

async fn in_bundle(options: &Run) -> Result<i32, RunError> {
    // From here on a signal is a message, so none can cut the way back short.
    let mut signals = Signals::new()?;
    let bundle = Bundle::new(options)?;
    let status = in_shim(options, &bundle, &mut signals).await;
    let removed = bundle.remove();
    let status = status?;
    removed.map(|()| status)
}

async fn in_shim(options: &Run, bundle: &Bundle, signals: &mut Signals) -> Result<i32, RunError> {
    let shim = Shim::start(bundle).await?;
    let status = in_container(options, bundle, &shim, signals).await;
    shim.end().await;
    status
}

/// A sandbox can't be made at all where this may be a chroot: what is said of it names a
/// detail.
fn with_way_out(error: RunError) -> RunError {
    match error {
        RunError::Shim { step, reason } if reason.starts_with("start agent") && is_elsewhere() => {
            RunError::Shim {
                step,
                reason: format!(
                    "{reason}; if this is a chroot, as of kubectl debug node/…: {WAY_OUT} casemate run"
                ),
            }
        }
        error => error,
    }
}

async fn in_container(
    options: &Run,
    bundle: &Bundle,
    shim: &Shim,
    signals: &mut Signals,
) -> Result<i32, RunError> {
    let created = shim.create(bundle, options.terminal).await;
    let pid = created.map_err(with_way_out)?;
    let (sender, mut notices) = unbounded_channel();
    let mut outputs = vec![stdio::output(
        &bundle.fifo("stdout"),
        io::stdout().as_fd(),
        sender.clone(),
    )?];
    if !options.terminal {
        let path = bundle.fifo("stderr");
        outputs.push(stdio::output(&path, io::stderr().as_fd(), sender.clone())?);
    }
    let raw = options.terminal.then(Raw::new).transpose()?;
    if options.terminal {
        resize(shim).await;
    }
    shim.go().await?;
    stdio::input(&bundle.fifo("stdin"), sender)?;

    let waited = attend(options, shim, pid, signals, &mut notices).await;
    // The answer comes when all output is in the fifos, and closes them.
    let deleted = shim.delete().await;
    for output in outputs {
        // A panic is the only way to fail, and there is none in it.
        let _ended = output.join();
    }
    drop(raw);
    let status = waited?;
    deleted?;
    Ok(i32::try_from(status).unwrap_or(i32::MAX))
}

/// Waits for the end, and passes on what happens until then.
async fn attend(
    options: &Run,
    shim: &Shim,
    pid: u32,
    signals: &mut Signals,
    notices: &mut UnboundedReceiver<Notice>,
) -> Result<u32, RunError> {
    let ended = shim.wait();
    tokio::pin!(ended);
    let mut asked = 0;
    let mut killed_for = None;
    loop {
        // What is passed on may find the process gone: its end comes next.
        let _gone = tokio::select! {
            status = &mut ended => return Ok(killed_for.unwrap_or(status?)),
            signal = signals.next() => match signal {
                Asked::Resize => { resize(shim).await; Ok(()) }
                Asked::End(_) if asked >= PATIENCE => shim.kill(SIGKILL, true).await,
                Asked::End(number) => {
                    asked += 1;
                    pass_on(shim, pid, number, &mut killed_for).await
                }
            },
            Some(notice) = notices.recv() => match notice {
                // A terminal has no end of input but the key for it.
                Notice::InputEnded if options.terminal => Ok(()),
                Notice::InputEnded => shim.close_stdin().await,
                Notice::OutputRefused => pass_on(shim, pid, SIGPIPE, &mut killed_for).await,
            },
        };
    }
}

/// Sends the signal, so that it does what it does to any program. The command
/// is the first process of its pid namespace, and the kernel spares such a one
/// every signal that it has no handler for (pid_namespaces(7)): where that
/// would have been its end, it is killed, and `killed_for` says so.
async fn pass_on(
    shim: &Shim,
    pid: u32,
    signal: i32,
    killed_for: &mut Option<u32>,
) -> Result<(), RunError> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    if is_default(&status, signal) {
        *killed_for = Some(128 + signal.unsigned_abs());
        shim.kill(SIGKILL, true).await
    } else {
        shim.kill(signal, false).await
    }
}

/// Whether the process of this `/proc/PID/status` neither handles, ignores nor
/// blocks the signal (proc_pid_status(5)). What can't be read is not judged.
fn is_default(status: &str, signal: i32) -> bool {
    let is_in = |name: &str| -> Option<bool> {
        let mask = status.lines().find_map(|line| line.strip_prefix(name))?;
        let mask = u64::from_str_radix(mask.trim(), 16).ok()?;
        Some(mask >> (signal - 1) & 1 == 1)
    };
    ["SigBlk:", "SigIgn:", "SigCgt:"]
        .into_iter()
        .all(|name| is_in(name) == Some(false))
}

async fn resize(shim: &Shim) {
    if let Some((columns, rows)) = terminal::size() {
        // A size that wasn't taken is not worth a failure.
        let _same = shim.resize(columns, rows).await;
    }
}

/// What our caller wants.
enum Asked {
    /// Pass this signal on.
    End(i32),
    /// The terminal has another size.
    Resize,
}

struct Signals {
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
    terminate: Signal,
    window: Signal,
}

impl Signals {
    fn new() -> Result<Signals, RunError> {
        let watch = |kind| signal(kind).step("watch", "signals");
        Ok(Signals {
            interrupt: watch(SignalKind::interrupt())?,
            quit: watch(SignalKind::quit())?,
            hangup: watch(SignalKind::hangup())?,
            terminate: watch(SignalKind::terminate())?,
            window: watch(SignalKind::window_change())?,
        })
    }

    async fn next(&mut self) -> Asked {
        let number = |kind: SignalKind| Asked::End(kind.as_raw_value());
        tokio::select! {
            _ = self.interrupt.recv() => number(SignalKind::interrupt()),
            _ = self.quit.recv() => number(SignalKind::quit()),
            _ = self.hangup.recv() => number(SignalKind::hangup()),
            _ = self.terminate.recv() => number(SignalKind::terminate()),
            _ = self.window.recv() => Asked::Resize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_default_when_no_mask_has_it() {
        let status = |blocked, ignored, caught| {
            format!(
                "Name:\tx\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
            )
        };
        let interrupt = 1u64 << (2 - 1);
        assert!(is_default(&status(0, 0, 0), 2));
        assert!(is_default(&status(!interrupt, !interrupt, !interrupt), 2));
        assert!(!is_default(&status(interrupt, 0, 0), 2));
        assert!(!is_default(&status(0, interrupt, 0), 2));
        assert!(!is_default(&status(0, 0, interrupt), 2));
        assert!(!is_default("", 2));
        assert!(!is_default("SigBlk:\tno number\n", 2));
    }
}
