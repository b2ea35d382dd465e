//! A specification's filter on a profile's: what `stack` makes of the two refuses
//! the same calls with the same errors, and has the listener hear of them.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::{FOREIGN, X32};
use proptest::prelude::*;
use seccomp_profiles::interp::{self, SeccompData};
use seccomp_profiles::oci::{self, OciArg, OciSeccomp, OciSyscall};
use seccomp_profiles::stack::{Stacked, forker_calls, stack};
use seccomp_profiles::surface::verdict;
use seccomp_profiles::{Action, Form, Program, shipped_program_as, table};

const WORKLOADS: [&str; 3] = ["compat", "default", "strict"];
const RUNC: &str = include_str!("data/runc-default.txt");

fn shipped(name: &str, form: Form) -> Program {
    Program::from_bytes(shipped_program_as(name, form).unwrap()).unwrap()
}

/// What a process sees, where the listener answers as it should: with the error of
/// the specification's filter, or else of the profile's.
fn seen(chain: [&Program; 2], own: &Program, enforce: &Program, data: &SeccompData) -> Action {
    match verdict(&chain, data) {
        Action::Notify => match Action::from_ret(interp::run(own, data)) {
            Action::Errno(errno) => Action::Errno(errno),
            _ => Action::from_ret(interp::run(enforce, data)),
        },
        action => action,
    }
}

/// Arguments around all that `program` compares words with.
fn values(program: &Program) -> Vec<u64> {
    let compared: BTreeSet<u32> = program.instructions().iter().map(|ins| ins.k).collect();
    let mut all: Vec<u64> = compared
        .into_iter()
        .flat_map(|k| [k.wrapping_sub(1), k, k.wrapping_add(1)])
        .flat_map(|k| [u64::from(k), u64::from(k) << 32, u64::from(k) | 1 << 40])
        .collect();
    all.extend([0, u64::MAX]);
    all
}

/// How many calls were asked about because of the specification's filter alone.
fn check(name: &str, own: &Program, calls: &[SeccompData]) -> usize {
    let (asks, enforce) = (shipped(name, Form::Notify), shipped(name, Form::Enforce));
    let made = stack(&asks, own).unwrap();
    check_made(&made, (&asks, &enforce), own, calls)
}

fn check_made(
    made: &Stacked,
    (asks, enforce): (&Program, &Program),
    own: &Program,
    calls: &[SeccompData],
) -> usize {
    let forker = forker_calls();
    let mut own_alone = 0;
    for data in calls {
        let before = seen([asks, own], own, enforce, data);
        let after = seen([&made.asks, &made.own], own, enforce, data);
        assert_eq!(before, after, "{data:x?}");
        // The forker is bound by the profile alone, as it was.
        let of_forker = verdict(&[&made.asks], data);
        let of_profile = verdict(&[asks], data);
        if forker.contains(&data.nr) || of_profile != Action::Allow {
            assert_eq!(of_forker, of_profile, "{data:x?}");
        }
        let heard = verdict(&[&made.asks, &made.own], data);
        let own_says = Action::from_ret(interp::run(own, data));
        let refused = matches!(own_says, Action::Errno(_));
        // Whatever the profile asks about is heard, unless something kills.
        if of_profile == Action::Notify && (refused || own_says == Action::Allow) {
            assert_eq!(heard, Action::Notify, "{data:x?}");
        }
        if refused && of_profile == Action::Allow && !forker.contains(&data.nr) {
            assert_eq!(heard, Action::Notify, "{data:x?}");
            own_alone += 1;
        }
    }
    own_alone
}

/// All numbers, with arguments from `values` in turn.
fn calls(values: &[u64], seed: u64) -> Vec<SeccompData> {
    let mut mixed = seed | 1;
    let mut pick = || {
        mixed = mixed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        values[usize::try_from(mixed >> 33).unwrap() % values.len()]
    };
    let numbers = (0..500).chain([600, 1023, X32 - 1, X32, X32 + 59, u32::MAX]);
    let mut all: Vec<SeccompData> = numbers
        .flat_map(|nr| std::iter::repeat_n(nr, 12))
        .map(|nr| SeccompData::x86_64(nr, std::array::from_fn(|_| pick())))
        .collect();
    // Those whose arguments are looked at, more often, with what they compare with.
    for name in [
        "socket",
        "clone",
        "ioctl",
        "prctl",
        "setsockopt",
        "personality",
    ] {
        let nr = table::number(name).unwrap();
        all.extend((0..600).map(|_| SeccompData::x86_64(nr, std::array::from_fn(|_| pick()))));
    }
    for arch in FOREIGN {
        all.push(SeccompData {
            arch,
            ..SeccompData::x86_64(1, [pick(); 6])
        });
    }
    all
}

fn runc() -> Program {
    let lines = RUNC.lines().filter(|line| !line.starts_with('#'));
    let instructions = lines.map(|line| {
        let [code, jt, jf, k] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        seccomp_profiles::SockFilter {
            code: u16::from_str_radix(code, 16).unwrap(),
            jt: jt.parse().unwrap(),
            jf: jf.parse().unwrap(),
            k: u32::from_str_radix(k, 16).unwrap(),
        }
    });
    Program::new(instructions.collect())
}

#[test]
fn containerds_default_profile_hides_nothing() {
    // As libseccomp wrote it, but for foreign ABIs, which ours never lets pass.
    let own = runc();
    for name in WORKLOADS {
        let mut all = values(&own);
        all.extend(values(&shipped(name, Form::Notify)));
        let mut calls = calls(&all, 7);
        calls.retain(|data| data.arch == 0xc000_003e);
        check(name, &own, &calls);
        let made = stack(&shipped(name, Form::Notify), &own).unwrap();
        let sizes = [&made.asks, &made.own].map(|p| p.instructions().len());
        println!(
            "{name}: {sizes:?} instructions, of runc's {}",
            own.instructions().len()
        );
        assert!(
            sizes[0] <= 500 && sizes[1] <= own.instructions().len(),
            "{sizes:?}"
        );
    }
}

#[test]
fn what_the_specification_alone_refuses_is_asked_about() {
    let deny = |names: &[&str]| OciSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        syscalls: vec![OciSyscall {
            names: names.iter().map(|n| (*n).to_owned()).collect(),
            action: "SCMP_ACT_ERRNO".into(),
            errno_ret: Some(13),
            args: Vec::new(),
        }],
        ..OciSeccomp::default()
    };
    let own = oci::compile(&deny(&["mkdir", "mkdirat", "getppid"]))
        .unwrap()
        .program;
    let data = |name: &str| SeccompData::x86_64(table::number(name).unwrap(), [0; 6]);
    let calls = ["mkdir", "mkdirat", "getppid", "unlink"].map(data);
    assert_eq!(check("default", &own, &calls), 2);
    let made = stack(&shipped("default", Form::Notify), &own).unwrap();
    // What the forker calls is left to the filter that it isn't bound by.
    assert_eq!(verdict(&[&made.asks], &data("getppid")), Action::Allow);
    assert_eq!(verdict(&[&made.own], &data("getppid")), Action::Errno(13));
    assert_eq!(verdict(&[&made.asks], &data("mkdir")), Action::Notify);
    assert_eq!(verdict(&[&made.own], &data("mkdir")), Action::Allow);
}

/// It is part of each start of a container.
#[test]
fn stacking_is_quick() {
    let names: Vec<String> = table::SYSCALLS
        .iter()
        .map(|(_, name)| (*name).to_owned())
        .filter(|name| !name.starts_with("mount") && name != "ptrace")
        .collect();
    let seccomp = OciSeccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        syscalls: vec![OciSyscall {
            names,
            action: "SCMP_ACT_ALLOW".into(),
            errno_ret: None,
            args: Vec::new(),
        }],
        ..OciSeccomp::default()
    };
    let own = oci::compile(&seccomp).unwrap().program;
    let asks = shipped("default", Form::Notify);
    let mut times: Vec<_> = (0..20)
        .map(|_| {
            let begun = std::time::Instant::now();
            stack(&asks, &own).unwrap();
            begun.elapsed()
        })
        .collect();
    times.sort();
    println!("{:?} at the median", times[10]);
    assert!(times[0].as_millis() < 20, "{times:?}");
}

fn an_action() -> impl Strategy<Value = (String, Option<u32>)> {
    prop_oneof![
        3 => Just(("SCMP_ACT_ALLOW", None)),
        3 => prop_oneof![Just(1u32), Just(22), Just(38)].prop_map(|e| ("SCMP_ACT_ERRNO", Some(e))),
        1 => Just(("SCMP_ACT_LOG", None)),
        1 => Just(("SCMP_ACT_TRAP", None)),
        1 => Just(("SCMP_ACT_KILL_PROCESS", None)),
        1 => Just(("SCMP_ACT_KILL_THREAD", None)),
        1 => Just(("SCMP_ACT_TRACE", Some(3))),
    ]
    .prop_map(|(name, errno)| (name.to_owned(), errno))
}

fn an_arg() -> impl Strategy<Value = OciArg> {
    let value = prop_oneof![0u64..50, any::<u32>().prop_map(u64::from), any::<u64>()];
    let op = prop::sample::select(oci::OPERATORS);
    (0u32..3, value.clone(), value, op).prop_map(|(index, value, value_two, op)| OciArg {
        index,
        value,
        value_two,
        op: op.to_owned(),
    })
}

fn a_rule() -> impl Strategy<Value = OciSyscall> {
    let often = prop::sample::select(
        &[
            "socket",
            "clone",
            "ioctl",
            "prctl",
            "setsockopt",
            "mkdir",
            "mount",
            "personality",
        ][..],
    );
    let name = prop_oneof![
        often.prop_map(str::to_owned),
        (0..table::SYSCALLS.len()).prop_map(|at| table::SYSCALLS[at].1.to_owned()),
    ];
    (
        prop::collection::vec(name, 1..12),
        an_action(),
        prop::collection::vec(an_arg(), 0..3),
    )
        .prop_map(|(names, (action, errno_ret), args)| OciSyscall {
            names,
            action,
            errno_ret,
            args,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_filter_of_a_specification_refuses_as_before(
        default in an_action(),
        rules in prop::collection::vec(a_rule(), 0..12),
        seed in any::<u64>(),
    ) {
        let seccomp = OciSeccomp {
            default_action: default.0,
            default_errno_ret: default.1,
            syscalls: rules,
            ..OciSeccomp::default()
        };
        let own = oci::compile(&seccomp).unwrap().program;
        for name in WORKLOADS {
            let mut all = values(&own);
            all.extend(values(&shipped(name, Form::Notify)));
            check(name, &own, &calls(&all, seed));
        }
    }
}
