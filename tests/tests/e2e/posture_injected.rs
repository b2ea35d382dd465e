//! What `casemate posture` sees of the runtime's own processes, and of what else only
//! the process itself can change: the host's root has it make the call.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use casemate_posture::{Depth, Promise, compare};
use casemate_tests::bundle::Task;
use casemate_tests::inject::call;
use casemate_tests::operator::promise;
use casemate_tests::pod::{init, insiders};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::probe;
use casemate_tests::{ensure, ensure_eq, procs};
use nix::libc;
use nix::sys::ptrace;
use nix::unistd::Pid;

use crate::common::casemate_only;
use crate::locks::sleeper;
use crate::posture::{as_promised, cgroup_file, end, names};

crate::trials![
    posture_a_descriptor_in_the_shim,
    posture_a_descriptor_in_the_agent,
    posture_a_descriptor_in_a_forker,
    posture_ids_and_capabilities_of_the_agent,
    posture_ids_and_capabilities_of_the_shim,
    posture_a_filter_more_in_the_agent,
    posture_namespaces_that_the_agent_left,
    posture_a_forker_that_can_be_dumped,
    posture_a_process_that_is_traced,
    posture_a_process_put_into_the_cgroup,
    posture_another_namespace_than_was_promised,
    posture_who_is_no_more,
    posture_a_look_takes_no_signal,
];

/// A call that must succeed, with plain arguments.
fn done(pid: u32, what: &str, number: i64, arguments: [u64; 4]) -> Result<i64, Stop> {
    let [a, b, c, d] = arguments;
    let answer = call(pid, &[], number, |_| [a, b, c, d, 0, 0])?;
    ensure!(answer >= 0, "{what} in {pid}: errno {}", -answer);
    Ok(answer)
}

/// The process opens a path; the descriptor.
fn opens(pid: u32, path: &str, flags: i32) -> Result<i64, Stop> {
    let text = [path.as_bytes(), &[0]].concat();
    let flags = u64::from(flags.cast_unsigned());
    // AT_FDCWD isn't used: paths are absolute.
    let answer = call(pid, &text, libc::SYS_openat, |at| {
        [(-100_i64).cast_unsigned(), at, flags, 0, 0, 0]
    })?;
    ensure!(answer >= 0, "open {path} in {pid}: errno {}", -answer);
    Ok(answer)
}

/// What stands in the line of a descriptor: where it leads, and that it stays open.
fn descriptors_named(task: &Task, who: &str, pid: u32, path: &str) -> Outcome {
    as_promised(task)?;
    let one = opens(pid, path, libc::O_RDONLY | libc::O_CLOEXEC)?;
    let line = format!("{who}: descriptor {one}: promised no such file, found {path}");
    names(task, &[&line])?;
    // And by a program that it would execute.
    let keep = [
        one.cast_unsigned(),
        libc::F_SETFD.cast_unsigned().into(),
        0,
        0,
    ];
    done(pid, "fcntl", libc::SYS_fcntl, keep)?;
    let line = format!("{who}: descriptor {one}: promised close-on-exec, found kept: {path}");
    names(task, &[&line])?;
    done(
        pid,
        "close",
        libc::SYS_close,
        [one.cast_unsigned(), 0, 0, 0],
    )?;
    as_promised(task)
}

fn posture_a_descriptor_in_the_shim() -> Outcome {
    casemate_only()?;
    let task = sleeper("shimfd")?;
    let shim = task.shim_pid()?;
    let who = format!("shim ({shim})");
    for path in ["/etc/passwd", "/root", "/var/lib"] {
        descriptors_named(&task, &who, shim, path)?;
    }
    Ok(task.finish()?)
}

fn posture_a_descriptor_in_the_agent() -> Outcome {
    casemate_only()?;
    let task = sleeper("agentfd")?;
    let (agent, _) = insiders(&task)?;
    descriptors_named(&task, &format!("agent ({agent})"), agent, "/")?;
    Ok(task.finish()?)
}

fn posture_a_descriptor_in_a_forker() -> Outcome {
    casemate_only()?;
    let task = sleeper("forkerfd")?;
    let (_, forker) = insiders(&task)?;
    descriptors_named(&task, &format!("forker {forker}"), forker, "/")?;
    descriptors_named(&task, &format!("forker {forker}"), forker, "/vol/file")?;
    Ok(task.finish()?)
}

/// `capset` of the calling thread: version 3, in two halves.
fn gives_up(pid: u32, capability: u32) -> Outcome {
    let status = procs::status_field(pid, "CapPrm").unwrap_or_default();
    let all = u64::from_str_radix(&status, 16).unwrap_or(0);
    ensure!(all & 1 << capability != 0, "{pid} hasn't {capability}");
    let less = all & !(1 << capability);
    let half = |set: u64, n: u32| (set >> (32 * n)) as u32;
    let words: [u32; 8] = [
        0x2008_0522,
        0,
        half(less, 0),
        half(less, 0),
        0,
        half(less, 1),
        half(less, 1),
        0,
    ];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let answer = call(pid, &bytes, libc::SYS_capset, |at| [at, at + 8, 0, 0, 0, 0])?;
    ensure_eq!(answer, 0, "capset in {pid}");
    Ok(())
}

fn posture_ids_and_capabilities_of_the_agent() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("agentids")?;
    let (agent, _) = insiders(&task)?;
    as_promised(&task)?;
    task.posture = false;
    // Who accesses files: of the four ids the last.
    done(agent, "setfsuid", libc::SYS_setfsuid, [1, 0, 0, 0])?;
    names(&task, &[&format!("agent ({agent}): Uid")])?;
    done(agent, "setfsuid", libc::SYS_setfsuid, [0; 4])?;
    as_promised(&task)?;
    // CHOWN, which nothing needs any more.
    gives_up(agent, 0)?;
    names(&task, &[&format!("agent ({agent}): CapPrm")])?;
    Ok(task.finish()?)
}

fn posture_ids_and_capabilities_of_the_shim() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("shimids")?;
    let shim = task.shim_pid()?;
    as_promised(&task)?;
    task.posture = false;
    done(shim, "setfsuid", libc::SYS_setfsuid, [1, 0, 0, 0])?;
    names(&task, &[&format!("shim ({shim}): Uid")])?;
    done(shim, "setfsuid", libc::SYS_setfsuid, [0; 4])?;
    as_promised(&task)?;
    // SYS_ADMIN, of this thread: each is looked at.
    gives_up(shim, 21)?;
    names(&task, &[&format!("shim ({shim}): CapPrm")])?;
    Ok(task.finish()?)
}

/// It allows all, and is one too many: who may install filters may hide calls from
/// the ones that ask.
fn posture_a_filter_more_in_the_agent() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("agentfilter")?;
    let (agent, _) = insiders(&task)?;
    as_promised(&task)?;
    task.posture = false;
    // BPF_RET | BPF_K, SECCOMP_RET_ALLOW; then struct sock_fprog.
    let program: [u8; 8] = [6, 0, 0, 0, 0, 0, 0xff, 0x7f];
    // The address isn't known before: where a first call's bytes were, the second's are.
    let at = std::cell::Cell::new(0);
    call(agent, &program, libc::SYS_getpid, |given| {
        at.set(given + 16);
        [0; 6]
    })?;
    let mut bytes = 1_u64.to_ne_bytes().to_vec();
    bytes.extend(at.get().to_ne_bytes());
    bytes.extend(program);
    let (set_filter, flags) = (1, 0);
    let answer = call(agent, &bytes, libc::SYS_seccomp, |given| {
        [set_filter, flags, given, 0, 0, 0]
    })?;
    ensure_eq!(answer, 0, "seccomp in the agent");
    let line = format!("agent ({agent}): filters: promised 1, found 2");
    names(&task, &[&line])?;
    Ok(task.finish()?)
}

fn posture_namespaces_that_the_agent_left() -> Outcome {
    casemate_only()?;
    for (flag, lines) in [
        (libc::CLONE_NEWNET, ["agent: net namespace"].as_slice()),
        (libc::CLONE_NEWIPC, &["ipc namespace: promised "]),
        (libc::CLONE_NEWUTS, &["uts namespace: promised "]),
    ] {
        let mut task = sleeper("left")?;
        let (agent, _) = insiders(&task)?;
        as_promised(&task)?;
        task.posture = false;
        let flag = u64::from(flag.cast_unsigned());
        done(agent, "unshare", libc::SYS_unshare, [flag, 0, 0, 0])?;
        names(&task, lines)?;
        task.finish()?;
    }
    Ok(())
}

fn posture_a_forker_that_can_be_dumped() -> Outcome {
    casemate_only()?;
    let task = sleeper("dumpable")?;
    let (_, forker) = insiders(&task)?;
    as_promised(&task)?;
    let dumpable = |on: i32| {
        let set = [libc::PR_SET_DUMPABLE, on, 0, 0].map(|n| u64::from(n.cast_unsigned()));
        done(forker, "prctl", libc::SYS_prctl, set)
    };
    dumpable(1)?;
    names(&task, &["dumpable: promised no, found yes"])?;
    dumpable(0)?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

fn posture_a_process_that_is_traced() -> Outcome {
    casemate_only()?;
    let task = sleeper("traced")?;
    let (agent, _) = insiders(&task)?;
    as_promised(&task)?;
    for (pid, who) in [
        (agent, format!("agent ({agent})")),
        (task.shim_pid()?, "shim (".to_owned()),
        (init(&task)?, "init ".to_owned()),
    ] {
        let pid = Pid::from_raw(pid.cast_signed());
        let failed = |e: nix::Error| Stop::Fail(format!("trace {pid}: {e}"));
        ptrace::seize(pid, ptrace::Options::empty()).map_err(failed)?;
        let tracer = nix::unistd::gettid();
        let named = names(
            &task,
            &[&who, &format!("TracerPid: promised 0, found {tracer}")],
        );
        ptrace::interrupt(pid).map_err(failed)?;
        let stopped = Some(nix::sys::wait::WaitPidFlag::__WALL);
        nix::sys::wait::waitpid(pid, stopped).map_err(failed)?;
        ptrace::detach(pid, None).map_err(failed)?;
        named?;
        as_promised(&task)?;
    }
    Ok(task.finish()?)
}

/// A process of the host that is in nothing of the container's but its cgroups: what
/// counts for the container counts for it.
fn posture_a_process_put_into_the_cgroup() -> Outcome {
    casemate_only()?;
    let task = sleeper("guest")?;
    as_promised(&task)?;
    let child = Command::new(probe()?).arg("sleep").spawn()?;
    let pid = child.id();
    let put = || -> Outcome {
        let file = cgroup_file(&task, "pids.max")?;
        std::fs::write(file.with_file_name("cgroup.procs"), pid.to_string())?;
        let own = ["user", "mnt", "net", "ipc", "uts"]
            .map(|kind| format!("process {pid}: {kind} namespace"));
        let mut all: Vec<&str> = own.iter().map(String::as_str).collect();
        let more = [
            "Uid",
            "Gid",
            "CapEff",
            "CapBnd",
            "Seccomp",
            "filters",
            "core file",
        ]
        .map(|what| format!("process {pid}: {what}: "));
        all.extend(more.iter().map(String::as_str));
        names(&task, &all)
    };
    let named = put();
    end(child);
    named?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

/// Namespaces of processes can't be changed from outside: here the promise is.
fn posture_another_namespace_than_was_promised() -> Outcome {
    casemate_only()?;
    let task = sleeper("spaces")?;
    let honest = promise(task.rpc()?)?;
    let owner = {
        let file = std::fs::File::open(format!("/proc/{}/ns/net", honest.agent.pid))?;
        let owner = casemate_sys::namespace::owner(file)?;
        rustix::fs::fstat(owner)
            .map_err(std::io::Error::from)?
            .st_ino
    };
    let stranger = Command::new(probe()?).arg("sleep").spawn()?;
    let pid = stranger.id();
    type Change<'a> = &'a dyn Fn(&mut Promise);
    let cases: [(&str, Change<'_>); 9] = [
        // As if the stranger were the agent.
        ("owner of the mnt namespace", &|p| p.agent.pid = pid),
        ("owner of the pid namespace", &|p| p.agent.pid = pid),
        ("owner of the ipc namespace", &|p| p.agent.pid = pid),
        ("owner of the uts namespace", &|p| p.agent.pid = pid),
        // In its own, as nothing of a container is.
        ("agent: user namespace: promised the pod's", &|p| {
            p.agent.pid = pid
        }),
        ("cgroup namespace: promised its own", &|p| {
            p.containers[0].init = p.agent.pid
        }),
        ("mnt namespace: promised its own", &|p| {
            p.containers[0].init = p.agent.pid
        }),
        (": gid_map", &|p| p.containers[0].root += 1),
        ("network namespace: owner", &|p| p.users = Some(owner)),
    ];
    let mut unnamed = Vec::new();
    for (part, change) in cases {
        let mut forged = honest.clone();
        change(&mut forged);
        let found = compare(&forged, Depth::Glance).deviations;
        if !found.iter().any(|d| d.to_string().contains(part)) {
            unnamed.push(format!("{part}: {found:?}"));
        }
    }
    end(stranger);
    ensure!(unnamed.is_empty(), "not named: {unnamed:#?}");
    Ok(task.finish()?)
}

/// A promise of processes that have ended.
fn posture_who_is_no_more() -> Outcome {
    casemate_only()?;
    let task = sleeper("nomore")?;
    let honest = promise(task.rpc()?)?;
    let mut gone = Command::new(probe()?).arg("sleep").spawn()?;
    let _ = gone.kill();
    let pid = gone.id();
    // Not reaped yet: a zombie.
    until("it to end", SHORT, || {
        procs::status_field(pid, "State").is_some_and(|s| s.starts_with('Z'))
    })?;
    let look = |change: &dyn Fn(&mut Promise)| {
        let mut forged = honest.clone();
        change(&mut forged);
        let found = compare(&forged, Depth::Glance).deviations;
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let zombie = look(&|p| p.agent.pid = pid);
    ensure!(
        zombie.contains(&format!("agent ({pid}): promised alive, found ended")),
        "{zombie:#?}"
    );
    let _ = gone.wait();
    for (found, who) in [
        (look(&|p| p.agent.pid = pid), format!("agent ({pid})")),
        (
            look(&|p| p.containers[0].init = pid),
            format!("init ({pid})"),
        ),
    ] {
        let line = format!("{who}: promised alive, found no such process");
        ensure!(found.iter().any(|l| l.contains(&line)), "{found:#?}");
    }
    Ok(task.finish()?)
}

/// A process may be about to be told of a signal when it is stopped for its filters.
fn posture_a_look_takes_no_signal() -> Outcome {
    let mut child = Command::new("sh")
        .args([
            "-c",
            "trap 'echo x' USR1; echo x; while :; do read line; done",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let pid = child.id();
    let mut stdin = child.stdin.take();
    let (told, heard) = std::sync::mpsc::channel();
    let out = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let lines = out.map(|out| BufReader::new(out).lines());
        for _ in lines.into_iter().flatten() {
            let _ = told.send(());
        }
    });
    let mut lost = heard.recv_timeout(SHORT).is_err();
    let seen = std::thread::scope(|scope| {
        let looker = scope.spawn(|| {
            for _ in 0..1000 {
                casemate_sys::seccomp::filters_of(pid)?;
            }
            Ok::<_, std::io::Error>(())
        });
        while !lost && !looker.is_finished() {
            let pid = Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1);
            lost = heard.recv_timeout(Duration::from_millis(100)).is_err();
            // One that comes right before the shell's read(2) is answered after it.
            if lost && let Some(stdin) = &mut stdin {
                let _ = stdin.write_all(b"\n");
                lost = heard.recv_timeout(SHORT).is_err();
            }
        }
        looker.join()
    });
    end(child);
    let _ = reader.join();
    seen.map_err(|_| Stop::Fail("the looks panicked".to_owned()))??;
    ensure!(!lost, "a signal was taken");
    Ok(())
}
