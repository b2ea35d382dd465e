//! containerd's program, as a witness of what a configuration means, and its
//! restart.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Restarting;
use super::layout::Layout;
use crate::error::{RunError, Step, one_line};

/// For anything that only reads.
const SOON: Duration = Duration::from_secs(30);
/// The oldest release that the shim is tested with.
const OLDEST: (u32, u32) = (1, 6);

/// A release of containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Major and minor number.
    pub number: (u32, u32),
    /// As it says itself.
    pub text: String,
}

/// What a program said.
pub struct Said {
    /// Whether its status was 0.
    pub success: bool,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Said {
    /// The end of what it complained of, in one line.
    pub fn tail(&self) -> String {
        let text = if self.err.trim().is_empty() {
            &self.out
        } else {
            &self.err
        };
        let last = text.trim().lines().next_back().unwrap_or("it said nothing");
        one_line(last).chars().take(400).collect()
    }

    /// The first thing that it complained of, in one line.
    fn head(&self) -> String {
        let first = self.err.trim().lines().next();
        let first = first.unwrap_or("it said nothing");
        one_line(first).chars().take(400).collect()
    }
}

/// Runs a program to its end, or to the limit's, in a process group of its own.
pub fn bounded(command: &mut Command, limit: Duration) -> std::io::Result<Said> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let (out, err) = (gather(child.stdout.take()), gather(child.stderr.take()));
    let until = Instant::now() + limit;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            None => {
                if let Some(group) = i32::try_from(child.id())
                    .ok()
                    .and_then(rustix::process::Pid::from_raw)
                {
                    let _gone =
                        rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
                }
                let _reaped = child.wait();
                return Err(std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    format!("no end after {} s", limit.as_secs()),
                ));
            }
        }
    };
    // A daemon that keeps the pipes open is not waited for.
    let text = |pipe: std::sync::mpsc::Receiver<Vec<u8>>| {
        let bytes = pipe
            .recv_timeout(Duration::from_secs(2))
            .unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(Said {
        success: status.success(),
        out: text(out),
        err: text(err),
    })
}

fn gather<R: Read + Send + 'static>(pipe: Option<R>) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipe {
            let _cut_short = pipe.read_to_end(&mut all);
        }
        let _nobody = send.send(all);
    });
    receive
}

/// Which release it is; an error if it is too old.
pub fn release(program: &Path) -> Result<Release, RunError> {
    let said = bounded(Command::new(program).arg("--version"), SOON)
        .step("run --version of", program.display())?;
    let release = parse_release(&said.out).ok_or_else(|| {
        RunError::Refused(format!(
            "check {}: --version says {:?}, which is no release of containerd; name the program \
             with --containerd",
            program.display(),
            one_line(&said.out)
        ))
    })?;
    if release.number < OLDEST {
        return Err(RunError::Refused(format!(
            "check {}: containerd {} is too old: casemate needs {}.{} or later",
            program.display(),
            release.text,
            OLDEST.0,
            OLDEST.1
        )));
    }
    Ok(release)
}

fn parse_release(text: &str) -> Option<Release> {
    let word = text
        .split_whitespace()
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = word.split(|c: char| !c.is_ascii_digit());
    let mut next = || parts.next()?.parse().ok();
    Some(Release {
        number: (next()?, next()?),
        text: word.to_owned(),
    })
}

/// What containerd makes of a configuration: of that file, or of none.
pub fn effective(program: &Path, config: Option<&Path>) -> Result<String, RunError> {
    let mut command = Command::new(program);
    match config {
        Some(path) => command.arg("--config").arg(path).args(["config", "dump"]),
        None => command.args(["config", "default"]),
    };
    let said = bounded(&mut command, SOON).step("run config dump of", program.display())?;
    if said.success {
        return Ok(said.out);
    }
    Err(RunError::Refused(format!(
        "check {}: containerd can't read it: {}",
        config.map_or("its defaults".to_owned(), |path| path.display().to_string()),
        said.tail()
    )))
}

/// Restarts containerd; `None` if somebody else is to.
pub fn restart(how: &Restarting, layout: &Layout) -> Option<Result<(), RunError>> {
    if how.no_restart {
        return None;
    }
    let shown = describe(how, layout);
    let limit = Duration::from_secs(how.timeout.saturating_add(30));
    let Some(text) = &how.restart_command else {
        return Some(by_systemd(how.unit(layout), limit));
    };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", text]);
    Some(match bounded(&mut command, limit) {
        Ok(said) if said.success => Ok(()),
        Ok(said) => Err(RunError::Refused(format!(
            "restart containerd: {shown}: {}",
            said.tail()
        ))),
        Err(error) => Err(RunError::Refused(format!(
            "restart containerd: {shown}: {error}"
        ))),
    })
}

fn by_systemd(unit: &str, limit: Duration) -> Result<(), RunError> {
    let systemctl = |verb: &str| {
        let mut command = Command::new("systemctl");
        // --host-root is the host's root, whatever systemctl makes of it.
        command.env("SYSTEMD_IGNORE_CHROOT", "1").args([verb, unit]);
        bounded(&mut command, limit)
    };
    // systemd counts starts, also those that a configuration of ours made fail, and
    // refuses the one that is too many: the way back would end without containerd.
    let _never_failed = systemctl("reset-failed");
    let shown = format!("systemctl restart {unit}");
    match systemctl("restart") {
        Ok(said) if said.success => Ok(()),
        Ok(said) => Err(RunError::Refused(format!(
            "restart containerd: {shown}: {}; journalctl -u {unit} has the reason, --unit names \
             another service",
            said.head().trim_end_matches('.')
        ))),
        Err(error) => Err(RunError::Refused(format!(
            "restart containerd: {shown}: {error}; without systemd, use --restart-command or \
             --no-restart"
        ))),
    }
}

/// The command, for people.
pub fn describe(how: &Restarting, layout: &Layout) -> String {
    match &how.restart_command {
        Some(text) => one_line(text),
        None => format!("systemctl restart {}", how.unit(layout)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_read_from_what_distributions_print() {
        for (text, number) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                (1, 6),
            ),
            (
                "containerd github.com/containerd/containerd/v2 2.3.4+unknown ",
                (2, 3),
            ),
            (
                "containerd containerd.io v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da",
                (1, 7),
            ),
            (
                "containerd github.com/k3s-io/containerd v2.1.4-k3s1 ",
                (2, 1),
            ),
        ] {
            assert_eq!(parse_release(text).unwrap().number, number, "{text}");
        }
        assert_eq!(parse_release("runc version"), None);
    }

    #[test]
    fn a_program_without_end_is_ended() {
        let begun = Instant::now();
        let mut command = Command::new("/bin/sh");
        let limit = Duration::from_millis(100);
        let error = bounded(command.args(["-c", "sleep 30; echo no"]), limit).err();
        assert_eq!(error.unwrap().kind(), std::io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
