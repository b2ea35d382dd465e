//! 18–30: the socket, pods that share a shim, and the shim as a process.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::run::{run, until};
use casemate_tests::shim::{Answer, SHORT};
use casemate_tests::skip::{Outcome, skip};
use casemate_tests::{World, ensure, ensure_eq, procs, spec, world};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::Signal;

use crate::common::casemate_only;

crate::trials![
    c018_socket_is_private,
    c019_peer_of_another_user,
    c020_stale_socket,
    c021_second_container_of_a_pod,
    c022_group_annotation_wins,
    c023_twenty_starts_for_one_pod,
    c024_shim_cgroup,
    c025_oom_score,
    c026_core_scheduling,
    c027_server_that_cannot_start,
    c028_log_fifo,
    c029_log_that_nobody_reads,
    c030_sigterm,
    shim_whose_bundle_is_gone,
];

const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
const GROUP: &str = "io.containerd.runc.v2.group";

fn end(task: &Task) -> Outcome {
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok(())
}

fn c018_socket_is_private() -> Outcome {
    let mut task = Task::new("c018", &["/bin/true"])?;
    let socket = task.boot()?.socket();
    let meta = fs::metadata(&socket)?;
    ensure_eq!(meta.permissions().mode() & 0o7777, 0o600, "mode");
    ensure_eq!((meta.uid(), meta.gid()), (0, 0), "owner");
    end(&task)
}

fn c019_peer_of_another_user() -> Outcome {
    let mut task = Task::new("c019", &["/bin/true"])?;
    let socket = task.boot()?.socket();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666))?;
    // Reached through a descriptor, so that directories play no part. Without
    // CLOEXEC, since it is for the program that dials.
    let pin: OwnedFd = rustix::fs::openat(CWD, &socket, OFlags::PATH, Mode::empty())?;
    let target = format!("/proc/self/fd/{}", pin.as_raw_fd());
    let copy = World::get()?.dir().join("dial");
    if !copy.exists() {
        fs::copy(world::probe()?, &copy)?;
    }
    let dial = |uid: u32| -> casemate_tests::Result<String> {
        let mut command = Command::new(&copy);
        command.args(["dial", &target]).uid(uid).gid(uid);
        Ok(run(&mut command, &[], Duration::from_secs(5))?.ok()?.out())
    };
    let root = dial(0)?;
    ensure!(!root.contains("closed"), "root was refused: {root}");
    let other = dial(65534)?;
    ensure_eq!(other.trim(), "closed", "uid 65534");
    drop(pin);
    end(&task)
}

fn c020_stale_socket() -> Outcome {
    let mut task = Task::new("c020", &["/bin/true"])?;
    let address = task.expected_address(&task.id);
    let path = address.trim_start_matches("unix://").to_owned();
    fs::create_dir_all("/run/containerd/s")?;
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    ensure!(fs::exists(&path)?, "no stale socket to test with");
    ensure_eq!(task.boot()?.address, address, "address");
    end(&task)
}

/// A second bundle of the pod of `first`.
fn sibling(first: &Task, name: &str) -> casemate_tests::Result<Task> {
    let mut task = Task::new(name, &["/bin/true"])?;
    spec::annotate(&mut task.spec, SANDBOX, &first.id);
    Ok(task)
}

fn c021_second_container_of_a_pod() -> Outcome {
    let mut first = Task::new("c021", &["/bin/true"])?;
    let id = first.id.clone();
    spec::annotate(&mut first.spec, SANDBOX, &id);
    let address = first.boot()?.address;
    ensure_eq!(address, first.expected_address(&id), "address of the pod");
    let second = sibling(&first, "c021")?;
    second.write_spec()?;
    let answer = second.shim.start()?;
    ensure_eq!(answer.address, address, "address for the second");
    let written = fs::read_to_string(second.bundle().join("address"))?;
    ensure_eq!(written, address, "<bundle>/address of the second");
    ensure!(
        procs::with_command(&second.id).is_empty(),
        "a second shim runs"
    );
    end(&first)
}

fn c022_group_annotation_wins() -> Outcome {
    let mut task = Task::new("c022", &["/bin/true"])?;
    let group = format!("{}-group", task.id);
    spec::annotate(&mut task.spec, SANDBOX, "some-pod");
    spec::annotate(&mut task.spec, GROUP, &group);
    ensure_eq!(
        task.boot()?.address,
        task.expected_address(&group),
        "address"
    );
    end(&task)
}

fn c023_twenty_starts_for_one_pod() -> Outcome {
    let pod = World::get()?.id("c023-pod");
    let mut tasks = Vec::new();
    for _ in 0..20 {
        let mut task = Task::new("c023", &["/bin/true"])?;
        spec::annotate(&mut task.spec, SANDBOX, &pod);
        task.write_spec()?;
        tasks.push(task);
    }
    let workers: Vec<_> = tasks
        .iter()
        .map(|task| {
            let shim = task.shim.clone();
            std::thread::spawn(move || shim.start().map_err(|e| e.to_string()))
        })
        .collect();
    let mut answers: Vec<Answer> = Vec::new();
    for worker in workers {
        match worker.join() {
            Ok(Ok(answer)) => answers.push(answer),
            Ok(Err(why)) => return casemate_tests::skip::fail(why),
            Err(_) => return casemate_tests::skip::fail("a starter panicked"),
        }
    }
    ensure!(
        answers.iter().all(|a| a.address == answers[0].address),
        "addresses differ"
    );
    let clients = answers
        .iter()
        .map(|a| casemate_tests::shim::Client::connect(&a.address, a.version)?.shim(&pod))
        .collect::<Result<Vec<_>, _>>()?;
    let pid = clients[0].shim_pid;
    ensure!(
        clients.iter().all(|c| c.shim_pid == pid),
        "more than one shim"
    );
    let client = casemate_tests::shim::Client::connect(&answers[0].address, answers[0].version)?;
    client.shutdown(&pod)?;
    until("the shim to end", Duration::from_secs(3), || {
        procs::identity(pid).is_none()
    })?;
    let strays: Vec<u32> = tasks
        .iter()
        .flat_map(|t| procs::with_command(&t.id))
        .collect();
    ensure!(strays.is_empty(), "more shims: {strays:?}");
    Ok(())
}

fn c024_shim_cgroup() -> Outcome {
    if !fs::exists("/sys/fs/cgroup/pids")? {
        return skip("needs the pids controller of cgroup v1");
    }
    let mut task = Task::new("c024", &["/bin/true"])?;
    let name = format!("{}-shim", task.id);
    // shim_cgroup is field 3 of containerd.runc.v1.Options.
    let path = format!("/{name}");
    let mut value = vec![3 << 3 | 2, path.len() as u8];
    value.extend(path.as_bytes());
    task.shim.stdin = Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value,
        ..Default::default()
    }
    .write_to_bytes()?;
    let dir = std::path::Path::new("/sys/fs/cgroup/pids").join(&name);
    fs::create_dir_all(&dir)?;
    task.boot()?;
    let inside = fs::read_to_string(dir.join("cgroup.procs"))?;
    let pid = task.shim_pid()?.to_string();
    ensure!(
        inside.lines().any(|line| line == pid),
        "shim {pid} is not among {inside:?}"
    );
    end(&task)?;
    let _ = fs::remove_dir(&dir);
    Ok(())
}

fn c025_oom_score() -> Outcome {
    // The daemon's score counts: it is the parent of the `start` process.
    for (parent, want) in [(500, "501"), (1000, "1000")] {
        let mut task = Task::new("c025", &["/bin/true"])?;
        let direct = task.shim.program.clone();
        let wrapper = task.side.join("shim");
        let script = format!(
            "#!/bin/sh\necho {parent} > /proc/self/oom_score_adj\n{} \"$@\"\ncode=$?\nexit $code\n",
            direct.display()
        );
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        task.shim.program = wrapper;
        task.boot()?;
        let got = fs::read_to_string(format!("/proc/{}/oom_score_adj", task.shim_pid()?))?;
        ensure_eq!(
            got.trim(),
            want,
            "score of a shim whose parent has {parent}"
        );
        end(&task)?;
    }
    Ok(())
}

fn c026_core_scheduling() -> Outcome {
    let mut task = Task::new("c026", &["/bin/true"])?;
    task.shim
        .env
        .push(("SCHED_CORE".to_owned(), "1".to_owned()));
    task.write_spec()?;
    let output = task.shim.run("start")?;
    if output.code() == 0 {
        return skip("the kernel has core scheduling; reading a cookie back is not written yet");
    }
    let said = output.out() + &output.err();
    ensure!(
        said.to_lowercase().contains("sched"),
        "error {said:?} does not name the feature"
    );
    ensure!(
        procs::with_command(&task.id).is_empty(),
        "a process is left"
    );
    Ok(())
}

fn c027_server_that_cannot_start() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c027", &["/bin/true"])?;
    // Longer than a socket address can be (unix(7)).
    task.shim.ttrpc = format!("/run/{}.sock", "x".repeat(120));
    task.write_spec()?;
    let begun = Instant::now();
    let output = task.shim.run("start")?;
    ensure!(output.code() != 0, "start succeeded");
    ensure!(
        begun.elapsed() < Duration::from_secs(5),
        "took {:?}",
        begun.elapsed()
    );
    ensure!(
        procs::with_command(&task.id).is_empty(),
        "a process is left"
    );
    Ok(())
}

fn c028_log_fifo() -> Outcome {
    let mut task = Task::new("c028", &["/no/such/program"])?;
    task.shim.debug = true;
    task.boot()?;
    // A failure is something every shim writes about at debug level.
    if task.create().is_ok() {
        let _ = task.rpc()?.start(&task.id);
    }
    task.log.until("level=", SHORT)?;
    let text = String::from_utf8_lossy(&task.log.so_far()).into_owned();
    for line in text.lines() {
        ensure!(
            line.contains("time=") && line.contains("msg="),
            "log line {line:?}"
        );
    }
    Ok(())
}

fn c029_log_that_nobody_reads() -> Outcome {
    let mut task = Task::new("c029", &["/bin/true"])?;
    task.shim.debug = true;
    let unread = task.bundle().join("log");
    // A fresh fifo: the reader of the task holds the old one.
    fs::remove_file(&unread)?;
    casemate_tests::stdio::make_fifo(&unread)?;
    let hold = casemate_tests::stdio::open_reader(&unread)?;
    task.boot()?;
    for _ in 0..3000 {
        let _ = task
            .rpc()?
            .state("no-such-task-with-a-long-name-to-fill-the-log");
    }
    let begun = Instant::now();
    task.rpc()?.shim(&task.id)?;
    ensure!(
        begun.elapsed() < Duration::from_secs(1),
        "Connect took {:?}",
        begun.elapsed()
    );
    drop(hold);
    task.rpc()?.shim(&task.id)?;
    end(&task)
}

fn c030_sigterm() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c030", &["/bin/true"])?;
    let socket = task.boot()?.socket();
    procs::signal(task.shim_pid()?, Signal::TERM);
    task.wait_gone(Duration::from_secs(3))?;
    ensure!(!socket.exists(), "the socket is left");
    Ok(())
}

/// As after a daemon that has killed `start` and given the pod up: long before the time
/// that a shim waits for a container.
fn shim_whose_bundle_is_gone() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("gone", &["/bin/true"])?;
    let socket = task.boot()?.socket();
    fs::remove_dir_all(task.bundle())?;
    task.wait_gone(Duration::from_secs(10))?;
    ensure!(!socket.exists(), "{} is left", socket.display());
    Ok(())
}
