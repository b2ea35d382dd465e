//! 65, 66, 94: terminals of init and of execs.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::stdio::{Reader, make_fifo, open_reader, read_until};
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::{CreateTaskResponse, Empty, ResizePtyRequest};
use rustix::fs::OFlags;
use serde_json::json;

use crate::common::{LONG, RUNNING, casemate_only, expect_code, status};
use crate::hostile_node::configure;

crate::trials![
    c065_terminal_of_an_exec,
    c066_resize,
    c066_resize_before_start,
    c094_terminal_of_init,
    c094_terminal_has_no_stderr,
    c094_job_control,
    c094_output_is_drained_at_exit,
    terminal_in_each_profile,
    terminal_hangs_up_when_the_shim_lets_go,
    terminal_client_goes_and_returns,
    terminal_ends_without_its_slave,
];

/// A task whose init has a terminal of 24 × 80, not yet created.
fn on_terminal(name: &str, args: &[&str]) -> Result<Task, Stop> {
    let mut task = Task::new(name, args)?;
    task.spec["process"]["terminal"] = json!(true);
    task.spec["process"]["consoleSize"] = json!({"height": 24, "width": 80});
    task.stdio[0] = task.side.join("stdin").display().to_string();
    task.stdio[2] = String::new();
    Ok(task)
}

fn create(task: &mut Task) -> Outcome {
    task.boot()?;
    let mut request = task.create_request();
    request.terminal = true;
    let _: CreateTaskResponse = task.rpc()?.call("Create", &request, SHORT)?;
    Ok(())
}

/// nerdctl names a fifo that nobody has made.
fn c094_terminal_has_no_stderr() -> Outcome {
    let script = "test -t 2 && echo terminal >&2";
    let mut task = on_terminal("c094e", &["/bin/sh", "-c", script])?;
    task.stdio[2] = task.side.join("none/stderr").display().to_string();
    create(&mut task)?;
    let ended = task.start_and_wait()?;
    ensure_eq!(ended.exit_status, 0, "exit status");
    ensure_eq!(task.stdout.text(SHORT)?, "terminal\r\n", "output");
    Ok(task.finish()?)
}

/// The client's side of a terminal's input.
struct Keys(std::fs::File);

impl Keys {
    fn at(path: &Path) -> Result<Self, Stop> {
        let mut file = None;
        until("the shim's end of stdin", SHORT, || {
            file = OpenOptions::new()
                .write(true)
                .custom_flags(OFlags::NONBLOCK.bits() as i32)
                .open(path)
                .ok();
            file.is_some()
        })?;
        match file {
            Some(file) => Ok(Self(file)),
            None => fail("no stdin"),
        }
    }

    fn press(&mut self, keys: &str) -> Outcome {
        Ok(self.0.write_all(keys.as_bytes())?)
    }
}

/// What has been shown after the last `mark`.
fn after(reader: &Reader, mark: &str) -> String {
    let text = String::from_utf8_lossy(&reader.so_far()).into_owned();
    let from = text.rfind(mark).map_or(text.len(), |at| at + mark.len());
    text[if mark.is_empty() { 0 } else { from }..].to_owned()
}

fn c065_terminal_of_an_exec() -> Outcome {
    let task = Task::sleeping("c065")?;
    let script = "tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo all; echo err >&2; \
                  echo own > /dev/tty; ps -o pid,tty >/dev/null; exit 4";
    let exec = Exec::sh(&task, "e", script)?.with_terminal(33, 99)?;
    exec.begin()?;
    ensure_eq!(exec.wait()?, 4, "exit status");
    let shown = exec.state()?;
    ensure!(shown.terminal, "State doesn't know the terminal");
    exec.delete()?;
    let text = exec.stdout.text(SHORT)?;
    let lines: Vec<&str> = text.split("\r\n").collect();
    ensure!(lines[0].starts_with("/dev/pts/"), "tty: {text:?}");
    ensure_eq!(
        lines[1..],
        ["33 99", "all", "err", "own", ""],
        "what was shown"
    );
    // It belongs to the user of the exec, and another exec has another.
    let mut user = Exec::sh(&task, "u", "stat -c %u:%g $(tty); echo x >$(tty)")?;
    user.process["user"] = json!({"uid": 1000, "gid": 1000});
    let user = user.with_terminal(0, 0)?;
    ensure_eq!(
        user.run()?,
        (0, "1000:5\r\nx\r\n".to_owned()),
        "terminal of a user"
    );
    Ok(task.finish()?)
}

const SIZES: &str = "trap 'echo size $(stty size)' WINCH; echo up; while :; do sleep 0.05; done";

fn c066_resize() -> Outcome {
    let mut task = on_terminal("c066", &["/bin/sh", "-c", SIZES])?;
    create(&mut task)?;
    task.rpc()?.start(&task.id)?;
    let exec = Exec::sh(&task, "e", SIZES)?.with_terminal(20, 60)?;
    exec.begin()?;
    for reader in [&task.stdout, &exec.stdout] {
        reader.until("up", SHORT)?;
    }
    // busybox takes a size below 2 or above 29999 for nonsense.
    for (rows, columns) in [(50, 132), (2, 3), (9_999, 29_000)] {
        exec.resize(rows, columns)?;
        let want = format!("size {rows} {columns}");
        exec.stdout.until(&want, SHORT)?;
        let init = ResizePtyRequest {
            id: task.id.clone(),
            width: columns,
            height: rows,
            ..Default::default()
        };
        let _: Empty = task.rpc()?.call("ResizePty", &init, SHORT)?;
        task.stdout.until(&want, SHORT)?;
    }
    // Without a terminal there is nothing to do, and that is fine.
    let plain = Exec::new(&task, "plain", &["/bin/probe", "sleep"])?;
    plain.begin()?;
    plain.resize(10, 10)?;
    Ok(task.finish()?)
}

fn c066_resize_before_start() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c066b")?;
    let exec = Exec::sh(&task, "e", "sleep 0.3; stty size")?.with_terminal(20, 60)?;
    exec.add()?;
    exec.resize(44, 144)?;
    exec.start()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    ensure_eq!(exec.stdout.text(SHORT)?, "44 144\r\n", "size");
    Ok(task.finish()?)
}

fn c094_terminal_of_init() -> Outcome {
    let script = "stty size; test -t 0 && test -t 1 && test -t 2 && echo all; \
                  [ $(stat -c %t:%T $(tty)) = $(stat -c %t:%T /dev/console) ] && echo console; \
                  echo there > /dev/console; echo own > /dev/tty; exit 6";
    let mut task = on_terminal("c094", &["/bin/sh", "-c", script])?;
    create(&mut task)?;
    ensure_eq!(task.start_and_wait()?.exit_status, 6, "exit status");
    task.rpc()?.delete(&task.id)?;
    let text = task.stdout.text(SHORT)?;
    let lines: Vec<&str> = text.split("\r\n").collect();
    ensure_eq!(
        lines,
        ["24 80", "all", "console", "there", "own", ""],
        "what was shown"
    );
    task.rpc()?.shutdown(&task.id)?;
    Ok(())
}

fn c094_job_control() -> Outcome {
    let mut task = on_terminal("c094j", &["/bin/sh", "-i"])?;
    task.spec["process"]["env"] = json!(["PATH=/bin", "PS1=ready> "]);
    create(&mut task)?;
    task.rpc()?.start(&task.id)?;
    let exec = Exec::new(&task, "e", &["/bin/sh", "-i"])?.with_terminal(24, 80)?;
    exec.begin()?;
    jobs(&exec.stdout, &exec.stdin())?;
    ensure_eq!(exec.wait()?, 9, "exit of the exec's shell");
    // Last: with init all others end.
    jobs(&task.stdout, &task.side.join("stdin"))?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, SHORT)?.exit_status,
        9,
        "exit of init's shell"
    );
    Ok(task.finish()?)
}

/// A shell's terminal by an exec: size, keys that are signals, and job control, behind
/// each profile's list of requests.
fn terminal_in_each_profile() -> Outcome {
    casemate_only()?;
    for profile in ["strict", "compat"] {
        let mut task = Task::new("profterm", &["/bin/probe", "sleep"])?;
        configure(&mut task, &format!("profile = \"{profile}\"\n"))?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        let size = Exec::sh(&task, "s", SIZES)?.with_terminal(20, 60)?;
        size.begin()?;
        size.stdout.until("up", SHORT)?;
        size.resize(50, 132)?;
        size.stdout.until("size 50 132", SHORT)?;
        let mut exec = Exec::new(&task, "e", &["/bin/sh", "-i"])?;
        exec.process["env"] = json!(["PATH=/bin", "PS1=ready> "]);
        let exec = exec.with_terminal(24, 80)?;
        exec.begin()?;
        jobs(&exec.stdout, &exec.stdin())?;
        ensure_eq!(exec.wait()?, 9, "{profile}: exit of the exec's shell");
        task.finish()?;
    }
    Ok(())
}

/// What a shell with job control does with a terminal of its own.
fn jobs(reader: &Reader, stdin: &Path) -> Outcome {
    let mut keys = Keys::at(stdin)?;
    let prompt = "ready> ";
    reader.until(prompt, SHORT)?;
    let shows = |what: &str, mark: &str| {
        until(&format!("{what:?} after {mark:?}"), SHORT, || {
            after(reader, mark).contains(what)
        })
        .map_err(|e| Stop::Fail(format!("{e}; shown: {:?}", after(reader, ""))))
    };
    // ^C ends what runs, not the shell.
    keys.press("echo begin-c; sleep 1000\n")?;
    shows("\nbegin-c", "")?;
    std::thread::sleep(Duration::from_millis(300));
    keys.press("\x03")?;
    keys.press("echo code-$?\n")?;
    shows("code-130", "begin-c")?;
    // ^Z stops it; it can go on behind and in front.
    keys.press("echo begin-z; sleep 1000\n")?;
    shows("\nbegin-z", "code-130")?;
    std::thread::sleep(Duration::from_millis(300));
    keys.press("\x1a")?;
    shows("Stopped", "begin-z")?;
    keys.press("bg\n")?;
    keys.press("jobs; echo listed\n")?;
    shows("Running", "Stopped")?;
    shows("\nlisted", "Running")?;
    keys.press("fg\n")?;
    std::thread::sleep(Duration::from_millis(300));
    keys.press("\x03")?;
    keys.press("echo back-$?\n")?;
    shows("back-130", "listed")?;
    // ^\ is SIGQUIT, ^D the end.
    keys.press("echo begin-q; sleep 1000\n")?;
    shows("\nbegin-q", "back-130")?;
    std::thread::sleep(Duration::from_millis(300));
    keys.press("\x1c")?;
    keys.press("echo quit-$?\n")?;
    shows("quit-131", "begin-q")?;
    keys.press("trap 'exit 9' EXIT\n")?;
    keys.press("\x04")
}

fn c094_output_is_drained_at_exit() -> Outcome {
    let size = 1 << 20;
    let script = format!("stty raw; exec probe burst {size}");
    let want: Vec<u8> = (0..size / 8u64).flat_map(u64::to_le_bytes).collect();
    let mut task = on_terminal("c094d", &["/bin/sh", "-c", &script])?;
    create(&mut task)?;
    let begun = Instant::now();
    task.rpc()?.start(&task.id)?;
    ensure_eq!(task.rpc()?.wait(&task.id, LONG)?.exit_status, 0, "init");
    task.rpc()?.delete(&task.id)?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(9), "it took {took:?}");
    ensure!(
        task.stdout.all(SHORT)? == want,
        "init's output is not whole"
    );
    task.finish()?;

    let task = Task::sleeping("c094de")?;
    let exec = Exec::sh(&task, "e", &script)?.with_terminal(0, 0)?;
    exec.begin()?;
    ensure_eq!(exec.wait_within(LONG)?, 0, "exec");
    exec.delete()?;
    ensure!(
        exec.stdout.all(SHORT)? == want,
        "the exec's output is not whole"
    );
    Ok(task.finish()?)
}

fn terminal_hangs_up_when_the_shim_lets_go() -> Outcome {
    let task = Task::sleeping("hangup")?;
    // The shell ends; what it leaves behind holds the terminal, and is told
    // when the last of the other side goes.
    let script = "(trap '' HUP; while echo x 2>/dev/null; do sleep 0.1; done; echo told >/tmp/told) & \
                  sleep 0.5; exit 0";
    let exec = Exec::sh(&task, "e", script)?.with_terminal(0, 0)?;
    exec.begin()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.stdout.until("x\r\nx", SHORT)?;
    let told = task.side.join("upper/tmp/told");
    ensure!(!told.exists(), "hung up before Delete");
    let begun = Instant::now();
    exec.delete()?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(13), "Delete took {took:?}");
    until("the rest to be told", SHORT, || told.exists())?;
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

/// Fifos whose ends the test opens itself.
fn quiet(task: &Task, name: &str) -> Result<PathBuf, Stop> {
    let path = task.side.join(name);
    make_fifo(&path)?;
    Ok(path)
}

fn terminal_client_goes_and_returns() -> Outcome {
    let mut task = on_terminal(
        "detach",
        &["/bin/sh", "-c", "while read x; do echo [$x]; done"],
    )?;
    let out = quiet(&task, "quiet")?;
    task.stdio[1] = out.display().to_string();
    let stdin = task.side.join("stdin");
    create(&mut task)?;
    task.rpc()?.start(&task.id)?;
    for word in ["one", "two", "three"] {
        let mut reader = open_reader(&out)?;
        let mut keys = Keys::at(&stdin)?;
        keys.press(&format!("{word}\n"))?;
        read_until(&mut reader, &format!("[{word}]"), SHORT)?;
        // Both ends go, as with a daemon that restarts.
        drop((reader, keys));
        std::thread::sleep(Duration::from_millis(200));
        ensure_eq!(status(&task)?, RUNNING, "state after {word}");
    }
    // What is shown meanwhile waits for the next reader.
    let mut keys = Keys::at(&stdin)?;
    keys.press("late\n")?;
    drop(keys);
    std::thread::sleep(Duration::from_millis(300));
    let mut reader = open_reader(&out)?;
    read_until(&mut reader, "[late]", SHORT)?;
    drop(reader);
    Ok(task.finish()?)
}

fn terminal_ends_without_its_slave() -> Outcome {
    let task = Task::sleeping("noslave")?;
    // Nobody has the terminal any more, and its process lives on.
    let script = "echo last; exec <&- >&- 2>&-; exec probe sleep";
    let exec = Exec::sh(&task, "e", script)?.with_terminal(0, 0)?;
    exec.begin()?;
    exec.stdout.until("last", SHORT)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure_eq!(status(&task)?, RUNNING, "state");
    expect_code(
        "Delete, running",
        exec.delete(),
        ttrpc::Code::FAILED_PRECONDITION,
    )?;
    exec.kill(9)?;
    ensure_eq!(exec.wait()?, 137, "exit status");
    let begun = Instant::now();
    exec.delete()?;
    ensure!(
        begun.elapsed() < Duration::from_secs(2),
        "Delete was slow: {:?}",
        begun.elapsed()
    );
    ensure_eq!(exec.stdout.text(SHORT)?, "last\r\n", "output");
    Ok(task.finish()?)
}
