//! Clients that break off, and bytes that are no ttrpc.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::run::until;
use casemate_tests::shim::{Ask, SHORT};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::{DeleteRequest, KillRequest, StartRequest, WaitRequest};
use protobuf::Message;

use crate::common::{RUNNING, casemate_only, status};

crate::trials![
    rpc_client_breaks_off_in_the_middle,
    rpc_junk_on_the_socket,
    rpc_many_connections,
];

/// A ttrpc frame: length, stream, type (1: request), flags, then the payload.
fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    bytes
}

/// A whole request, as bytes of the wire.
fn wire(method: &str, ask: &dyn Ask) -> Result<Vec<u8>, Stop> {
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: method.to_owned(),
        payload: ask.bytes()?,
        ..Default::default()
    };
    Ok(frame(1, 1, &request.write_to_bytes()?))
}

/// Sends and hangs up at once.
fn shout(task: &Task, bytes: &[u8]) -> Outcome {
    let mut socket = UnixStream::connect(task.answer()?.socket())?;
    let _ = socket.write_all(bytes);
    Ok(())
}

fn rpc_client_breaks_off_in_the_middle() -> Outcome {
    casemate_only()?;
    for _ in 0..5 {
        let mut task = Task::new("break", &["/bin/probe", "sleep"])?;
        task.boot()?;
        let id = task.id.clone();
        let run = |number: i32, what: &str| {
            until(&format!("state {number} after {what}"), SHORT, || {
                status(&task).is_ok_and(|s| s == number)
            })
        };
        // The half of a request does nothing, its whole does all.
        let create = wire("Create", &task.create_request())?;
        shout(&task, &create[..create.len() / 2])?;
        std::thread::sleep(Duration::from_millis(50));
        ensure!(status(&task).is_err(), "half a Create made a container");
        shout(&task, &create)?;
        run(1, "Create")?;
        let start = StartRequest {
            id: id.clone(),
            ..Default::default()
        };
        shout(&task, &wire("Start", &start)?)?;
        run(2, "Start")?;
        let exec = Exec::new(&task, "e", &["/bin/probe", "sleep"])?;
        shout(&task, &wire("Exec", &exec.request())?)?;
        until("the exec", SHORT, || exec.state().is_ok())?;
        let start = StartRequest {
            id: id.clone(),
            exec_id: "e".to_owned(),
            ..Default::default()
        };
        shout(&task, &wire("Start", &start)?)?;
        until("the exec to run", SHORT, || {
            exec.state().is_ok_and(|s| s.pid != 0)
        })?;
        let wait = WaitRequest {
            id: id.clone(),
            ..Default::default()
        };
        shout(&task, &wire("Wait", &wait)?)?;
        let kill = KillRequest {
            id: id.clone(),
            signal: 9,
            ..Default::default()
        };
        shout(&task, &wire("Kill", &kill)?)?;
        run(3, "Kill")?;
        ensure_eq!(exec.wait()?, 137, "the exec");
        let delete = DeleteRequest {
            id: id.clone(),
            ..Default::default()
        };
        shout(&task, &wire("Delete", &delete)?)?;
        until("the record to go", SHORT, || status(&task).is_err())?;
        task.finish()?;
    }
    Ok(())
}

/// Resident pages of the shim, in kB.
fn resident(shim: u32) -> u64 {
    let text = procs::status_field(shim, "VmRSS").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

fn rpc_junk_on_the_socket() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("junk")?;
    let shim = task.shim_pid()?;
    let count = || fs::read_dir(format!("/proc/{shim}/fd")).map_or(0, |d| d.count());
    let (fds, memory) = (count(), resident(shim));
    let noise: Vec<u8> = (0..8192u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let header = |length: u32, stream: u32, kind: u8| {
        [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0]].concat()
    };
    let unknown = ttrpc::Request {
        service: "no.such.Service".to_owned(),
        method: "Nothing".to_owned(),
        ..Default::default()
    };
    let broken = ttrpc::Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: "Create".to_owned(),
        payload: vec![0xff; 100],
        ..Default::default()
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("a byte", vec![0]),
        ("noise", noise.clone()),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("half a header", vec![0, 0, 0]),
        ("4 GiB announced", header(u32::MAX, 1, 1)),
        (
            "16 MiB announced, little sent",
            [header(16 << 20, 1, 1), noise.clone()].concat(),
        ),
        ("an answer", frame(1, 2, b"")),
        ("data without a stream", frame(7, 3, b"abc")),
        ("an unknown type", frame(1, 99, b"abc")),
        ("stream 0", frame(0, 1, &noise[..64])),
        ("an even stream", frame(2, 1, &noise[..64])),
        ("no protobuf", frame(1, 1, &noise[..200])),
        ("an empty request", frame(1, 1, b"")),
        (
            "an unknown service",
            frame(1, 1, &unknown.write_to_bytes()?),
        ),
        ("a broken payload", frame(1, 1, &broken.write_to_bytes()?)),
        (
            "a stream twice",
            [frame(1, 1, &noise[..9]), frame(1, 1, &noise[..9])].concat(),
        ),
        (
            "requests without end",
            frame(1, 1, &unknown.write_to_bytes()?).repeat(2000),
        ),
    ];
    for (what, bytes) in &cases {
        for hang_up in [true, false] {
            let mut socket = UnixStream::connect(task.answer()?.socket())?;
            socket.set_write_timeout(Some(Duration::from_secs(2)))?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            let _ = socket.write_all(bytes);
            if !hang_up {
                let mut answer = [0; 4096];
                let _ = socket.read(&mut answer);
            }
            let asked = Instant::now();
            ensure_eq!(status(&task)?, RUNNING, "state after {what}");
            let took = asked.elapsed();
            ensure!(
                took < Duration::from_secs(1),
                "State after {what} took {took:?}"
            );
            drop(socket);
        }
    }
    until("the descriptors to go back", SHORT, || count() <= fds)?;
    let now = resident(shim);
    ensure!(
        now < memory + 20 * 1024,
        "the shim went from {memory} to {now} kB"
    );
    // And it is as useful as before.
    let exec = Exec::sh(&task, "e", "echo fine")?;
    ensure_eq!(exec.run()?, (0, "fine\n".to_owned()), "an exec");
    Ok(task.finish()?)
}

fn rpc_many_connections() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("conns")?;
    let path = task.answer()?.socket();
    let shim = task.shim_pid()?;
    let count = || fs::read_dir(format!("/proc/{shim}/fd")).map_or(0, |d| d.count());
    let before = count();
    let mut sockets = Vec::new();
    for _ in 0..300 {
        sockets.push(UnixStream::connect(&path)?);
    }
    ensure_eq!(status(&task)?, RUNNING, "state with 300 idle connections");
    let exec = Exec::sh(&task, "e", "echo fine")?;
    ensure_eq!(exec.run()?, (0, "fine\n".to_owned()), "an exec");
    drop(sockets);
    until("the descriptors to go back", SHORT, || count() <= before)?;
    Ok(task.finish()?)
}
