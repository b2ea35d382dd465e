//! What goes wrong around a shim: calls that cross each other, a journal that is
//! cut short, garbage or about somebody else, bundles half removed, limits met. An
//! error that says so or success, and then a node without a trace.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::node::Traces;
use casemate_tests::run::until;
use casemate_tests::shim::{Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{World, ensure, ensure_eq, procs};
use containerd_shim_protos::api::CreateTaskResponse;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

use crate::common::{LONG, casemate_only};
use crate::hostile_node::{OWN_MOUNTS, wrap};

crate::trials![
    bad_two_deletes_at_once,
    bad_two_delete_calls_at_once,
    bad_calls_during_create,
    bad_half_removed_bundle,
    bad_journal_on_a_full_disk,
    bad_journal_of_garbage,
    bad_few_processes,
    bad_unwritable_ids,
    bad_answer_that_nobody_reads,
    bad_shim_that_nobody_wants,
];

const SLEEP: &[&str] = &["/bin/probe", "sleep"];
/// containerd gives `delete` 5 s.
const DELETE_WITHIN: Duration = Duration::from_millis(2500);

fn traced(name: &str) -> Result<(Task, Traces), Stop> {
    let mut task = Task::new(name, SLEEP)?;
    let traces = Traces::of(&mut task)?;
    Ok((task, traces))
}

fn running(name: &str) -> Result<(Task, Traces), Stop> {
    let (mut task, traces) = traced(name)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok((task, traces))
}

fn deleted(task: &Task) -> Outcome {
    let begun = Instant::now();
    task.shim.delete()?;
    let took = begun.elapsed();
    ensure!(took < DELETE_WITHIN, "delete took {took:?}");
    Ok(())
}

fn nothing_left(traces: &Traces) -> Outcome {
    Ok(traces.expect(&Default::default(), Duration::from_secs(3))?)
}

fn bad_two_deletes_at_once() -> Outcome {
    casemate_only()?;
    for signal in [Signal::KILL, Signal::STOP, Signal::KILL, Signal::STOP] {
        let (task, traces) = running("twodel")?;
        procs::signal(task.shim_pid()?, signal);
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| deleted(&task))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.collect::<Vec<_>>()
        });
        for result in results {
            match result {
                Ok(outcome) => outcome?,
                Err(_) => return fail("a thread panicked"),
            }
        }
        nothing_left(&traces)?;
    }
    Ok(())
}

fn bad_two_delete_calls_at_once() -> Outcome {
    casemate_only()?;
    for round in 0..5 {
        let (task, traces) = running("twocalls")?;
        let answer = task.answer()?;
        task.rpc()?.kill(&task.id, 9, true)?;
        task.rpc()?.wait(&task.id, SHORT)?;
        let clients: Vec<Client> = (0..4)
            .map(|_| Client::connect(&answer.address, answer.version))
            .collect::<Result<_, _>>()?;
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = clients
                .iter()
                .map(|client| scope.spawn(|| client.delete(&task.id)))
                .collect();
            threads.into_iter().filter_map(|t| t.join().ok()).collect()
        });
        let good = results.iter().filter(|r| r.is_ok()).count();
        let late = results
            .iter()
            .filter_map(|r| r.as_ref().err()?.code())
            .filter(|code| *code == ttrpc::Code::NOT_FOUND)
            .count();
        ensure_eq!((good, late), (1, 3), "round {round}: {results:?}");
        task.rpc()?.shutdown(&task.id)?;
        task.wait_gone(SHORT)?;
        deleted(&task)?;
        nothing_left(&traces)?;
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crossing {
    DeleteCall,
    DeleteCommand,
    Shutdown,
    Terminate,
}

fn bad_calls_during_create() -> Outcome {
    casemate_only()?;
    use Crossing::{DeleteCall, DeleteCommand, Shutdown, Terminate};
    let mut refused = 0;
    for micros in [0, 300, 800, 1500, 3000] {
        for crossing in [DeleteCall, DeleteCommand, Shutdown, Terminate] {
            let (mut task, traces) = traced("during")?;
            let answer = task.boot()?;
            let other = Client::connect(&answer.address, answer.version)?;
            let (rpc, ask) = (task.rpc()?.clone(), task.create_request());
            let create =
                std::thread::spawn(move || rpc.call::<CreateTaskResponse>("Create", &ask, SHORT));
            std::thread::sleep(Duration::from_micros(micros));
            match crossing {
                DeleteCall => drop(other.delete(&task.id)),
                DeleteCommand => deleted(&task)?,
                Shutdown => drop(other.shutdown(&task.id)),
                Terminate => procs::signal(task.shim_pid()?, Signal::TERM),
            }
            let begun = Instant::now();
            let Ok(created) = create.join() else {
                return fail("Create panicked");
            };
            let took = begun.elapsed();
            let what = format!("{crossing:?} {micros} µs after Create: {created:?}");
            ensure!(took < Duration::from_secs(3), "{what}: after {took:?}");
            refused += usize::from(created.is_err());
            if crossing == Shutdown {
                if created.is_ok() {
                    task.rpc()?.delete(&task.id)?;
                }
                task.wait_gone(SHORT)
                    .map_err(|error| Stop::Fail(format!("{what}: {error}")))?;
            }
            if crossing == Terminate {
                task.wait_gone(SHORT)?;
            }
            procs::signal(task.shim_pid()?, Signal::KILL);
            task.wait_gone(SHORT)?;
            deleted(&task)?;
            traces
                .expect(&Default::default(), Duration::from_secs(3))
                .map_err(|error| Stop::Fail(format!("{what}: {error}")))?;
        }
    }
    println!("{refused} of 20 Creates were refused");
    ensure!(refused > 0, "nothing ever came between");
    Ok(())
}

fn bad_half_removed_bundle() -> Outcome {
    casemate_only()?;
    const FILES: [&str; 3] = ["config.json", "address", "casemate.journal"];
    for (lost, killed) in [
        (&FILES[..], false),
        (&FILES[..2], false),
        (&FILES[..2], true),
        (&FILES[1..2], true),
    ] {
        let (task, traces) = running("half")?;
        for name in lost {
            fs::remove_file(task.bundle().join(name))?;
        }
        if killed {
            procs::signal(task.shim_pid()?, Signal::KILL);
            task.wait_gone(SHORT)?;
        } else {
            // The shim goes by what it knows.
            let rpc = task.rpc()?;
            rpc.kill(&task.id, 9, true)?;
            rpc.wait(&task.id, SHORT)?;
            rpc.delete(&task.id)?;
            rpc.shutdown(&task.id)?;
            task.wait_gone(SHORT)?;
        }
        deleted(&task)?;
        nothing_left(&traces)?;
    }
    Ok(())
}

/// One error in one line, or none.
fn in_one_line(said: &str, what: &str) -> Outcome {
    ensure_eq!(said.trim().lines().count(), 1, "{what}: lines of {said:?}");
    Ok(())
}

fn bad_journal_on_a_full_disk() -> Outcome {
    casemate_only()?;
    let mut ends = [0; 3];
    // Room for that many bytes of journal; and for `start` to write its address.
    let mut cases = vec![(0, false), (2300, false)];
    cases.extend(
        [0, 60, 200, 900, 1500, 1800, 2200, 2700, 3200, 3600, 4000].map(|room| (room, true)),
    );
    for (room, for_address) in cases {
        let (mut task, traces) = traced("fulljournal")?;
        let bundle = task.bundle().to_owned();
        mount(
            "tmpfs",
            &bundle,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=40k"),
        )?;
        let end = on_a_full_disk(&mut task, room, for_address);
        let cleaned = deleted(&task);
        unmount(&bundle, UnmountFlags::DETACH)?;
        let named = |stop| match stop {
            Stop::Fail(why) => Stop::Fail(format!("room for {room}: {why}")),
            skip => skip,
        };
        ends[end.map_err(named)?] += 1;
        cleaned.map_err(named)?;
        nothing_left(&traces).map_err(named)?;
    }
    println!(
        "full disk: {} starts and {} Creates failed, {} went well",
        ends[0], ends[1], ends[2]
    );
    ensure!(
        ends.iter().all(|n| *n > 0),
        "not each of the ends was seen: {ends:?}"
    );
    Ok(())
}

/// 0: `start` failed, 1: Create did, 2: nothing did.
fn on_a_full_disk(task: &mut Task, room: usize, for_address: bool) -> Result<usize, Stop> {
    let bundle = task.bundle().to_owned();
    fs::create_dir_all(bundle.join("rootfs"))?;
    task.write_spec()?;
    // A page of the journal is all it gets: lines of another shim fill it.
    let line = "{\"of_another_release\":\"\"}\n";
    let mut old = line.repeat(4096 / line.len());
    old.truncate((4096 - room) / line.len() * line.len());
    fs::write(bundle.join("casemate.journal"), &old)?;
    fs::write(bundle.join("address"), "unix:///x")?;
    let mut filler = fs::File::create(bundle.join("filler"))?;
    let fill = |filler: &mut fs::File| while filler.write(&[0; 4096]).is_ok() {};
    fill(&mut filler);
    if for_address {
        let size = filler.metadata()?.len();
        filler.set_len(size - 4096)?;
    }
    let output = task.shim.run("start")?;
    filler.seek(SeekFrom::End(0))?;
    fill(&mut filler);
    if output.code() != 0 {
        let said = output.out() + &output.err();
        in_one_line(&said, "start")?;
        ensure!(
            said.contains("journal") || said.contains("No space"),
            "start: {said:?}"
        );
        return Ok(0);
    }
    let answer = casemate_tests::shim::Answer::parse(&output.stdout)?;
    task.adopt(&answer)?;
    let Err(error) = task.create() else {
        task.rpc()?.start(&task.id)?;
        task.rpc()?.kill(&task.id, 9, true)?;
        task.rpc()?.wait(&task.id, SHORT)?;
        task.rpc()?.delete(&task.id)?;
        task.rpc()?.shutdown(&task.id)?;
        task.wait_gone(SHORT)?;
        return Ok(2);
    };
    // As containerd does after a Create that has failed.
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(SHORT)?;
    let said = error.to_string();
    in_one_line(&said, "Create")?;
    ensure!(said.to_lowercase().contains("no space"), "Create: {said:?}");
    Ok(1)
}

fn bad_journal_of_garbage() -> Outcome {
    casemate_only()?;
    let scratch = World::get()?.dir().join("journals");
    let victim = scratch.join("victim");
    fs::create_dir_all(victim.join("inside"))?;
    fs::write(victim.join("file"), b"kept")?;
    // A bystander whose pid was somebody else's.
    let mut bystander = Command::new("sleep").arg("300").spawn()?;
    let who = procs::identity(bystander.id());
    let start = who.map_or(0, |who| who.start_time);
    let pid = bystander.id();
    let shown = victim.display();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("noise", (0..60_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8).collect()),
        ("one long line", vec![b'x'; 3 << 20]),
        ("many lines", b"{\"shim\":{}}\n".repeat(50_000)),
        ("deep", [b"[".repeat(200_000), b"\n".to_vec()].concat()),
        (
            "wrong types",
            b"{\"shim\":7}\n{\"cgroup\":{\"container\":3,\"dirs\":\"/\"}}\n{\"removed\":null}\n[]\n"
                .to_vec(),
        ),
        (
            "a pid of another",
            format!(
                "{{\"shim\":{{\"pid\":{pid},\"start_time\":{}}}}}\n\
                 {{\"agent\":{{\"pid\":{pid},\"start_time\":{}}}}}\n\
                 {{\"logger\":{{\"container\":\"a\",\"pid\":{pid},\"start_time\":1}}}}\n",
                start + 1,
                start.saturating_sub(1)
            )
            .into_bytes(),
        ),
        (
            "pids that can't be",
            b"{\"shim\":{\"pid\":0,\"start_time\":0}}\n{\"agent\":{\"pid\":4294967295,\"start_time\":1}}\n\
              {\"agent\":{\"pid\":1,\"start_time\":0}}\n"
                .to_vec(),
        ),
        (
            "paths of others",
            format!(
                "{{\"socket\":\"{shown}/file\"}}\n{{\"container\":{{\"id\":\"a\",\"bundle\":\"{shown}\"}}}}\n\
                 {{\"cgroup\":{{\"container\":\"a\",\"dirs\":[\"{shown}\",\"{shown}/inside\",\"/\",\"relative\"]}}}}\n"
            )
            .into_bytes(),
        ),
    ];
    let mut outcome = Ok(());
    for (what, bytes) in &cases {
        let (task, traces) = traced("garbage")?;
        task.write_spec()?;
        fs::write(task.bundle().join("casemate.journal"), bytes)?;
        outcome = deleted(&task)
            .and_then(|()| nothing_left(&traces))
            .and_then(|()| whole(&victim))
            .map_err(|stop| match stop {
                Stop::Fail(why) => Stop::Fail(format!("{what}: {why}")),
                skip => skip,
            });
        if outcome.is_ok() && !who.is_some_and(procs::alive) {
            outcome = fail(format!("{what}: a bystander was killed"));
        }
        if outcome.is_err() {
            break;
        }
    }
    let _ = bystander.kill();
    let _ = bystander.wait();
    outcome
}

fn whole(victim: &Path) -> Outcome {
    ensure!(
        victim.join("inside").is_dir(),
        "a directory of another is gone"
    );
    ensure_eq!(fs::read(victim.join("file"))?, b"kept", "a file of another");
    Ok(())
}

fn bad_few_processes() -> Outcome {
    casemate_only()?;
    let Some(base) = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
        .iter()
        .map(Path::new)
        .find(|dir| dir.join("cgroup.procs").exists())
    else {
        return fail("no hierarchy with pids");
    };
    let few = base.join(format!("{}few", World::get()?.mark()));
    fs::create_dir(&few)?;
    let done = few_processes(&few);
    let gone = until("the cgroup to be free", SHORT, || {
        fs::remove_dir(&few).is_ok()
    });
    done?;
    gone?;
    Ok(())
}

fn few_processes(few: &Path) -> Outcome {
    if !few.join("pids.max").exists() {
        return casemate_tests::skip::skip("no pids controller here");
    }
    let (mut failed, mut well) = (0, 0);
    for limit in [1, 2, 3, 4, 12] {
        let (mut task, traces) = traced("fewpids")?;
        fs::write(few.join("pids.max"), limit.to_string())?;
        wrap(
            &mut task,
            &format!("echo $$ > {}/cgroup.procs", few.display()),
            "",
        )?;
        task.write_spec()?;
        let output = task.shim.run("start")?;
        if output.code() == 0 {
            let answer = casemate_tests::shim::Answer::parse(&output.stdout)?;
            task.adopt(&answer)?;
            match task.create() {
                Ok(_) => {
                    well += 1;
                    task.rpc()?.start(&task.id)?;
                    task.rpc()?.kill(&task.id, 9, true)?;
                    task.rpc()?.wait(&task.id, SHORT)?;
                    task.rpc()?.delete(&task.id)?;
                }
                Err(error) => {
                    failed += 1;
                    in_one_line(&error.to_string(), "Create")?;
                }
            }
            task.rpc()?.shutdown(&task.id)?;
            task.wait_gone(SHORT)?;
        } else {
            failed += 1;
            in_one_line(&(output.out() + &output.err()), "start")?;
        }
        fs::write(few.join("pids.max"), "max")?;
        deleted(&task)?;
        nothing_left(&traces)?;
    }
    println!("few processes: {failed} failed, {well} went well");
    ensure!(failed > 0 && well > 0, "{failed} failed, {well} went well");
    Ok(())
}

fn bad_unwritable_ids() -> Outcome {
    casemate_only()?;
    let (mut task, traces) = traced("roids")?;
    wrap(
        &mut task,
        &format!("{OWN_MOUNTS}\nmount -t tmpfs -o ro none /run/casemate || exit 9"),
        "",
    )?;
    let text = crate::hostile::told(task)?;
    ensure!(
        text.contains("/run/casemate"),
        "{text:?} names no directory"
    );
    ensure!(text.contains("Read-only"), "{text:?} gives no reason");
    nothing_left(&traces)
}

fn bad_answer_that_nobody_reads() -> Outcome {
    casemate_only()?;
    let (task, traces) = traced("unread")?;
    task.write_spec()?;
    let mut start = task
        .shim
        .command("start")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop((start.stdout.take(), start.stderr.take()));
    let mut status = None;
    until("start to end", LONG, || {
        status = start.try_wait().ok().flatten();
        status.is_some()
    })?;
    ensure!(status.is_some_and(|s| !s.success()), "start: {status:?}");
    nothing_left(&traces)
}

fn bad_shim_that_nobody_wants() -> Outcome {
    casemate_only()?;
    // One that nobody connects to, one whose client asks for nothing, and one
    // that has had its container.
    let (mut lonely, traces) = traced("lonely")?;
    lonely.boot()?;
    let (mut used, traces_of_used) = traced("used")?;
    ended(&mut used)?;
    let (kept, traces_of_kept) = running("kept")?;
    let took = lonely.wait_gone(Duration::from_secs(40))?;
    ensure!(took > Duration::from_secs(20), "gone after {took:?}");
    used.wait_gone(Duration::from_secs(10))?;
    ensure!(
        procs::identity(kept.shim_pid()?).is_some(),
        "a shim with a container is gone"
    );
    kept.finish()?;
    nothing_left(&traces)?;
    nothing_left(&traces_of_used)?;
    nothing_left(&traces_of_kept)
}

fn ended(task: &mut Task) -> Outcome {
    task.boot()?;
    task.create()?;
    let rpc = task.rpc()?;
    rpc.start(&task.id)?;
    rpc.kill(&task.id, 9, true)?;
    rpc.wait(&task.id, SHORT)?;
    rpc.delete(&task.id)?;
    Ok(())
}
