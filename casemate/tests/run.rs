//! `casemate run` for real: needs root and the three binaries of one build.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use casemate_tests::skip::{Outcome, skip, skipped, tell_unsteady, trial};
use casemate_tests::{ensure, ensure_eq, leaks};
use libtest_mimic::Arguments;
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::Winsize;

/// For any one run.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads = args.test_threads.or(Some(2));
    let trials = vec![
        trial(
            "the_exit_status_is_the_commands",
            the_exit_status_is_the_commands,
        ),
        trial("the_two_outputs_stay_apart", the_two_outputs_stay_apart),
        trial("a_pipe_goes_through_whole", a_pipe_goes_through_whole),
        trial("a_reader_that_leaves_ends_it", a_reader_that_leaves_ends_it),
        trial("the_command_is_locked_in", the_command_is_locked_in),
        trial(
            "a_root_of_ones_own_is_read_only_unless_asked",
            a_root_of_ones_own,
        ),
        trial("one_program_alone_runs", one_program_alone_runs),
        trial("what_is_missing_is_named", what_is_missing_is_named),
        trial("a_chroot_is_told_of", a_chroot_is_told_of),
        trial("ctrl_c_ends_it_and_nothing_is_left", ctrl_c_ends_it),
        trial("a_handler_gets_the_signal", a_handler_gets_the_signal),
        trial(
            "a_terminal_is_one_and_comes_back_as_it_was",
            a_terminal_is_one,
        ),
    ];
    let conclusion = libtest_mimic::run(&args, trials);
    for (name, reason) in skipped() {
        println!("{name}: skipped: {reason}");
    }
    tell_unsteady();
    // None of these may be skipped in CI: it has root, and all binaries.
    if std::env::var_os("CI").is_some() && !skipped().is_empty() {
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// The program, with a directory of its own for everything it makes.
struct Bench {
    program: PathBuf,
    dir: PathBuf,
}

impl Bench {
    fn new(name: &str) -> Result<Bench, casemate_tests::skip::Stop> {
        if !rustix::process::geteuid().is_root() {
            return skip("needs root");
        }
        let own = PathBuf::from(env!("CARGO_BIN_EXE_casemate"));
        let dir = std::env::var_os("CASEMATE_TEST_BIN_DIR").map_or_else(
            || own.parent().unwrap_or(Path::new("/")).to_owned(),
            PathBuf::from,
        );
        for binary in ["casemate", "casemate-agent", "containerd-shim-casemate-v2"] {
            if !dir.join(binary).is_file() {
                return skip(format!("{binary} is not in {}: build it", dir.display()));
            }
        }
        if !Path::new("/bin/busybox").exists() {
            return skip("no /bin/busybox: install busybox-static");
        }
        let temporary = std::env::temp_dir().join(format!("cr-{}-{name}", std::process::id()));
        fs::create_dir(&temporary)?;
        Ok(Bench {
            program: dir.join("casemate"),
            dir: temporary,
        })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("run")
            .args(args)
            .env("TMPDIR", &self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> std::io::Result<Output> {
        let child = self.command(args).spawn()?;
        finish(child)
    }

    /// The directory of the run that is under way: its name is the container's id.
    fn id(&self) -> Option<String> {
        let entry = fs::read_dir(&self.dir).ok()?.flatten().next()?;
        Some(entry.file_name().to_string_lossy().into_owned())
    }

    /// What the runs have left in their directory.
    fn left(&self) -> Vec<String> {
        fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().display().to_string())
            .collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Waits for the end, and kills what takes too long.
fn finish(mut child: Child) -> std::io::Result<Output> {
    let mut streams = (child.stdout.take(), child.stderr.take());
    let out = std::thread::spawn(move || read(streams.0.as_mut()));
    let err = std::thread::spawn(move || read(streams.1.as_mut()));
    let until = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            return Err(std::io::Error::other("casemate did not end in time"));
        }
        sleep(Duration::from_millis(10));
    };
    Ok(Output {
        status,
        stdout: out.join().unwrap_or_default(),
        stderr: err.join().unwrap_or_default(),
    })
}

fn read(stream: Option<&mut impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        let _ = stream.read_to_end(&mut bytes);
    }
    bytes
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Outcome {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        ensure!(Instant::now() < end, "{what} did not happen within 10 s");
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn send(child: &Child, signal: Signal) -> Outcome {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    ensure!(pid.is_some(), "no pid");
    if let Some(pid) = pid {
        rustix::process::kill_process(pid, signal)?;
    }
    Ok(())
}

fn the_exit_status_is_the_commands() -> Outcome {
    let bench = Bench::new("status")?;
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("sh -c 'kill -9 $$'; exit $?", 137),
    ] {
        let output = bench.run(&["--", "sh", "-c", script])?;
        ensure_eq!(output.status.code(), Some(status), "{script}: {output:?}");
    }
    Ok(())
}

fn the_two_outputs_stay_apart() -> Outcome {
    let bench = Bench::new("apart")?;
    let output = bench.run(&["sh", "-c", "echo out; echo err >&2"])?;
    ensure_eq!(text(&output.stdout), "out\n", "stdout");
    ensure_eq!(text(&output.stderr), "err\n", "stderr");
    Ok(())
}

fn a_pipe_goes_through_whole() -> Outcome {
    let bench = Bench::new("pipe")?;
    let mut child = bench.command(&["cat"]).stdin(Stdio::piped()).spawn()?;
    // More than all pipes and fifos on the way hold together.
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut stdin = child.stdin.take();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || {
        if let Some(stdin) = &mut stdin {
            let _ = stdin.write_all(&copy);
        }
    });
    let output = finish(child)?;
    let _ = writer.join();
    ensure_eq!(output.status.code(), Some(0), "status");
    ensure!(
        output.stdout == sent,
        "{} of {} bytes came back, or others",
        output.stdout.len(),
        sent.len()
    );
    Ok(())
}

fn a_reader_that_leaves_ends_it() -> Outcome {
    let bench = Bench::new("leaves")?;
    let mut child = bench.command(&["yes"]).spawn()?;
    let mut first = [0u8; 2];
    if let Some(stdout) = &mut child.stdout {
        stdout.read_exact(&mut first)?;
    }
    drop(child.stdout.take());
    let output = finish(child)?;
    ensure_eq!(&first, b"y\n", "what was read");
    ensure_eq!(output.status.code(), Some(128 + 13), "status");
    ensure_eq!(bench.left(), Vec::<String>::new(), "left behind");
    Ok(())
}

fn the_command_is_locked_in() -> Outcome {
    let bench = Bench::new("locked")?;
    let output = bench.run(&[
        "sh",
        "-c",
        "cat /proc/self/uid_map /proc/self/status; ls /proc | grep -c '^[0-9]'; touch /x",
    ])?;
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let map: Vec<&str> = out
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    ensure_eq!(map.get(..3).map(<[_]>::len), Some(3), "uid_map");
    ensure!(
        map != ["0", "0", "4294967295"],
        "no user namespace: {map:?}"
    );
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(out.lines().any(|l| l == line), "no {line:?} in {out}");
    }
    let bounding = out.lines().find_map(|l| l.strip_prefix("CapBnd:\t"));
    let bounding = bounding.and_then(|hex| u64::from_str_radix(hex, 16).ok());
    // CAP_SYS_ADMIN, CAP_NET_RAW, CAP_MKNOD (capabilities(7)).
    ensure!(
        bounding.is_some_and(|caps| caps & (1 << 21 | 1 << 13 | 1 << 27) == 0),
        "bounding set {bounding:?}"
    );
    ensure!(
        err.contains("Read-only file system"),
        "the root is writable: {err}"
    );
    Ok(())
}

fn a_root_of_ones_own() -> Outcome {
    let bench = Bench::new("root")?;
    let root = std::env::temp_dir().join(format!("cr-{}-given", std::process::id()));
    for name in ["bin", "dev", "proc", "sys", "run"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/sh"))?;
    let shown = root.display().to_string();
    let script = "echo x > /file";
    let refused = bench.run(&["--rootfs", &shown, "--", "sh", "-c", script])?;
    let untouched = !root.join("file").exists();
    let written = bench.run(&["--rootfs", &shown, "--writable", "--", "sh", "-c", script])?;
    let content = fs::read_to_string(root.join("file"));
    let owner = fs::metadata(root.join("file")).map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    fs::remove_dir_all(&root)?;
    ensure!(refused.status.code() != Some(0) && untouched, "{refused:?}");
    ensure_eq!(
        written.status.code(),
        Some(0),
        "with --writable: {written:?}"
    );
    ensure_eq!(content?, "x\n", "content");
    ensure_eq!(owner?, 0, "owner on disk");
    Ok(())
}

/// A release's one file, with nothing of casemate's beside it or in PATH.
fn one_program_alone_runs() -> Outcome {
    let mut bench = Bench::new("alone")?;
    let place = tempfile::tempdir()?;
    let alone = place.path().join("casemate");
    let carried = Command::new(&bench.program)
        .arg("carry")
        .arg("--output")
        .arg(&alone)
        .status()?;
    ensure!(carried.success(), "carry: {carried}");
    bench.program = alone;
    let unpacked = || -> Vec<String> {
        let entries = fs::read_dir("/var/lib").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("casemate-")).collect()
    };
    let output = bench.run(&["--", "sh", "-c", "id -u; exit 7"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure_eq!(output.status.code(), Some(7), "exit status: {said}");
    ensure_eq!(output.stdout, b"0\n", "output: {said}");
    ensure_eq!(unpacked(), Vec::<String>::new(), "left in /var/lib");
    ensure_eq!(bench.left(), Vec::<String>::new(), "left");
    Ok(())
}

fn what_is_missing_is_named() -> Outcome {
    let bench = Bench::new("missing")?;
    let empty = tempfile::tempdir()?;
    let empty = empty.path().display().to_string();
    // 126 and 127 as shells and other runtimes have it.
    for (args, name, status) in [
        (&["no-such-program"][..], "no-such-program", 127),
        (&["/no/such/program"][..], "/no/such/program", 127),
        (&["/etc/passwd"][..], "/etc/passwd", 126),
        (
            &["--rootfs", "/no/such/root", "id"][..],
            "/no/such/root",
            125,
        ),
        // Not even a place for /proc.
        (&["--rootfs", &empty, "id"][..], "have it in the root", 125),
        (&["-t", "id"][..], "not a terminal", 125),
    ] {
        let output = bench.run(args)?;
        let err = text(&output.stderr);
        ensure_eq!(output.status.code(), Some(status), "{args:?}");
        ensure!(err.contains(name), "{name} is not in {err:?}");
        ensure_eq!(err.lines().count(), 1, "lines of {err:?}");
        ensure_eq!(
            bench.left(),
            Vec::<String>::new(),
            "left behind by {args:?}"
        );
    }
    Ok(())
}

/// Reads "up\n"; a child that ends before is asked why.
/// As of `kubectl debug node/…`: the kernel's own answer doesn't say why.
fn a_chroot_is_told_of() -> Outcome {
    let bench = Bench::new("chroot")?;
    let place = tempfile::tempdir()?;
    let script = "mount --rbind / \"$D\"; exec chroot \"$D\" \"$0\" run -- id";
    let child = Command::new("unshare")
        .args(["--mount", "--", "sh", "-ec", script])
        .arg(&bench.program)
        .env("D", place.path())
        .env("TMPDIR", &bench.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = finish(child)?;
    let err = text(&output.stderr);
    ensure_eq!(output.status.code(), Some(125), "{err}");
    ensure!(
        err.ends_with("nsenter -t 1 -m -- casemate run\n") && err.lines().count() == 1,
        "{err:?}"
    );
    ensure_eq!(bench.left(), Vec::<String>::new(), "left behind");
    Ok(())
}

fn until_up(child: &mut Child) -> Outcome {
    let mut up = [0u8; 3];
    let read = child.stdout.as_mut().map(|out| out.read_exact(&mut up));
    if matches!(read, Some(Ok(()))) {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut said)?;
    }
    ensure!(
        false,
        "ended with {:?} before it was up: {said}",
        child.wait()?
    );
    Ok(())
}

fn ctrl_c_ends_it() -> Outcome {
    let bench = Bench::new("interrupt")?;
    let mut child = bench
        .command(&["sh", "-c", "echo up; exec sleep 1000"])
        .spawn()?;
    until_up(&mut child)?;
    let id = bench.id().unwrap_or_default();
    ensure!(
        id.starts_with("casemate-run-"),
        "no directory of the run: {id:?}"
    );
    let seen = leaks::with_mark(&id);
    ensure!(
        seen.iter().any(|s| s.starts_with("process")) && seen.iter().any(|s| s.contains("cgroup")),
        "the search for leaks is blind: {seen:?}"
    );
    send(&child, Signal::INT)?;
    let output = finish(child)?;
    ensure_eq!(output.status.code(), Some(128 + 2), "status");
    until("a clean host", || {
        leaks::with_mark(&id).is_empty() && bench.left().is_empty()
    })
}

fn a_handler_gets_the_signal() -> Outcome {
    let bench = Bench::new("handler")?;
    let script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.05; done";
    let mut child = bench.command(&["sh", "-c", script]).spawn()?;
    until_up(&mut child)?;
    send(&child, Signal::TERM)?;
    let output = finish(child)?;
    ensure_eq!(text(&output.stdout), "caught\n", "stdout");
    ensure_eq!(output.status.code(), Some(3), "status");
    Ok(())
}

fn a_terminal_is_one() -> Outcome {
    let bench = Bench::new("terminal")?;
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let size = Winsize {
        ws_row: 33,
        ws_col: 77,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&master, size)?;
    let path = Path::new(OsStr::new(name.to_str().unwrap_or_default())).to_owned();
    let open = || fs::OpenOptions::new().read(true).write(true).open(&path);
    let before = rustix::termios::tcgetattr(open()?)?;
    let script = "stty size; tty; read line; echo got $line; exit 5";
    let mut command = bench.command(&["-t", "--", "sh", "-c", script]);
    let slave = open()?;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave.try_clone()?);
    let mut child = command.spawn()?;
    drop(command);
    let mut terminal = fs::File::from(master);
    let mut seen = String::new();
    let mut buffer = [0u8; 256];
    while !seen.contains("/dev/pts/") {
        let length = terminal.read(&mut buffer)?;
        seen.push_str(&text(buffer.get(..length).unwrap_or_default()));
    }
    terminal.write_all(b"word\r")?;
    while !seen.contains("got word") {
        let length = terminal.read(&mut buffer)?;
        seen.push_str(&text(buffer.get(..length).unwrap_or_default()));
    }
    let status = child.wait()?;
    ensure_eq!(status.code(), Some(5), "status; {seen:?}");
    ensure!(seen.contains("33 77"), "size of the terminal: {seen:?}");
    let after = rustix::termios::tcgetattr(&slave)?;
    ensure_eq!(after.local_modes, before.local_modes, "local modes");
    ensure_eq!(after.input_modes, before.input_modes, "input modes");
    Ok(())
}
