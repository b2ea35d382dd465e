//! System calls as a workload sees them: nanoseconds per operation, one JSON
//! object on standard output. `make bench` runs it inside containers.
//!
//! Each operation runs in many short batches; the batch at the lower quartile
//! counts. What a neighbour on the same core does only ever adds to a batch.

use std::io;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use casemate_sys::attempt;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::CpuSet;

/// A small file of every image.
const FILE: &str = "/etc/passwd";
/// What fork+exec runs: static, ends at once.
const PROGRAM: &str = "/bin/true";
const BATCHES: usize = 60;
const BATCH: Duration = Duration::from_micros(500);
/// How many calls are refused.
const REFUSALS: usize = 2000;

fn main() -> ExitCode {
    match measure() {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("microbench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> io::Result<String> {
    let file = rustix::fs::open(FILE, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut buffer = [0u8; 64];
    let getpid = measured(|| {
        std::hint::black_box(rustix::process::getpid());
        Ok(())
    })?;
    let open = measured(|| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        drop(rustix::fs::openat(CWD, FILE, flags, Mode::empty())?);
        Ok(())
    })?;
    let stat = measured(|| {
        std::hint::black_box(rustix::fs::stat(FILE)?);
        Ok(())
    })?;
    let pread = measured(|| {
        rustix::io::pread(&file, &mut buffer, 0)?;
        Ok(())
    })?;
    let exec = measured(|| Command::new(PROGRAM).status().map(drop))?;
    let refused = refused()?;
    Ok(format!(
        "{{\"getpid\":{getpid:.1},\"open+close\":{open:.1},\"stat\":{stat:.1},\
         \"pread\":{pread:.1},\"fork+exec\":{exec:.1},\"refused call\":{refused:.1}}}"
    ))
}

/// Nanoseconds of a refused call, at the median, on one CPU: where another process has
/// to say so, it is woken on this one.
fn refused() -> io::Result<f64> {
    let all = rustix::thread::sched_getaffinity(None)?;
    let mut one = CpuSet::new();
    let first = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu));
    one.set(first.unwrap_or(0));
    rustix::thread::sched_setaffinity(None, &one)?;
    let mut times = Vec::with_capacity(REFUSALS);
    for _ in 0..REFUSALS {
        let begun = Instant::now();
        let answer = attempt::call("mount");
        times.push(begun.elapsed());
        if answer.is_ok() {
            return Err(io::Error::other("mount was let through"));
        }
    }
    rustix::thread::sched_setaffinity(None, &all)?;
    times.sort_unstable();
    let median = times.get(REFUSALS / 2).copied().unwrap_or_default();
    Ok(median.as_nanos() as f64)
}

/// Nanoseconds per call of `operation` in the batch at the lower quartile.
fn measured(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    // How many calls make a batch; also warms caches and page tables.
    let mut calls = 1u32;
    let per_batch = loop {
        let spent = batch(calls, &mut operation)?;
        if spent >= BATCH / 4 || calls >= 1 << 20 {
            let wanted = BATCH.as_secs_f64() / spent.as_secs_f64().max(1e-9);
            break ((f64::from(calls) * wanted) as u32).clamp(1, 1 << 22);
        }
        calls *= 2;
    };
    let mut times = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        times.push(batch(per_batch, &mut operation)?);
    }
    times.sort_unstable();
    let quartile = times.get(BATCHES / 4).copied().unwrap_or_default();
    Ok(quartile.as_nanos() as f64 / f64::from(per_batch))
}

fn batch(calls: u32, operation: &mut impl FnMut() -> io::Result<()>) -> io::Result<Duration> {
    let begun = Instant::now();
    for _ in 0..calls {
        operation()?;
    }
    Ok(begun.elapsed())
}
