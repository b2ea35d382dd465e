//! The shipped profiles: compiled as written, complete, and without a spare rule.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{calls, calls_of, verdict};
use seccomp_profiles::interp::{self, SeccompData};
use seccomp_profiles::profile::{ArgSet, Condition};
use seccomp_profiles::{Action, Kind, Profile, Program, reference, shipped, shipped_names, table};

const EPERM: Action = Action::Errno(1);
const ENOTTY: Action = Action::Errno(25);
const ENOSYS: Action = Action::Errno(38);
const EAFNOSUPPORT: Action = Action::Errno(97);

fn all() -> Vec<(Profile, Program)> {
    let all: Vec<_> = shipped_names()
        .map(|name| {
            let bytes = seccomp_profiles::shipped_program(name).unwrap();
            (shipped(name).unwrap(), Program::from_bytes(bytes).unwrap())
        })
        .collect();
    assert_eq!(
        all.iter().map(|(p, _)| p.name.as_str()).collect::<Vec<_>>(),
        [
            "agent", "compat", "default", "learn", "learner", "pause", "shim", "strict"
        ]
    );
    all
}

fn program(name: &str) -> Program {
    Program::from_bytes(seccomp_profiles::shipped_program(name).unwrap()).unwrap()
}

fn call(name: &str, args: [u64; 6]) -> SeccompData {
    SeccompData::x86_64(table::number(name).unwrap(), args)
}

#[test]
fn the_build_compiles_what_the_library_compiles() {
    for (profile, program) in all() {
        assert_eq!(seccomp_profiles::compile(&profile).unwrap(), program);
    }
}

#[test]
fn every_program_equals_the_reference() {
    for (profile, program) in all() {
        for data in calls(&profile) {
            assert_eq!(
                verdict(&program, &data),
                reference::decide(&profile, &data),
                "{}: {data:x?}",
                profile.name
            );
        }
    }
}

#[test]
fn every_instruction_is_reached() {
    for (profile, program) in all() {
        let mut reached = vec![false; program.instructions().len()];
        for data in calls(&profile) {
            interp::run_with(&program, &data, |at| reached[at] = true);
        }
        let missed: Vec<usize> = (0..reached.len()).filter(|&at| !reached[at]).collect();
        assert_eq!(missed, [0; 0], "{}: {program:?}", profile.name);
    }
}

#[test]
fn programs_are_small() {
    for (profile, program) in all() {
        let size = program.instructions().len();
        println!("{}: {size} instructions", profile.name);
        // Its lists are the longest.
        let most = if profile.name == "compat" { 450 } else { 400 };
        assert!(size <= most, "{}: {size} instructions", profile.name);
    }
}

/// The profile without the call `name` in one rule, for one value of one
/// condition or entirely.
fn without(
    profile: &Profile,
    (group, rule): (usize, usize),
    name: &str,
    value: Option<(usize, u64)>,
) -> Profile {
    let mut changed = profile.clone();
    let rules = &mut changed.groups[group].rules;
    let mut own = rules[rule].clone();
    own.syscalls = vec![name.to_owned()];
    rules[rule].syscalls.retain(|syscall| syscall != name);
    if let Some((arg, value)) = value {
        own.args[arg].values.retain(|v| *v != value);
        if !own.args[arg].values.is_empty() {
            rules.push(own);
        }
    }
    changed
}

/// Whether the argument compares with this value of the condition.
fn holds(arg: &ArgSet, value: u64, data: &SeccompData) -> bool {
    let condition = Condition {
        index: arg.index,
        op: arg.op,
        value,
        width: arg.width,
    };
    condition.holds(&data.args)
}

#[test]
fn no_rule_name_or_value_is_redundant() {
    for (profile, _) in all() {
        let mut tried = 0;
        for (g, group) in profile.groups.iter().enumerate() {
            for (r, rule) in group.rules.iter().enumerate() {
                for name in &rule.syscalls {
                    let number = table::number(name).unwrap();
                    let all = calls_of(&profile, number);
                    let values = rule.args.iter().enumerate();
                    let values =
                        values.flat_map(|(a, arg)| arg.values.iter().map(move |v| (a, *v)));
                    for value in std::iter::once(None).chain(values.map(Some)) {
                        let less = without(&profile, (g, r), name, value);
                        // Elsewhere the rule said nothing before either.
                        let mut touched = all.iter().filter(|data| match value {
                            None => true,
                            Some((a, v)) => holds(&rule.args[a], v, data),
                        });
                        let differs = touched.any(|data| {
                            reference::decide(&profile, data) != reference::decide(&less, data)
                        });
                        assert!(
                            differs,
                            "{}, group {}: {name} {value:x?} changes nothing",
                            profile.name, group.name
                        );
                        tried += 1;
                    }
                }
            }
        }
        // The pause has four calls in all.
        let least = match profile.name.as_str() {
            "pause" => 4,
            "learner" => 18,
            _ => 21,
        };
        assert!(tried >= least, "{}: only {tried} rules tried", profile.name);
    }
}

#[test]
fn allow_lists_say_something_about_every_call() {
    for (profile, _) in all().into_iter().filter(|(p, _)| p.default == ENOSYS) {
        for (_, name) in table::SYSCALLS {
            let rules = profile
                .groups
                .iter()
                .flat_map(|g| &g.rules)
                .map(|r| &r.syscalls);
            let said = rules.chain(profile.left_out.iter().map(|l| &l.syscalls));
            assert!(
                said.flatten().any(|said| said == name),
                "{}: nothing about {name}",
                profile.name
            );
        }
    }
}

#[test]
fn left_out_calls_get_the_default() {
    for (profile, program) in all() {
        for name in profile.left_out.iter().flat_map(|l| &l.syscalls) {
            assert_eq!(
                verdict(&program, &call(name, [1; 6])),
                profile.default,
                "{name}"
            );
        }
    }
}

#[test]
fn a_high_word_does_not_hide_a_refused_request() {
    const TIOCSTI: u64 = 0x5412;
    const HIGH: u64 = 1 << 32;
    for (profile, program) in all() {
        for high in [0, HIGH, 1 << 63, 0xffff_ffff_0000_0000] {
            let data = call("ioctl", [0, TIOCSTI | high, 0, 0, 0, 0]);
            let refused = match profile.name.as_str() {
                "agent" => Action::Trace(0),
                // The profile's own filter is under it.
                "learn" => Action::Notify,
                _ => EPERM,
            };
            assert_eq!(
                verdict(&program, &data),
                refused,
                "{} {high:x}",
                profile.name
            );
        }
    }
    let default = program("default");
    let newuser = call("clone", [0x1000_0011 | HIGH, 0, 0, 0, 0, 0]);
    assert_eq!(verdict(&default, &newuser), EPERM);
    let vsock = call("socket", [40 | HIGH, 1, 0, 0, 0, 0]);
    assert_eq!(verdict(&default, &vsock), EAFNOSUPPORT);
}

#[test]
fn default_answers_as_documented() {
    let default = program("default");
    let check = |name: &str, args: [u64; 6], want: Action| {
        assert_eq!(
            verdict(&default, &call(name, args)),
            want,
            "{name} {args:x?}"
        );
    };
    check("getpid", [0; 6], Action::Allow);
    check("clone3", [0; 6], ENOSYS);
    check("io_uring_setup", [0; 6], ENOSYS);
    check("unshare", [0; 6], EPERM);
    check("mount", [0; 6], EPERM);
    // What glibc passes for fork and for a thread, and musl for a thread.
    for flags in [0x0120_0011, 0x003d_0f00, 0x007d_0f00] {
        check("clone", [flags, 0, 0, 0, 0, 0], Action::Allow);
    }
    for flag in [
        0x2_0000,
        0x200_0000,
        0x400_0000,
        0x800_0000,
        0x1000_0000,
        0x2000_0000,
        0x4000_0000,
    ] {
        check("clone", [flag | 17, 0, 0, 0, 0, 0], EPERM);
    }
    check("socket", [1, 1, 0, 0, 0, 0], Action::Allow);
    check("socket", [16, 3, 0, 0, 0, 0], Action::Allow);
    check("socket", [16, 3, 9, 0, 0, 0], Action::Errno(93));
    check("socket", [38, 5, 0, 0, 0, 0], EAFNOSUPPORT);
    check("socketpair", [2, 1, 0, 0, 0, 0], EAFNOSUPPORT);
    check("ioctl", [0, 0x5401, 0, 0, 0, 0], Action::Allow);
    check("ioctl", [0, 0xae00, 0, 0, 0, 0], ENOTTY);
    check("prctl", [38, 1, 0, 0, 0, 0], Action::Allow);
    check("prctl", [0x5961_6d61, 1, 0, 0, 0, 0], Action::Errno(22));
    check("personality", [0x4_0000, 0, 0, 0, 0, 0], EPERM);
    check("seccomp", [1, 8, 0, 0, 0, 0], EPERM);
    check("seccomp", [1, 0, 0, 0, 0, 0], Action::Allow);
    check("setsockopt", [3, 41, 67, 0, 0, 0], Action::Allow);
    check("setsockopt", [3, 41, 64, 0, 0, 0], Action::Errno(92));
    check("setsockopt", [3, 0, 64, 0, 0, 0], Action::Errno(92));
    check("mknodat", [0, 0, 0o010_644, 0, 0, 0], Action::Allow);
    check("mknodat", [0, 0, 0o020_644, 0, 0, 0], EPERM);
    check("mknodat", [0, 0, 0o060_644, 0, 0, 0], EPERM);
}

/// What the kernel does with two verdicts of stacked filters: the smaller value
/// of the action, as a signed number, wins.
fn stricter(a: Action, b: Action) -> Action {
    let rank = |action: Action| (action.to_ret() & 0xffff_0000).cast_signed();
    if rank(b) < rank(a) { b } else { a }
}

#[test]
fn the_agents_filter_takes_nothing_from_its_workloads() {
    let agent = shipped("agent").unwrap();
    for name in ["default", "strict", "compat"] {
        let workload = shipped(name).unwrap();
        for data in calls(&workload).into_iter().chain(calls(&agent)) {
            let own = reference::decide(&workload, &data);
            let ceiling = reference::decide(&agent, &data);
            assert_eq!(stricter(own, ceiling), own, "{name}: {data:x?}");
            // x32 calls are refused without asking anybody.
            if matches!(own, Action::Errno(_)) && data.nr < common::X32 {
                let heard = stricter(Action::Notify, ceiling);
                assert_eq!(heard, Action::Notify, "{name}: {data:x?}");
            }
        }
    }
}

#[test]
fn the_pause_can_only_wait_and_end() {
    let pause = program("pause");
    let allowed: Vec<_> = table::SYSCALLS
        .iter()
        .map(|(_, name)| *name)
        .filter(|name| verdict(&pause, &call(name, [1; 6])) == Action::Allow)
        .collect();
    assert_eq!(allowed, ["close", "pause", "sendmsg", "exit_group"]);
}

/// Who answers the questions of a container that is learned from lets each call run.
/// So none may be asked about that is refused without the question, and what isn't
/// asked about must be what every profile has.
#[test]
fn learning_asks_about_what_runs_and_refuses_nothing() {
    let (agent, learn) = (shipped("agent").unwrap(), shipped("learn").unwrap());
    let base = seccomp_profiles::minimal::base();
    for name in ["default", "strict", "compat"] {
        let workload = shipped(name).unwrap();
        let all = [&workload, &agent, &learn].map(calls);
        let (mut asked, mut passed) = (0, 0);
        for data in all.into_iter().flatten() {
            let [own, ceiling, asks] =
                [&workload, &agent, &learn].map(|profile| reference::decide(profile, &data));
            let before = stricter(own, ceiling);
            let with = stricter(before, asks);
            if before != Action::Allow {
                assert_eq!(with, before, "{name}: {data:x?}");
            } else if with == Action::Notify {
                asked += 1;
            } else {
                assert_eq!(with, Action::Allow, "{name}: {data:x?}");
                let kind = Kind::of(data.nr, &data.args);
                let is_base = base.of(data.nr).any(|known| *known == kind);
                assert!(
                    is_base,
                    "{name}: {kind} is neither asked about nor in the base"
                );
                passed += 1;
            }
        }
        assert!(
            asked > 100 && passed > 50,
            "{name}: {asked} asked, {passed} not"
        );
    }
}

#[test]
fn what_names_a_path_or_an_address_is_asked_about() {
    let learn = program("learn");
    for name in [
        "open",
        "openat",
        "openat2",
        "newfstatat",
        "statx",
        "access",
        "faccessat",
        "execve",
        "execveat",
        "unlinkat",
        "renameat2",
        "mkdirat",
        "readlinkat",
        "bind",
        "connect",
        "sendto",
    ] {
        assert_eq!(
            verdict(&learn, &call(name, [0; 6])),
            Action::Notify,
            "{name}"
        );
    }
}

#[test]
fn strict_is_within_default_and_default_within_compat() {
    for (inner, outer) in [("strict", "default"), ("default", "compat")] {
        let (inner, outer) = (shipped(inner).unwrap(), shipped(outer).unwrap());
        for data in calls(&inner).into_iter().chain(calls(&outer)) {
            if reference::decide(&inner, &data) == Action::Allow {
                let wider = reference::decide(&outer, &data);
                assert_eq!(wider, Action::Allow, "{}: {data:x?}", outer.name);
            }
        }
    }
}
