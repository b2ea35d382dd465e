//! The forker's marked calls: it makes them under a profile that lacks them, and a
//! workload can't, with the mark or without.

use std::collections::{BTreeMap, BTreeSet};

use casemate_sys::attempt::forkers;
use casemate_sys::seccomp::filters_of;
use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::ask;
use casemate_tests::pod::insiders;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs, spec};
use seccomp_profiles::interp::{self, SeccompData};
use seccomp_profiles::marked::{FORKER, MARK};
use seccomp_profiles::surface::{Abi, reachable};
use seccomp_profiles::{
    Action, Form, Observed, Prepared, Program, minimal, shipped_program, table,
};
use serde_json::json;

use crate::calls::init;
use crate::common::{LONG, casemate_only};
use crate::hostile_node::configure;
use crate::profiles::{ANNOTATION, as_promised, one, profiles, put};
use crate::profiles_least::PROBE;

crate::trials![
    marked_calls_are_the_forkers_alone,
    marked_calls_of_the_list_are_all_tried,
    marked_calls_are_as_before_without_need,
    marked_calls_leave_no_capability,
];

/// What a call ends as that the last filter takes back: 128 + SIGSYS.
const KILLED: u32 = 159;

/// How it is tried.
struct Way {
    older: bool,
    /// With a filter of the specification's own.
    own: bool,
    no_new_privs: bool,
    broker: bool,
    uid: u32,
}

/// What the probe itself calls, and nothing else of what the forker does.
fn least() -> Result<seccomp_profiles::Profile, Stop> {
    let mut seen = Observed::default();
    for number in PROBE.iter().filter_map(|name| table::number(name)) {
        seen.add(number, &[0; 6]);
    }
    Ok(minimal("least", &seen, &one("default")?))
}

fn start(way: &Way) -> Result<Task, Stop> {
    let mut task = Task::new("marked", &["/bin/probe", "sleep"])?;
    let text = format!(
        "[kernel]\nolder_ways = {}\n[broker]\nenabled = {}\n",
        way.older, way.broker
    );
    put(&profiles(&mut task, &text)?, &least()?)?;
    spec::annotate(&mut task.spec, ANNOTATION, "least");
    task.spec["process"]["noNewPrivileges"] = way.no_new_privs.into();
    task.spec["process"]["user"] = json!({"uid": way.uid, "gid": way.uid});
    if way.own {
        // It refuses what the child calls last, too: nothing may come after it.
        task.spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["umask", "setsid", "seccomp", "capset"],
                "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
            }],
        });
    }
    task.boot()?;
    task.create()?;
    as_promised(&task)?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

/// Denials of these calls, by name.
fn told(task: &Task) -> Result<BTreeMap<String, u64>, Stop> {
    let told = ask(task.rpc()?, "Denials", &json!({}), SHORT)?;
    let mut all = BTreeMap::new();
    for denial in told["denials"].as_array().into_iter().flatten() {
        let name = denial["syscall"].as_str().unwrap_or_default().to_owned();
        *all.entry(name).or_default() += denial["count"].as_u64().unwrap_or(0);
    }
    Ok(all)
}

/// Which places of the list the profile lets run.
fn running(program: &Program) -> BTreeSet<usize> {
    let runs = |place: &usize| {
        let Some((name, [a, b, c])) = forkers::of(*place) else {
            return false;
        };
        let number = table::number(name).unwrap_or(u32::MAX);
        let data = SeccompData::x86_64(number, [a, b, c, 0, 0, 0]);
        let ret = Action::from_ret(interp::run(program, &data));
        matches!(ret, Action::Allow | Action::Log)
    };
    (0..forkers::COUNT).filter(runs).collect()
}

/// Whether it is one of the forker's, rather than of its number alone.
fn is_forkers(place: usize) -> bool {
    let Some((name, arguments)) = forkers::of(place) else {
        return false;
    };
    let holds =
        |(index, value): &(u8, u32)| arguments.get(usize::from(*index)) == Some(&u64::from(*value));
    let kinds = FORKER.iter().filter(|(known, _)| *known == name);
    kinds
        .flat_map(|(_, kinds)| *kinds)
        .any(|fixed| fixed.iter().all(holds))
}

fn marked_calls_of_the_list_are_all_tried() -> Outcome {
    let mut missing = Vec::new();
    for (name, kinds) in FORKER {
        for fixed in *kinds {
            let tried = (0..forkers::COUNT)
                .filter_map(forkers::of)
                .any(|(of, arguments)| {
                    let mut fixed = fixed.iter();
                    of == *name
                        && fixed.all(|(at, value)| arguments[usize::from(*at)] == u64::from(*value))
                });
            if !tried {
                missing.push((name, fixed));
            }
        }
    }
    ensure!(missing.is_empty(), "nobody tries {missing:?}");
    Ok(())
}

fn errors(exec: &Exec) -> Result<(u32, BTreeMap<usize, i32>), Stop> {
    let (status, text) = exec.run()?;
    let line = |line: &str| {
        let (place, error) = line.trim().split_once(' ')?;
        Some((place.parse().ok()?, error.parse().ok()?))
    };
    Ok((status, text.lines().filter_map(line).collect()))
}

fn check(way: &Way) -> Outcome {
    let task = start(way)?;
    let profile = Prepared::of(&least()?).map_err(|e| Stop::Fail(e.to_string()))?;
    let program = Program::from_bytes(profile.program(Form::Enforce))
        .ok_or_else(|| Stop::Fail("no program".into()))?;
    let runs = running(&program);
    let refused = forkers::COUNT - runs.len();
    ensure!(refused > 25, "{refused} are refused by the profile");

    // By the workload, without a mark, half of one, and another one.
    let mut rounds = 0;
    for (n, mark) in [0, MARK & 0xffff_ffff, MARK ^ 1].into_iter().enumerate() {
        let mark = mark.to_string();
        let exec = Exec::new(
            &task,
            &format!("plain{n}"),
            &["/bin/probe", "forkers", &mark],
        )?;
        let (status, errors) = errors(&exec)?;
        ensure_eq!((status, errors.len()), (0, forkers::COUNT), "mark {mark}");
        for (place, error) in errors {
            ensure!(
                error != 0 || runs.contains(&place),
                "{:?} is let through without the mark",
                forkers::of(place)
            );
        }
        rounds += 1;
    }
    let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
    for place in (0..forkers::COUNT).filter(|place| !runs.contains(place)) {
        let name = forkers::of(place).map_or("", |(name, _)| name);
        *wanted.entry(name.to_owned()).or_default() += rounds;
    }
    if way.broker {
        // And of the forker's own, which made all these processes, none.
        until("all refusals", LONG, || {
            told(&task).is_ok_and(|told| told == wanted)
        })
        .map_err(|e| Stop::Fail(format!("{e}: {:?}, of {wanted:?}", told(&task))))?;
    }

    // With the mark, each by a process of its own.
    for place in 0..forkers::COUNT {
        let (mark, at) = (MARK.to_string(), place.to_string());
        let args = ["/bin/probe", "forker", &at, &mark];
        let (status, errors) = errors(&Exec::new(&task, &format!("marked{at}"), &args)?)?;
        let what = forkers::of(place);
        if is_forkers(place) && !runs.contains(&place) {
            ensure_eq!((status, errors.len()), (KILLED, 0), "{what:?}");
        } else {
            ensure_eq!((status, errors.len()), (0, 1), "{what:?}");
        }
    }

    // Kinds of processes.
    let mut terminal = Exec::new(
        &task,
        "terminal",
        &["/bin/probe", "forker", "6", &MARK.to_string()],
    )?
    .with_terminal(24, 80)?;
    terminal.process["cwd"] = "/proc".into();
    ensure_eq!(errors(&terminal)?.0, KILLED, "behind a terminal");
    let mut missing = Exec::new(&task, "missing", &["/bin/none"])?;
    missing.process["user"] = json!({"uid": 77, "gid": 78, "umask": 0o77});
    let failed = missing.run().err().map(|e| e.to_string());
    ensure!(
        failed
            .as_ref()
            .is_some_and(|text| text.contains("/bin/none")),
        "an exec that fails says {failed:?}"
    );

    filters(&task, way, &profile)?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

/// As the kernel has them: the forker has two, and what it starts one more, behind
/// which there is what the profile allows.
fn filters(task: &Task, way: &Way, profile: &Prepared) -> Outcome {
    let pid = init(task)?;
    let of_init = filters_of(pid)?;
    let (_, forker) = insiders(task)?;
    let of_forker = filters_of(forker)?;
    ensure_eq!((of_forker.len(), of_init.len()), (2, 3), "filters");
    let marked = profile.marked();
    let marked = marked.ok_or_else(|| Stop::Fail("nothing is marked".into()))?;
    if !way.own {
        let form = if way.broker {
            &marked.notify
        } else {
            &marked.enforce
        };
        ensure!(of_forker[1] == *form, "the forker's filter is another");
        // The older way's init installs its own copy.
        ensure!(of_init[1] == *form, "init's filter is another");
        ensure!(of_init[2] == marked.closes, "init's last filter is another");
    }
    let all: Vec<Program> = of_init
        .iter()
        .filter_map(|b| Program::from_bytes(b))
        .collect();
    let chain: Vec<&Program> = all.iter().collect();
    let program = |bytes: &[u8]| Program::from_bytes(bytes);
    let agent = shipped_program("agent").and_then(program);
    let plain = program(profile.program(Form::Enforce));
    let plain: Vec<&Program> = agent.iter().chain(&plain).collect();
    ensure_eq!(
        reachable(&chain, Abi::X86_64),
        reachable(&plain, Abi::X86_64),
        "in reach"
    );
    Ok(())
}

fn marked_calls_are_the_forkers_alone() -> Outcome {
    casemate_only()?;
    let way = |older, own, no_new_privs, broker, uid| Way {
        older,
        own,
        no_new_privs,
        broker,
        uid,
    };
    for way in [
        way(false, false, true, true, 0),
        way(false, false, false, true, 1000),
        way(false, true, false, false, 1000),
        way(true, false, false, false, 0),
        way(true, true, true, true, 1000),
        way(false, true, false, true, 0),
    ] {
        check(&way).map_err(|stop| match stop {
            Stop::Fail(text) => Stop::Fail(format!(
                "older {}, own {}, no_new_privs {}, broker {}, uid {}: {text}",
                way.older, way.own, way.no_new_privs, way.broker, way.uid
            )),
            other => other,
        })?;
    }
    Ok(())
}

/// A profile that has all of it is installed as it is, and nothing beside it.
fn marked_calls_are_as_before_without_need() -> Outcome {
    casemate_only()?;
    for name in ["compat", "default", "strict"] {
        let mut task = Task::new("unmarked", &["/bin/probe", "sleep"])?;
        configure(&mut task, &format!("profile = \"{name}\"\n"))?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        let profile = Prepared::shipped(name).ok_or_else(|| Stop::Fail("none".into()))?;
        let filters = filters_of(init(&task)?)?;
        ensure_eq!(filters.len(), 2, "filters under {name}");
        ensure!(
            filters[1] == profile.program(Form::Notify),
            "{name}: another filter"
        );
        let exec = Exec::new(
            &task,
            "marked",
            &["/bin/probe", "forker", "6", &MARK.to_string()],
        )?;
        ensure_eq!(exec.run()?.0, 0, "the mark under {name}");
        task.finish()?;
    }
    Ok(())
}

/// The capability that the last filter takes without no_new_privs isn't there any more
/// when something runs.
fn marked_calls_leave_no_capability() -> Outcome {
    casemate_only()?;
    const SYS_ADMIN: u64 = 1 << 21;
    for uid in [0, 1000] {
        let task = start(&Way {
            older: false,
            own: false,
            no_new_privs: false,
            broker: true,
            uid,
        })?;
        let mut exec = Exec::new(&task, "asleep", &["/bin/probe", "sleep"])?;
        exec.process["capabilities"] = json!({"permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
            "bounding": ["CAP_KILL"], "inheritable": ["CAP_KILL"]});
        let pid = exec.begin()?;
        for pid in [init(&task)?, pid] {
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                let text = procs::status_field(pid, set).unwrap_or_default();
                let bits = u64::from_str_radix(text.trim(), 16)
                    .map_err(|e| Stop::Fail(format!("{set} of {pid}: {text:?}: {e}")))?;
                ensure!(bits & SYS_ADMIN == 0, "uid {uid}: {set} of {pid} is {text}");
            }
        }
        as_promised(&task)?;
        exec.kill(9)?;
        exec.wait()?;
        task.finish()?;
    }
    Ok(())
}
