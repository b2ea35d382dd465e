//! The forker's marked calls: that its filter lets it make them, and that nobody behind
//! the last filter can.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{nr, server, verdict};
use proptest::prelude::*;
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::marked::{FORKER, MARK, close, lacking, open};
use seccomp_profiles::profile::Profile;
use seccomp_profiles::stack::stack;
use seccomp_profiles::surface::{self, Abi, reachable};
use seccomp_profiles::{
    Action, Form, Observed, Prepared, Program, SockFilter, compile, compile_as, minimal, oci,
    shipped, shipped_program, shipped_program_as, table,
};

const WORKLOADS: [&str; 3] = ["compat", "default", "strict"];

/// The forker's calls as it makes them, the other arguments being `rest`.
fn forkers(mark: u64, rest: u64) -> Vec<SeccompData> {
    let mut all = Vec::new();
    for (name, kinds) in FORKER {
        for fixed in *kinds {
            let mut args = [rest; 6];
            args[5] = mark;
            for (index, value) in *fixed {
                args[usize::from(*index)] = u64::from(*value);
            }
            all.push(SeccompData::x86_64(nr(name), args));
        }
    }
    all
}

/// Profiles that lack more or less of what the forker needs.
fn some_profiles() -> Vec<Profile> {
    let mut all = Vec::new();
    for name in WORKLOADS {
        let node = shipped(name).unwrap();
        all.push(minimal("least", &Observed::default(), &node));
        all.push(minimal("server", &server(), &node));
    }
    all
}

fn runs(action: Action) -> bool {
    matches!(action, Action::Allow | Action::Log)
}

#[test]
fn shipped_profiles_have_all_that_a_forker_calls() {
    for name in WORKLOADS {
        for form in [Form::Enforce, Form::Notify] {
            let program = Program::from_bytes(shipped_program_as(name, form).unwrap()).unwrap();
            assert_eq!(lacking(&program), [], "{name}");
            assert_eq!(open(&program).unwrap(), None, "{name}");
            assert_eq!(close(&[&program], None).unwrap(), None, "{name}");
        }
        assert!(Prepared::shipped(name).unwrap().marked().is_none());
    }
}

#[test]
fn the_marked_calls_are_not_those_of_every_program() {
    for (name, _) in FORKER {
        let known = table::number(name).is_some();
        assert!(known, "{name} is no call");
        let twice = minimal::BASE.iter().any(|(base, _)| base == name);
        assert!(!twice, "{name} is in every profile anyway");
    }
    // What has six arguments has no register to spare.
    for name in [
        "mmap",
        "futex",
        "pselect6",
        "sendto",
        "recvfrom",
        "epoll_pwait",
    ] {
        assert!(FORKER.iter().all(|(forkers, _)| *forkers != name), "{name}");
    }
}

#[test]
fn the_forker_gets_its_calls_by_the_mark_alone() {
    for profile in some_profiles() {
        let asks = compile_as(&profile, Form::Notify).unwrap();
        let first = open(&asks).unwrap().unwrap();
        for rest in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
            for data in forkers(MARK, rest) {
                assert_eq!(verdict(&first, &data), Action::Allow, "{data:x?}");
            }
            for mark in [0, MARK ^ 1, MARK ^ 1 << 63, MARK & 0xffff_ffff, MARK >> 32] {
                for data in forkers(mark, rest) {
                    assert_eq!(verdict(&first, &data), verdict(&asks, &data), "{data:x?}");
                }
            }
        }
    }
}

/// Whatever the arguments: in reach is what the profile allows.
#[test]
fn behind_the_last_filter_the_reach_is_the_profiles() {
    for profile in some_profiles() {
        let plain = compile(&profile).unwrap();
        let first = open(&plain).unwrap().unwrap();
        let last = close(&[&plain], None).unwrap().unwrap();
        let before = reachable(&[&plain], Abi::X86_64);
        assert_eq!(reachable(&[&first, &last], Abi::X86_64), before);
        // As a control: without the last one there is more, which counting by
        // arguments finds.
        let open = reachable(&[&first], Abi::X86_64);
        assert!(open.len() > before.len() + 10, "{} calls", open.len());
        assert!(reachable(&[&first, &last], Abi::X32).is_empty());
        assert!(reachable(&[&first, &last], Abi::I386).is_empty());
        for data in forkers(MARK, 1) {
            let now = surface::verdict(&[&first, &last], &data);
            match runs(verdict(&plain, &data)) {
                true => assert!(runs(now), "{data:x?}"),
                false => assert_eq!(now, Action::KillProcess, "{data:x?}"),
            }
        }
    }
}

/// What isn't marked is heard of as before, with a specification's filter or without.
#[test]
fn a_refused_call_without_the_mark_is_still_asked_about() {
    let own = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["setresuid", "uname", "seccomp"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        {"names": ["ptrace"], "action": "SCMP_ACT_KILL_PROCESS"}
    ]}"#;
    let own = oci::compile(&serde_json::from_str(own).unwrap()).unwrap();
    for profile in some_profiles() {
        let asks = compile_as(&profile, Form::Notify).unwrap();
        let stacked = stack(&asks, &own.program).unwrap();
        for (asks, own) in [(&asks, None), (&stacked.asks, Some(&stacked.own))] {
            let first = open(asks).unwrap().unwrap();
            let last = close(&[asks], own).unwrap().unwrap();
            let before: Vec<&Program> = [asks].into_iter().chain(own).collect();
            for nr in 0..500 {
                for rest in [0, 1, 4, 0x1011, u64::MAX] {
                    let plain = SeccompData::x86_64(nr, [rest; 6]);
                    assert_eq!(
                        surface::verdict(&[&first, &last], &plain),
                        surface::verdict(&before, &plain),
                        "{plain:x?}"
                    );
                }
            }
            for data in forkers(MARK, 1) {
                let now = surface::verdict(&[&first, &last], &data);
                assert!(
                    runs(surface::verdict(&before, &data))
                        || now == Action::KillProcess
                        || matches!(now, Action::Errno(_)) && runs(verdict(asks, &data)),
                    "{data:x?}: {now}"
                );
                assert_eq!(verdict(&first, &data), Action::Allow);
            }
        }
    }
}

/// In a container that is learned from, the forker isn't asked about, and nobody else
/// can keep out of the recording.
#[test]
fn learning_does_not_ask_about_the_forker() {
    let learn = Program::from_bytes(shipped_program("learn").unwrap()).unwrap();
    let first = open(&learn).unwrap().unwrap();
    for name in WORKLOADS {
        let profile = Program::from_bytes(shipped_program(name).unwrap()).unwrap();
        let last = close(&[&profile, &learn], None).unwrap().unwrap();
        for data in forkers(MARK, 1) {
            assert_eq!(surface::verdict(&[&first, &profile], &data), Action::Allow);
            let by_workload = surface::verdict(&[&first, &profile, &last], &data);
            assert_eq!(by_workload, Action::KillProcess, "{data:x?}");
        }
        for data in forkers(0, 1) {
            let heard = surface::verdict(&[&first, &profile, &last], &data);
            assert_eq!(heard, Action::Notify, "{data:x?}");
        }
    }
}

/// What the kernel remembers as allowed whatever the arguments stays so.
#[test]
fn calls_that_always_run_are_not_looked_at() {
    for profile in some_profiles() {
        let plain = compile(&profile).unwrap();
        let chain = [
            open(&plain).unwrap().unwrap(),
            close(&[&plain], None).unwrap().unwrap(),
        ];
        for (nr, name) in table::SYSCALLS {
            if !looks(&plain, *nr) && runs(verdict(&plain, &SeccompData::x86_64(*nr, [0; 6]))) {
                assert!(chain.iter().all(|p| !looks(p, *nr)), "{name}");
            }
        }
    }
}

/// Whether `program` loads an argument of a call of this number, as the kernel finds
/// out when it is installed.
fn looks(program: &Program, nr: u32) -> bool {
    let (mut at, mut held) = (0, 0);
    loop {
        let SockFilter { code, jt, jf, k } = program.instructions()[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            0x20 if k == 0 => held = nr,
            0x20 if k == 4 => held = 0xc000_003e,
            0x20 => return true,
            0x06 => return false,
            0x05 => at += usize::try_from(k).unwrap(),
            0x15 => jump(held == k),
            0x25 => jump(held > k),
            0x35 => jump(held >= k),
            _ => return true,
        }
    }
}

fn some_calls() -> impl Strategy<Value = Observed> {
    let kinds = FORKER.iter().map(|(name, _)| nr(name));
    let number = prop_oneof![prop::sample::select(kinds.collect::<Vec<_>>()), 0u32..450];
    let value = prop_oneof![
        0u64..50,
        Just(1030),
        Just(0x1011),
        Just(0x540e),
        Just(0x5441),
        any::<u64>()
    ];
    let call = (number, prop::array::uniform6(value));
    prop::collection::vec(call, 0..40).prop_map(|calls| {
        let mut seen = Observed::default();
        for (number, args) in calls {
            seen.add(number, &args);
        }
        seen
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_profile_is_opened_for_its_workload(
        seen in some_calls(),
        base in 0usize..3,
        calls in prop::collection::vec((0usize..FORKER.len(), prop::array::uniform6(any::<u64>())), 200),
    ) {
        let node = shipped(WORKLOADS[base]).unwrap();
        let profile = minimal("some", &seen, &node);
        let plain = compile(&profile).unwrap();
        if let Some(first) = open(&plain).unwrap() {
            let last = close(&[&plain], None).unwrap().unwrap();
            for (at, mut args) in calls {
                let (name, kinds) = FORKER[at];
                for mark in [args[5], MARK] {
                    args[5] = mark;
                    for fixed in kinds {
                        for (index, value) in *fixed {
                            args[usize::from(*index)] = u64::from(*value);
                        }
                        let data = SeccompData::x86_64(nr(name), args);
                        prop_assert_eq!(
                            runs(surface::verdict(&[&first, &last], &data)),
                            runs(verdict(&plain, &data)),
                            "{:x?}", data
                        );
                        if mark == MARK {
                            prop_assert_eq!(verdict(&first, &data), Action::Allow);
                        }
                    }
                }
            }
            prop_assert_eq!(
                reachable(&[&first, &last], Abi::X86_64),
                reachable(&[&plain], Abi::X86_64)
            );
        }
    }
}
