//! 90: output to files, of init, of execs and of terminals, and files that can't
//! be written.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::stdio::make_fifo;
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::CreateTaskResponse;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::json;

use crate::common::{RUNNING, casemate_only, expect_text, status};

crate::trials![
    c090_log_file_of_init_and_exec,
    c090_log_file_of_a_terminal,
    c090_log_file_that_cannot_be,
    c090_log_file_on_a_full_disk,
    c091_logging_binary_of_an_exec_on_a_terminal,
    c092_logging_binary_v2_of_an_exec,
];

fn c090_log_file_of_init_and_exec() -> Outcome {
    let script = "echo out-1; echo err-1 >&2; exec probe sleep";
    let mut task = Task::new("c090", &["/bin/sh", "-c", script])?;
    let path = task.side.join("made/on/demand/x.log");
    let uri = format!("file://{}", path.display());
    task.stdio = [String::new(), uri.clone(), uri.clone()];
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let lines = |n: usize| -> casemate_tests::Result<Vec<String>> {
        let mut text = String::new();
        until(&format!("{n} lines"), SHORT, || {
            text = fs::read_to_string(&path).unwrap_or_default();
            text.lines().count() >= n
        })?;
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        // Two pipes have no order between them.
        lines.sort();
        Ok(lines)
    };
    ensure_eq!(lines(2)?, ["err-1", "out-1"], "both streams");
    let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
    ensure_eq!(mode, 0o644, "mode of the file");
    let dir = path.parent().map(fs::metadata).transpose()?;
    let mode = dir.map(|m| m.permissions().mode() & 0o777);
    ensure_eq!(mode, Some(0o755), "mode of its directory");
    // What others write into it stays: it is appended to.
    let mut exec = Exec::sh(&task, "e", "echo out-2; echo err-2 >&2; exit 3")?;
    exec.stdio = [String::new(), uri.clone(), uri];
    exec.begin()?;
    ensure_eq!(exec.wait()?, 3, "exit status");
    exec.delete()?;
    ensure_eq!(lines(4)?, ["err-1", "err-2", "out-1", "out-2"], "appended");
    Ok(task.finish()?)
}

fn c090_log_file_of_a_terminal() -> Outcome {
    let mut task = Task::new(
        "c090t",
        &["/bin/sh", "-c", "test -t 1 && echo init; exec probe sleep"],
    )?;
    let path = task.side.join("t.log");
    let uri = format!("file://{}", path.display());
    task.spec["process"]["terminal"] = json!(true);
    task.stdio = [String::new(), uri.clone(), String::new()];
    task.boot()?;
    let mut request = task.create_request();
    request.terminal = true;
    let _: CreateTaskResponse = task.rpc()?.call("Create", &request, SHORT)?;
    task.rpc()?.start(&task.id)?;
    let has = |part: &str| {
        until(&format!("{part:?} in the file"), SHORT, || {
            fs::read_to_string(&path).is_ok_and(|text| text.contains(part))
        })
    };
    has("init\r\n")?;
    let mut exec = Exec::sh(&task, "e", "test -t 1 && echo exec")?.with_terminal(0, 0)?;
    exec.stdio[1] = uri;
    exec.begin()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    has("exec\r\n")?;
    Ok(task.finish()?)
}

fn c090_log_file_that_cannot_be() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c090n", &["/bin/true"])?;
    let (fifo, dir, plain) = (
        task.side.join("p"),
        task.side.join("d"),
        task.side.join("f"),
    );
    make_fifo(&fifo)?;
    fs::create_dir(&dir)?;
    fs::write(&plain, "")?;
    // Open for a reader, so that only its kind is wrong.
    let _reader = casemate_tests::stdio::open_reader(&fifo)?;
    task.boot()?;
    for (uri, part) in [
        ("file://relative/x.log".to_owned(), "absolute"),
        (format!("file://{}", fifo.display()), "fifo://"),
        (format!("file://{}", dir.display()), "irectory"),
        (
            format!("file://{}/x.log", plain.display()),
            "x.log: File exists",
        ),
        ("file:///proc/1/x.log".to_owned(), "/proc/1/x.log"),
    ] {
        task.stdio = [String::new(), uri.clone(), uri.clone()];
        expect_text(&uri, task.create(), part)?;
    }
    task.stdio = Default::default();
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "exit status");
    Ok(task.finish()?)
}

fn c090_log_file_on_a_full_disk() -> Outcome {
    casemate_only()?;
    let script = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line-$i-of-a-long-log || exit 99; done; \
                  while [ ! -e /tmp/go ]; do sleep 0.05; done; echo last; exec probe sleep";
    let mut task = Task::new("c090f", &["/bin/sh", "-c", script])?;
    let disk = task.side.join("disk");
    fs::create_dir(&disk)?;
    mount(
        "tmpfs",
        &disk,
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=16k"),
    )?;
    let path = disk.join("x.log");
    let uri = format!("file://{}", path.display());
    task.stdio = [String::new(), uri.clone(), uri];
    let done = (|| {
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        until("a full disk", SHORT, || {
            fs::metadata(&path).is_ok_and(|m| m.len() >= 16 << 10)
        })?;
        // The workload goes on: it is neither ended by its log nor stopped.
        let go = Exec::sh(&task, "go", "touch /tmp/go")?;
        ensure_eq!(go.run()?.0, 0, "an exec");
        std::thread::sleep(Duration::from_millis(500));
        ensure_eq!(status(&task)?, RUNNING, "state");
        // With room again the log goes on too.
        fs::OpenOptions::new().write(true).open(&path)?.set_len(0)?;
        let mut exec = Exec::sh(&task, "more", "echo with-room")?;
        exec.stdio[1] = task.stdio[1].clone();
        exec.stdio[2] = task.stdio[1].clone();
        exec.begin()?;
        ensure_eq!(exec.wait()?, 0, "exit status");
        exec.delete()?;
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains("with-room"), "the file: {text:?}");
        Ok(())
    })();
    unmount(&disk, UnmountFlags::DETACH)?;
    done?;
    Ok(task.finish()?)
}

/// A logger that is ready as `ready` says, and keeps what it reads in `out`.
fn logger(task: &Task, ready: &str) -> Result<String, casemate_tests::skip::Stop> {
    let path = task.side.join("logger");
    let dir = task.side.display();
    let text = format!(
        "#!/bin/sh\ncd {dir}\n{ready}\ncat <&4 >err &\ncat <&3 >out\nwait\necho end >done\n"
    );
    fs::write(&path, text)?;
    set_mode(&path, 0o755)?;
    Ok(path.display().to_string())
}

fn c091_logging_binary_of_an_exec_on_a_terminal() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c091xt")?;
    let uri = format!("binary://{}", logger(&task, "exec 5>&-")?);
    let mut exec = Exec::sh(&task, "e", "test -t 1 && stty size; exit 4")?.with_terminal(31, 91)?;
    exec.stdio[1] = uri;
    exec.begin()?;
    ensure_eq!(exec.wait()?, 4, "exit status");
    exec.delete()?;
    ensure_eq!(
        fs::read_to_string(task.side.join("out"))?,
        "31 91\r\n",
        "output"
    );
    ensure_eq!(
        fs::read_to_string(task.side.join("done"))?,
        "end\n",
        "its own end"
    );
    Ok(task.finish()?)
}

fn c092_logging_binary_v2_of_an_exec() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c092x")?;
    let path = logger(&task, "echo >&5")?;
    let mut exec = Exec::sh(&task, "e", "echo to-out; echo to-err >&2")?;
    exec.stdio = [String::new(), format!("binary-v2://{path}"), String::new()];
    exec.begin()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    ensure_eq!(
        fs::read_to_string(task.side.join("out"))?,
        "to-out\n",
        "output"
    );
    ensure_eq!(
        fs::read_to_string(task.side.join("err"))?,
        "to-err\n",
        "errors"
    );
    // One that says nothing fails this exec, and nothing else.
    let path = logger(&task, "exit 0")?;
    let mut mute = Exec::sh(&task, "mute", "echo never > /tmp/ran")?;
    mute.stdio = [String::new(), format!("binary-v2://{path}"), String::new()];
    mute.add()?;
    expect_text("Start", mute.start(), "without a word")?;
    mute.wait_within(Duration::from_secs(5))?;
    mute.delete()?;
    ensure!(!task.side.join("upper/tmp/ran").exists(), "it ran");
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}
