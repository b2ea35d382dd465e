//! Random profiles: the compiler against the reference, the interpreter, and
//! seccompiler's own whole programs.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::{arguments, some_calls_of, verdict};
use proptest::prelude::*;
use seccomp_profiles::interp::{self, SeccompData};
use seccomp_profiles::profile::{ArgSet, Condition, Group, Op, Rule, Width};
use seccomp_profiles::{
    Action, Explainer, Form, Profile, Program, SockFilter, beyond, compile, compile_as, reference,
    table,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

fn an_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::Allow),
        Just(Action::Log),
        Just(Action::Notify),
        Just(Action::KillProcess),
        prop_oneof![Just(1u16), Just(22), Just(38)].prop_map(Action::Errno),
    ]
}

fn an_arg() -> impl Strategy<Value = ArgSet> {
    let value = prop_oneof![
        0u64..4,
        any::<u32>().prop_map(u64::from),
        Just(u64::from(u32::MAX)),
        any::<u64>(),
        Just(u64::MAX),
    ];
    let values = prop::collection::vec(value.clone(), 1..3);
    (0u8..6, 0u8..7, value, values, any::<bool>()).prop_map(|(index, op, mask, values, wide)| {
        let width = if wide { Width::W64 } else { Width::W32 };
        let keep = if wide { u64::MAX } else { u64::from(u32::MAX) };
        let op = match op {
            0 => Op::Eq,
            1 => Op::Ne,
            2 => Op::Lt,
            3 => Op::Le,
            4 => Op::Gt,
            5 => Op::Ge,
            _ => Op::MaskedEq(mask & keep),
        };
        let values = values.iter().map(|v| match op {
            Op::MaskedEq(mask) => v & mask,
            _ => v & keep,
        });
        ArgSet {
            index,
            op,
            values: values.collect(),
            width,
        }
    })
}

fn a_profile(
    groups: impl Into<prop::collection::SizeRange>,
    rules: std::ops::Range<usize>,
) -> impl Strategy<Value = Profile> {
    // A narrow choice of names, so that rules meet on one call and ranges form.
    let name = prop_oneof![0usize..12, 0..table::SYSCALLS.len()]
        .prop_map(|at| table::SYSCALLS[at].1.to_owned());
    let rule = (
        prop::collection::vec(name, 1..5),
        prop::collection::vec(an_arg(), 0..3),
        any::<bool>(),
    );
    let rule = rule.prop_map(|(syscalls, args, quiet)| Rule {
        syscalls,
        args,
        reason: "random".to_owned(),
        quiet,
    });
    let group =
        (an_action(), prop::collection::vec(rule, rules)).prop_map(|(action, rules)| Group {
            name: "random".to_owned(),
            action,
            rules,
        });
    let actions = (an_action(), an_action(), an_action());
    (actions, prop::collection::vec(group, groups)).prop_map(
        |((default, unknown, x32), mut groups): (_, Vec<Group>)| {
            for (at, group) in groups.iter_mut().enumerate() {
                group.name = format!("random {at}");
            }
            Profile {
                name: "random".to_owned(),
                description: String::new(),
                within: None,
                default,
                unknown,
                x32,
                groups,
                left_out: Vec::new(),
            }
        },
    )
}

fn check(profile: &Profile) -> Result<(), TestCaseError> {
    let program = compile(profile).unwrap();
    let notify = compile_as(profile, Form::Notify).unwrap();
    let explainer = Explainer::of(profile).unwrap();
    let named = profile
        .groups
        .iter()
        .flat_map(|g| &g.rules)
        .flat_map(|r| &r.syscalls);
    let numbers = named.map(|name| table::number(name).unwrap());
    let numbers: Vec<u32> = numbers
        .flat_map(|n| [n.saturating_sub(1), n, n + 1])
        .collect();
    for nr in numbers
        .into_iter()
        .chain([0, 470, 471, 1023, common::X32, u32::MAX])
    {
        for data in &some_calls_of(profile, nr, 200) {
            prop_assert_eq!(
                verdict(&program, data),
                reference::decide(profile, data),
                "{:x?}",
                data
            );
            common::explained(profile, &explainer, data)?;
            let rule = &explainer.rules()[reference::rule(profile, data)];
            prop_assert_eq!(
                verdict(&notify, data),
                common::notified(rule),
                "{:x?}",
                data
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Who is told to be within another one lets nothing more run.
    #[test]
    fn a_profile_within_another_allows_no_more(
        outer in a_profile(1..4, 1..4),
        turned in prop::collection::vec(any::<(bool, bool, bool)>(), 4),
        extra in an_arg(),
    ) {
        let mut inner = outer.clone();
        for (group, (refuse, bare, narrow)) in inner.groups.iter_mut().zip(turned) {
            if refuse {
                group.action = Action::Errno(1);
            }
            for rule in &mut group.rules {
                if bare {
                    rule.args.clear();
                }
                if narrow {
                    rule.args.push(extra.clone());
                }
            }
        }
        let (one, two) = (compile(&inner).unwrap(), compile(&outer).unwrap());
        let runs = |program: &Program, data: &SeccompData| {
            matches!(verdict(program, data), Action::Allow | Action::Log)
        };
        if beyond(&one, &two).is_none() {
                for (nr, _) in table::SYSCALLS {
                    for data in some_calls_of(&inner, *nr, 100)
                        .iter()
                        .chain(&some_calls_of(&outer, *nr, 100))
                    {
                        prop_assert!(!runs(&one, data) || runs(&two, data), "{:x?}", data);
                    }
                }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_random_profile_equals_the_reference(profile in a_profile(0..6, 1..5)) {
        check(&profile)?;
    }

    #[test]
    fn one_action_equals_seccompilers_program(profile in a_profile(1, 1..6)) {
        let action = profile.groups[0].action;
        prop_assume!(action != Action::Notify && profile.default != Action::Notify);
        prop_assume!(action != profile.default);
        let mut profile = profile;
        // seccompiler has one answer for everything that does not match.
        profile.unknown = profile.default;
        profile.x32 = profile.default;
        let theirs = theirs(&profile);
        let ours = compile(&profile).unwrap();
        for (_, name) in table::SYSCALLS.iter().take(16) {
            for data in &some_calls_of(&profile, table::number(name).unwrap(), 200) {
                prop_assert_eq!(interp::run(&ours, data), interp::run(&theirs, data), "{:x?}", data);
            }
        }
        let foreign = SeccompData { arch: common::FOREIGN[0], ..SeccompData::x86_64(1, [0; 6]) };
        prop_assert_eq!(interp::run(&ours, &foreign), interp::run(&theirs, &foreign));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    // Large enough that offsets overflow 8 bits and far jumps are needed.
    #[test]
    fn a_large_profile_equals_the_reference(profile in a_profile(20..30, 6..9)) {
        prop_assert!(compile(&profile).unwrap().instructions().len() > 256);
        check(&profile)?;
    }
}

fn their_action(action: Action) -> SeccompAction {
    match action {
        Action::Allow => SeccompAction::Allow,
        Action::Log => SeccompAction::Log,
        Action::Errno(number) => SeccompAction::Errno(number.into()),
        Action::KillProcess => SeccompAction::KillProcess,
        other => panic!("{other} is not part of this test"),
    }
}

fn their_condition(condition: &Condition) -> SeccompCondition {
    let width = match condition.width {
        Width::W32 => SeccompCmpArgLen::Dword,
        Width::W64 => SeccompCmpArgLen::Qword,
    };
    let op = match condition.op {
        Op::Eq => SeccompCmpOp::Eq,
        Op::Ne => SeccompCmpOp::Ne,
        Op::Lt => SeccompCmpOp::Lt,
        Op::Le => SeccompCmpOp::Le,
        Op::Gt => SeccompCmpOp::Gt,
        Op::Ge => SeccompCmpOp::Ge,
        Op::MaskedEq(mask) => SeccompCmpOp::MaskedEq(mask),
    };
    SeccompCondition::new(condition.index, width, op, condition.value).unwrap()
}

/// The profile's only group as a program written by seccompiler alone.
fn theirs(profile: &Profile) -> Program {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut always: Vec<i64> = Vec::new();
    for rule in &profile.groups[0].rules {
        for name in &rule.syscalls {
            let number = i64::from(table::number(name).unwrap());
            let chain = rules.entry(number).or_default();
            for list in rule.alternatives() {
                if list.is_empty() {
                    always.push(number);
                } else {
                    let list = list.iter().map(their_condition).collect();
                    chain.push(SeccompRule::new(list).unwrap());
                }
            }
        }
    }
    // No rules for a number is its way to say "always".
    for number in always {
        rules.insert(number, Vec::new());
    }
    let (miss, hit) = (profile.default, profile.groups[0].action);
    let (miss, hit) = (their_action(miss), their_action(hit));
    let filter = SeccompFilter::new(rules, miss, hit, TargetArch::x86_64).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let instructions = program.iter().map(|ins| SockFilter {
        code: ins.code,
        jt: ins.jt,
        jf: ins.jf,
        k: ins.k,
    });
    Program::new(instructions.collect())
}

#[test]
fn boundary_arguments_keep_both_words_in_play() {
    let condition = Condition {
        index: 2,
        op: Op::Eq,
        value: 7,
        width: Width::W32,
    };
    let all = arguments([condition].iter(), 100);
    assert!(all.iter().any(|args| args[2] == 7));
    assert!(all.iter().any(|args| args[2] == 7 | 1 << 32));
    assert!(all.iter().any(|args| args[2] == 8));
}
