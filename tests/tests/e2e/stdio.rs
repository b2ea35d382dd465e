//! 87–95: standard input and output.

use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::Outcome;
use casemate_tests::stdio::{Reader, make_fifo, open_reader, read_until};
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::Status;

use crate::common::{LONG, expect_text, output};

crate::trials![
    c087_create_without_a_reader,
    c087_reader_comes_after_a_silent_end,
    c088_reader_goes_and_returns,
    c089_no_stdio,
    c093_unknown_scheme,
    c095_fifty_lines,
    c095_the_end_is_told_when_output_was_read,
];

/// Points standard output at a fifo that nobody reads yet.
fn unread(task: &mut Task) -> casemate_tests::Result<()> {
    let path = task.side.join("quiet-out");
    make_fifo(&path)?;
    task.stdio[1] = path.display().to_string();
    Ok(())
}

fn c087_create_without_a_reader() -> Outcome {
    let mut task = Task::new("c087", &["/bin/sh", "-c", "echo hello; exit 6"])?;
    unread(&mut task)?;
    task.boot()?;
    // containerd gives Create no deadline: one of ours stands in for patience.
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 6, "exit status");
    // Long after the last writer inside has gone.
    std::thread::sleep(Duration::from_millis(300));
    let late = Reader::start(&task.side.join("quiet-out"));
    // Delete closes our end: a reader that opens after it has come too late.
    late.until("hello", SHORT)?;
    task.rpc()?.delete(&task.id)?;
    ensure_eq!(late.text(SHORT)?, "hello\n", "output for the late reader");
    Ok(task.finish()?)
}

/// containerd opens its ends by opens that wait for a writer, when it gets round
/// to it: a short process that says nothing must not be over for them by then.
fn c087_reader_comes_after_a_silent_end() -> Outcome {
    let mut task = Task::new("c087s", &["/bin/true"])?;
    unread(&mut task)?;
    task.boot()?;
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "exit status");
    std::thread::sleep(Duration::from_millis(300));
    let path = task.side.join("quiet-out");
    let (say, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || say.send(std::fs::read(path)));
    let read = hear.recv_timeout(SHORT);
    task.rpc()?.delete(&task.id)?;
    let read = match read {
        Ok(read) => read?,
        Err(_) => {
            let why = "no end of file for the late reader".to_owned();
            return Err(casemate_tests::error::Failure::Unexpected(why).into());
        }
    };
    ensure_eq!(read, Vec::<u8>::new(), "output");
    Ok(task.finish()?)
}

fn c088_reader_goes_and_returns() -> Outcome {
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo n$i || exit 99; sleep 0.02; done";
    let mut task = Task::new("c088", &["/bin/sh", "-c", script])?;
    unread(&mut task)?;
    let path = task.side.join("quiet-out");
    let mut first = open_reader(&path)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    read_until(&mut first, "n5\n", SHORT)?;
    drop(first);
    std::thread::sleep(Duration::from_millis(500));
    let mut second = open_reader(&path)?;
    read_until(&mut second, "n60\n", SHORT)?;
    ensure_eq!(
        crate::common::status(&task)?,
        crate::common::RUNNING,
        "state"
    );
    drop(second);
    Ok(task.finish()?)
}

fn c089_no_stdio() -> Outcome {
    let mut task = Task::new(
        "c089",
        &["/bin/sh", "-c", "echo x && echo y >&2 && [ -z \"$(cat)\" ]"],
    )?;
    task.stdio = Default::default();
    let (deleted, _) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit status");
    task.rpc()?.shutdown(&task.id)?;
    Ok(())
}

fn c093_unknown_scheme() -> Outcome {
    let mut task = Task::new("c093", &["/bin/true"])?;
    task.stdio = [
        String::new(),
        "ftp://host/x".to_owned(),
        "ftp://host/x".to_owned(),
    ];
    task.boot()?;
    expect_text("Create", task.create(), "unknown STDIO scheme")
}

fn c095_fifty_lines() -> Outcome {
    let mut task = Task::new("c095", &["/bin/sh", "-c", "probe lines 50 1; exit 3"])?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, LONG)?.exit_status,
        3,
        "exit status"
    );
    task.rpc()?.delete(&task.id)?;
    let want: Vec<String> = (1..=50).map(|n| format!("line {n}")).collect();
    ensure_eq!(output(&task)?.lines().collect::<Vec<_>>(), want, "lines");
    Ok(task.finish()?)
}

/// containerd's client closes its end of a fifo when it has been told of the end, with
/// what is in it.
fn c095_the_end_is_told_when_output_was_read() -> Outcome {
    crate::common::casemate_only()?;
    let script = "n=0; while [ $n -lt 500 ]; do n=$((n+1)); echo line $n; done";
    let mut task = Task::new("c095r", &["/bin/sh", "-c", script])?;
    unread(&mut task)?;
    task.boot()?;
    task.create()?;
    let rpc = task.rpc()?.clone();
    let (id, ask) = (task.id.clone(), rpc.clone());
    let (say, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || say.send(ask.wait(&id, SHORT).map(|answer| answer.exit_status)));
    rpc.start(&task.id)?;
    until("the end", LONG, || {
        let state = rpc.state(&task.id);
        state.is_ok_and(|state| state.status == Status::STOPPED.into())
    })?;
    let early = hear.recv_timeout(Duration::from_millis(100));
    ensure!(
        early.is_err(),
        "told while nothing had been read: {early:?}"
    );
    let late = Reader::start(&task.side.join("quiet-out"));
    // What was read late is there whole, and the end is told: at once, or, to one who
    // never reads, after a time.
    let status = hear.recv_timeout(SHORT);
    ensure!(matches!(status, Ok(Ok(0))), "status: {status:?}");
    late.until("line 500\n", SHORT)?;
    rpc.delete(&task.id)?;
    ensure_eq!(late.text(SHORT)?.lines().count(), 500, "lines");
    let mut task2 = Task::new("c095n", &["/bin/echo", "unheard"])?;
    unread(&mut task2)?;
    task2.boot()?;
    task2.create()?;
    ensure_eq!(
        task2.start_and_wait()?.exit_status,
        0,
        "status where nobody reads"
    );
    task.finish()?;
    Ok(task2.finish()?)
}
