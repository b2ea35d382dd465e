//! 51, 61–64 and 88 for execs: input and output of whole sizes, and readers and
//! writers that don't behave.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::stdio::{make_fifo, open_reader, read_until};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{CloseIORequest, Empty};
use rustix::fs::OFlags;

use crate::common::{LONG, RUNNING, STOPPED, expect_text, status};

crate::trials![
    c051_burst_of_an_exec_right_before_its_exit,
    c061_twenty_mebibytes_through_an_exec,
    c061_twenty_mebibytes_through_init,
    c062_writer_detaches_and_returns,
    c063_close_io_and_the_writer,
    c064_close_io_before_start,
    c064_close_io_while_init_is_created,
    c088_reader_of_an_exec_goes_and_returns,
    exec_output_that_nobody_reads,
    exec_fifos_that_are_removed,
    exec_input_that_is_not_read,
];

const MIB: usize = 1 << 20;

/// Opens the client's end of an input fifo; waits for the shim's.
fn writer(path: &Path) -> Result<File, Stop> {
    let mut file = None;
    until(&format!("a reader of {}", path.display()), SHORT, || {
        file = OpenOptions::new()
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(path)
            .ok();
        file.is_some()
    })?;
    let Some(file) = file else {
        return fail("no writer");
    };
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

/// Bytes without a pattern that a lost or doubled page would keep.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..size / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// Writes `bytes` into the fifo from a thread of its own, then closes it.
fn feed(path: &Path, bytes: Vec<u8>) -> Result<std::thread::JoinHandle<()>, Stop> {
    let mut file = writer(path)?;
    Ok(std::thread::spawn(move || {
        let _ = file.write_all(&bytes);
    }))
}

/// Reads the fifo to its end, a little at a time.
fn sip(path: PathBuf, pause: Duration) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        if let Ok(mut fifo) = File::open(path) {
            while let Ok(n @ 1..) = fifo.read(&mut buffer) {
                all.extend_from_slice(&buffer[..n]);
                std::thread::sleep(pause);
            }
        }
        all
    })
}

/// What `probe burst` writes.
fn counted(bytes: usize) -> Vec<u8> {
    (0..(bytes / 8) as u64).flat_map(u64::to_le_bytes).collect()
}

fn c051_burst_of_an_exec_right_before_its_exit() -> Outcome {
    let task = Task::sleeping("c051e")?;
    let size = 8 * MIB;
    for (n, pause) in [0, 2].into_iter().enumerate() {
        let id = format!("e{n}");
        let mut exec = Exec::new(&task, &id, &["/bin/probe", "burst", &size.to_string()])?;
        let slow = task.side.join(format!("{id}.slow"));
        make_fifo(&slow)?;
        exec.stdio[1] = slow.display().to_string();
        let reading = sip(slow, Duration::from_millis(pause));
        exec.begin()?;
        ensure_eq!(exec.wait_within(LONG)?, 0, "exit status");
        // At once: what is on its way must still arrive.
        exec.delete()?;
        let Ok(got) = reading.join() else {
            return fail("the reader panicked");
        };
        ensure_eq!(got.len(), size, "bytes with a pause of {pause} ms");
        ensure!(got == counted(size), "other bytes than were written");
    }
    Ok(task.finish()?)
}

fn c061_twenty_mebibytes_through_an_exec() -> Outcome {
    let task = Task::sleeping("c061")?;
    let exec = Exec::new(&task, "cat", &["/bin/cat"])?.with_stdin()?;
    let bytes = noise(20 * MIB);
    exec.begin()?;
    let feeding = feed(&exec.stdin(), bytes.clone())?;
    until("the writer to be done", LONG, || feeding.is_finished())?;
    exec.close_stdin()?;
    ensure_eq!(exec.wait_within(LONG)?, 0, "exit status");
    exec.delete()?;
    let got = exec.stdout.all(LONG)?;
    ensure_eq!(got.len(), bytes.len(), "bytes");
    ensure!(got == bytes, "other bytes than were sent");
    Ok(task.finish()?)
}

fn c061_twenty_mebibytes_through_init() -> Outcome {
    let mut task = Task::new("c061i", &["/bin/cat"])?;
    let stdin = task.side.join("stdin");
    task.stdio[0] = stdin.display().to_string();
    let bytes = noise(20 * MIB);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let feeding = feed(&stdin, bytes.clone())?;
    until("the writer to be done", LONG, || feeding.is_finished())?;
    close_stdin(&task)?;
    ensure_eq!(
        task.rpc()?.wait(&task.id, LONG)?.exit_status,
        0,
        "exit status"
    );
    task.rpc()?.delete(&task.id)?;
    let got = task.stdout.all(LONG)?;
    ensure_eq!(got.len(), bytes.len(), "bytes");
    ensure!(got == bytes, "other bytes than were sent");
    Ok(task.finish()?)
}

fn close_stdin(task: &Task) -> Outcome {
    let ask = CloseIORequest {
        id: task.id.clone(),
        stdin: true,
        ..Default::default()
    };
    task.rpc()?.call::<Empty>("CloseIO", &ask, SHORT)?;
    Ok(())
}

fn c062_writer_detaches_and_returns() -> Outcome {
    let mut task = Task::new("c062", &["/bin/cat"])?;
    let stdin = task.side.join("stdin");
    task.stdio[0] = stdin.display().to_string();
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let exec = Exec::new(&task, "cat", &["/bin/cat"])?.with_stdin()?;
    exec.begin()?;
    for word in ["one\n", "two\n", "three\n"] {
        for (path, out) in [(&stdin, &task.stdout), (&exec.stdin(), &exec.stdout)] {
            let mut file = writer(path)?;
            file.write_all(word.as_bytes())?;
            drop(file);
            out.until(word, SHORT)?;
        }
        // No end of file came of the writer's going.
        std::thread::sleep(Duration::from_millis(200));
        ensure_eq!(status(&task)?, RUNNING, "init after {word:?}");
        ensure_eq!(exec.state()?.exit_status, 0, "exec after {word:?}");
        ensure!(
            exec.state()?.exited_at.is_none(),
            "exec ended after {word:?}"
        );
    }
    exec.close_stdin()?;
    close_stdin(&task)?;
    ensure_eq!(exec.wait()?, 0, "exec");
    exec.delete()?;
    ensure_eq!(task.rpc()?.wait(&task.id, SHORT)?.exit_status, 0, "init");
    task.rpc()?.delete(&task.id)?;
    for out in [&task.stdout, &exec.stdout] {
        ensure_eq!(out.text(SHORT)?, "one\ntwo\nthree\n", "output");
    }
    Ok(task.finish()?)
}

fn c063_close_io_and_the_writer() -> Outcome {
    let task = Task::sleeping("c063")?;
    let exec = Exec::new(&task, "cat", &["/bin/cat"])?.with_stdin()?;
    exec.begin()?;
    let mut file = writer(&exec.stdin())?;
    exec.close_stdin()?;
    // Twice is once.
    exec.close_stdin()?;
    std::thread::sleep(Duration::from_millis(200));
    file.write_all(b"still\n")?;
    exec.stdout.until("still\n", SHORT)?;
    ensure!(
        exec.state()?.exited_at.is_none(),
        "it has ended before the writer"
    );
    drop(file);
    ensure_eq!(exec.wait()?, 0, "exit after the writer has gone");
    exec.delete()?;
    // Without any stdin there is nothing to close, and that is fine.
    let exec = Exec::new(&task, "none", &["/bin/probe", "sleep"])?;
    exec.begin()?;
    exec.close_stdin()?;
    exec.kill(9)?;
    exec.wait()?;
    Ok(task.finish()?)
}

fn c064_close_io_before_start() -> Outcome {
    let task = Task::sleeping("c064")?;
    let exec = Exec::sh(&task, "cat", "cat; echo end")?.with_stdin()?;
    exec.add()?;
    exec.close_stdin()?;
    exec.start()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    ensure_eq!(exec.stdout.text(SHORT)?, "end\n", "output");
    Ok(task.finish()?)
}

/// A client whose input ends as soon as Create has opened its fifo asks whether there is
/// a container, as nerdctl does, before Create has answered.
fn c064_close_io_while_init_is_created() -> Outcome {
    for _ in 0..5 {
        let mut task = Task::new("c064init", &["/bin/cat"])?;
        let path = task.side.join("stdin");
        task.stdio[0] = path.display().to_string();
        task.boot()?;
        let (created, closed) = std::thread::scope(|scope| {
            let client = scope.spawn(|| -> Outcome {
                // Waits for the shim's end.
                let mut input = OpenOptions::new().write(true).open(&path)?;
                input.write_all(b"through\n")?;
                task.rpc()?.state(&task.id)?;
                let ask = CloseIORequest {
                    id: task.id.clone(),
                    stdin: true,
                    ..CloseIORequest::default()
                };
                task.rpc()?.call::<Empty>("CloseIO", &ask, SHORT)?;
                Ok(())
            });
            (task.create(), client.join())
        });
        created?;
        closed.unwrap_or_else(|_| fail("the client panicked"))?;
        let ended = task.start_and_wait()?;
        ensure_eq!(ended.exit_status, 0, "exit status");
        ensure_eq!(task.stdout.text(SHORT)?, "through\n", "output");
        task.finish()?;
    }
    Ok(())
}

fn c088_reader_of_an_exec_goes_and_returns() -> Outcome {
    let task = Task::sleeping("c088e")?;
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo n$i || exit 99; sleep 0.02; done";
    let mut exec = Exec::sh(&task, "e", script)?;
    let path = task.side.join("quiet");
    make_fifo(&path)?;
    exec.stdio[1] = path.display().to_string();
    let mut first = open_reader(&path)?;
    exec.begin()?;
    read_until(&mut first, "n5\n", SHORT)?;
    drop(first);
    std::thread::sleep(Duration::from_millis(500));
    let mut second = open_reader(&path)?;
    let text = read_until(&mut second, "n60\n", SHORT)?;
    // What came while nobody read is there too: no line is missing.
    let first = text
        .lines()
        .next()
        .unwrap_or_default()
        .trim_start_matches('n');
    let first: usize = first.parse().unwrap_or(0);
    let want: Vec<String> = (first..=60).map(|n| format!("n{n}")).collect();
    let got: Vec<&str> = text.lines().take(want.len()).collect();
    ensure_eq!(got, want, "lines after the return");
    ensure!(first <= 20, "first line after the return: n{first}");
    exec.kill(9)?;
    exec.wait()?;
    Ok(task.finish()?)
}

fn exec_output_that_nobody_reads() -> Outcome {
    let task = Task::sleeping("unread")?;
    let mut exec = Exec::new(&task, "e", &["/bin/probe", "burst", "8388608"])?;
    let path = task.side.join("unread");
    make_fifo(&path)?;
    exec.stdio[1] = path.display().to_string();
    exec.begin()?;
    // It is stopped by its own output; the shim is not.
    let shim = task.shim_pid()?;
    std::thread::sleep(Duration::from_millis(500));
    let spent = || -> Result<u64, Stop> {
        let stat = fs::read_to_string(format!("/proc/{shim}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split(' ').collect();
        let ticks = |n: usize| {
            fields
                .get(n)
                .and_then(|f| f.parse::<u64>().ok())
                .unwrap_or(0)
        };
        Ok(ticks(12) + ticks(13))
    };
    let before = spent()?;
    for _ in 0..10 {
        let asked = Instant::now();
        ensure_eq!(status(&task)?, RUNNING, "state");
        ensure!(asked.elapsed() < Duration::from_secs(1), "State was slow");
        std::thread::sleep(Duration::from_millis(100));
    }
    let ticks = spent()? - before;
    ensure!(ticks <= 10, "the shim used {ticks} ticks in a second");
    let other = Exec::sh(&task, "other", "echo fine")?;
    ensure_eq!(other.run()?, (0, "fine\n".to_owned()), "another exec");
    exec.kill(9)?;
    ensure_eq!(exec.wait()?, 137, "exit status");
    let begun = Instant::now();
    exec.delete()?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(13), "Delete took {took:?}");
    Ok(task.finish()?)
}

fn exec_fifos_that_are_removed() -> Outcome {
    let task = Task::sleeping("rmfifo")?;
    let script = "echo one; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo two; cat";
    let exec = Exec::sh(&task, "e", script)?.with_stdin()?;
    exec.begin()?;
    exec.stdout.until("one\n", SHORT)?;
    // Who has them open keeps them.
    let mut file = writer(&exec.stdin())?;
    for path in exec.stdio.iter().filter(|p| !p.is_empty()) {
        fs::remove_file(path)?;
    }
    let go = Exec::sh(&task, "go", "touch /tmp/go")?;
    go.run()?;
    file.write_all(b"three\n")?;
    drop(file);
    exec.close_stdin()?;
    ensure_eq!(exec.wait()?, 0, "exit status");
    exec.delete()?;
    ensure_eq!(exec.stdout.text(SHORT)?, "one\ntwo\nthree\n", "output");
    // Gone before Start: an error that names it, and the container goes on.
    let exec = Exec::new(&task, "gone", &["/bin/true"])?;
    exec.add()?;
    fs::remove_file(&exec.stdio[1])?;
    expect_text("Start", exec.start(), &exec.stdio[1])?;
    ensure_eq!(status(&task)?, RUNNING, "state");
    Ok(task.finish()?)
}

fn exec_input_that_is_not_read() -> Outcome {
    let task = Task::sleeping("nostdin")?;
    // It closes its input at once, and lives on.
    let exec = Exec::sh(&task, "e", "exec <&-; echo up; exec probe sleep")?.with_stdin()?;
    exec.begin()?;
    exec.stdout.until("up", SHORT)?;
    let mut file = writer(&exec.stdin())?;
    rustix::io::ioctl_fionbio(&file, true)?;
    let ended = until("the writer to be told, or the pipe to fill", SHORT, || {
        file.write(&[0; 4096]).is_err()
    });
    ensure!(ended.is_ok(), "the writer writes for ever");
    ensure!(exec.state()?.exited_at.is_none(), "the exec has ended");
    exec.kill(9)?;
    exec.wait()?;
    exec.delete()?;
    // Bytes that were never read are no reason to wait.
    let exec = Exec::new(&task, "idle", &["/bin/probe", "sleep"])?.with_stdin()?;
    exec.begin()?;
    let mut file = writer(&exec.stdin())?;
    rustix::io::ioctl_fionbio(&file, true)?;
    let _ = file.write(&vec![0; 512 * 1024]);
    exec.kill(9)?;
    exec.wait()?;
    let begun = Instant::now();
    exec.delete()?;
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(2), "Delete took {took:?}");
    ensure!(
        procs::identity(task.shim_pid()?).is_some(),
        "the shim ended"
    );
    ensure!(status(&task)? != STOPPED, "the container ended");
    Ok(task.finish()?)
}
