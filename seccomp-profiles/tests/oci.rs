//! `linux.seccomp`: the semantics that runc with libseccomp gives it.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{X32, verdict};
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::oci::{self, Compiled, OciError, OciSeccomp};
use seccomp_profiles::{Action, table};
use serde_json::{Value, json};

const ENOSYS: Action = Action::Errno(38);
const EPERM: Action = Action::Errno(1);

fn compile(json: Value) -> Result<Compiled, OciError> {
    oci::compile(&serde_json::from_value::<OciSeccomp>(json).unwrap())
}

fn ask(compiled: &Compiled, name: &str, args: [u64; 6]) -> Action {
    let number = table::number(name).unwrap();
    verdict(&compiled.program, &SeccompData::x86_64(number, args))
}

fn error(json: Value) -> String {
    let text = compile(json).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn the_shape_of_containerds_default_profile() {
    let compiled = compile(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["read", "write", "getpid", "_llseek", "chown32", "openat2", "cachestat"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 2_114_060_288u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ]
    }))
    .unwrap();
    assert!(!compiled.listener);
    assert_eq!(compiled.flags, 0);
    assert_eq!(compiled.warnings.len(), 2, "{:?}", compiled.warnings);
    assert!(compiled.warnings[0].contains("SCMP_ARCH_X86, SCMP_ARCH_X32"));
    assert!(compiled.warnings[1].contains("2 names") && compiled.warnings[1].contains("_llseek"));
    let ask = |name, first| ask(&compiled, name, [first, 0, 0, 0, 0, 0]);
    assert_eq!(ask("getpid", 0), Action::Allow);
    assert_eq!(ask("mount", 0), EPERM);
    assert_eq!(ask("socket", 40), EPERM);
    assert_eq!(ask("socket", 2), Action::Allow);
    assert_eq!(ask("personality", 8), Action::Allow);
    assert_eq!(ask("personality", 4), EPERM);
    assert_eq!(ask("clone", 17), Action::Allow);
    assert_eq!(ask("clone", 0x1000_0000), EPERM);
    assert_eq!(ask("clone3", 0), ENOSYS);
    // cachestat is the highest number named: newer calls answer as an old kernel.
    assert_eq!(ask("process_mrelease", 0), EPERM);
    assert_eq!(ask("cachestat", 0), Action::Allow);
    assert_eq!(ask("fchmodat2", 0), ENOSYS);
    let at = |nr, arch| {
        verdict(
            &compiled.program,
            &SeccompData {
                arch,
                ..SeccompData::x86_64(nr, [0; 6])
            },
        )
    };
    assert_eq!(at(1023, 0xc000_003e), ENOSYS);
    assert_eq!(at(X32 + 39, 0xc000_003e), ENOSYS);
    for arch in common::FOREIGN {
        assert_eq!(at(20, arch), Action::KillProcess);
    }
}

#[test]
fn conditions_on_different_arguments_must_all_hold_on_one_argument_any() {
    let rules = |first: u32, second: u32| {
        compile(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": first, "value": 5, "op": "SCMP_CMP_EQ"},
            {"index": second, "value": 7, "op": "SCMP_CMP_EQ"}]}]}))
        .unwrap()
    };
    let both = rules(0, 1);
    assert_eq!(ask(&both, "ioctl", [5, 7, 0, 0, 0, 0]), Action::Allow);
    assert_eq!(ask(&both, "ioctl", [5, 6, 0, 0, 0, 0]), EPERM);
    let either = rules(1, 1);
    assert_eq!(ask(&either, "ioctl", [0, 5, 0, 0, 0, 0]), Action::Allow);
    assert_eq!(ask(&either, "ioctl", [0, 7, 0, 0, 0, 0]), Action::Allow);
    assert_eq!(ask(&either, "ioctl", [0, 6, 0, 0, 0, 0]), EPERM);
}

#[test]
fn operators_compare_64_bits_unsigned() {
    const V: u64 = 0x1_0000_0005;
    let holds = |op: &str, arg: u64| {
        let compiled = compile(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 2, "value": V, "op": op}]}]}))
        .unwrap();
        ask(&compiled, "read", [0, 0, arg, 0, 0, 0]) == Action::Allow
    };
    for arg in [0, 5, V - 1, V, V + 1, V ^ 1 << 32, V | 1 << 63, u64::MAX] {
        assert_eq!(holds("SCMP_CMP_EQ", arg), arg == V);
        assert_eq!(holds("SCMP_CMP_NE", arg), arg != V);
        assert_eq!(holds("SCMP_CMP_LT", arg), arg < V);
        assert_eq!(holds("SCMP_CMP_LE", arg), arg <= V);
        assert_eq!(holds("SCMP_CMP_GT", arg), arg > V);
        assert_eq!(holds("SCMP_CMP_GE", arg), arg >= V);
    }
}

#[test]
fn a_rule_without_conditions_decides_its_call() {
    // Before or after the conditional rule: libseccomp keeps only the broader one.
    let conditional = json!({"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 22, "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]});
    let always = json!({"names": ["ioctl"], "action": "SCMP_ACT_LOG"});
    for rules in [
        [conditional.clone(), always.clone()],
        [always.clone(), conditional.clone()],
    ] {
        let compiled =
            compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})).unwrap();
        assert_eq!(ask(&compiled, "ioctl", [0, 1, 0, 0, 0, 0]), Action::Log);
    }
    let later = json!({"names": ["ioctl"], "action": "SCMP_ACT_KILL"});
    let compiled =
        compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [always, later]})).unwrap();
    assert_eq!(ask(&compiled, "ioctl", [0; 6]), Action::Log);
}

#[test]
fn rules_with_the_default_action_are_dropped() {
    // Kept, the unconditional rule would hide the conditional one.
    let compiled = compile(json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [
        {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]}]}))
    .unwrap();
    assert_eq!(ask(&compiled, "ioctl", [0, 1, 0, 0, 0, 0]), Action::Allow);
    assert_eq!(ask(&compiled, "ioctl", [0, 2, 0, 0, 0, 0]), EPERM);
}

#[test]
fn a_default_that_lets_calls_run_has_no_enosys_above_the_highest_name() {
    for (action, want) in [
        ("SCMP_ACT_ALLOW", Action::Allow),
        ("SCMP_ACT_LOG", Action::Log),
        ("SCMP_ACT_TRACE", Action::Trace(1)),
    ] {
        let compiled = compile(json!({"defaultAction": action, "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_KILL_PROCESS"}]})).unwrap();
        assert_eq!(ask(&compiled, "listns", [0; 6]), want);
        assert_eq!(ask(&compiled, "mount", [0; 6]), Action::KillProcess);
        let x32 = SeccompData::x86_64(X32 + 165, [0; 6]);
        assert_eq!(verdict(&compiled.program, &x32), ENOSYS);
    }
}

#[test]
fn every_action_and_its_error_number() {
    for (action, errno, want) in [
        ("SCMP_ACT_KILL", None, Action::KillThread),
        ("SCMP_ACT_KILL_THREAD", None, Action::KillThread),
        ("SCMP_ACT_KILL_PROCESS", None, Action::KillProcess),
        ("SCMP_ACT_TRAP", None, Action::Trap),
        ("SCMP_ACT_ERRNO", None, EPERM),
        ("SCMP_ACT_ERRNO", Some(4095), Action::Errno(4095)),
        ("SCMP_ACT_TRACE", Some(65535), Action::Trace(65535)),
        ("SCMP_ACT_LOG", None, Action::Log),
        ("SCMP_ACT_NOTIFY", None, Action::Notify),
    ] {
        let compiled = compile(
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/a.sock", "syscalls": [
            {"names": ["mount"], "action": action, "errnoRet": errno}]}),
        )
        .unwrap();
        assert_eq!(ask(&compiled, "mount", [0; 6]), want);
        assert_eq!(compiled.listener, want == Action::Notify);
    }
}

#[test]
fn flags_and_the_listener() {
    let compiled = |action: &str| {
        compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/a.sock",
            "flags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
            "syscalls": [{"names": ["mount"], "action": action}]}))
        .unwrap()
    };
    let with = compiled("SCMP_ACT_NOTIFY");
    assert_eq!(
        with.flags,
        oci::FLAG_TSYNC
            | oci::FLAG_TSYNC_ESRCH
            | oci::FLAG_LOG
            | oci::FLAG_NEW_LISTENER
            | oci::FLAG_WAIT_KILLABLE_RECV
    );
    let without = compiled("SCMP_ACT_ERRNO");
    assert_eq!(without.flags, oci::FLAG_TSYNC | oci::FLAG_LOG);
    assert_eq!(without.warnings.len(), 1);
}

#[test]
fn errors_name_the_field_and_the_value() {
    let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG"}, rule]});
    let arg = |index: u64, op: &str| json!({"names": ["read"], "action": "SCMP_ACT_LOG", "args": [{"index": index, "value": 1, "op": op}]});
    for (json, parts) in [
        (
            json!({"defaultAction": "SCMP_ACT_FUTURE"}),
            ["defaultAction", "SCMP_ACT_FUTURE"],
        ),
        (json!({"defaultAction": ""}), ["defaultAction", "\"\""]),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}),
            ["defaultErrnoRet", "4096"],
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 7}),
            ["defaultErrnoRet", "7"],
        ),
        (
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            ["defaultAction", "SCMP_ACT_NOTIFY"],
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_VAX"]}),
            ["architectures[1]", "SCMP_ARCH_VAX"],
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW"]}),
            ["flags[0]", "SECCOMP_FILTER_FLAG_NEW"],
        ),
        (
            rule(json!({"names": ["read"], "action": "allow"})),
            ["syscalls[1].action", "\"allow\""],
        ),
        (
            rule(json!({"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 3})),
            ["syscalls[1].errnoRet", "3"],
        ),
        (
            rule(arg(6, "SCMP_CMP_EQ")),
            ["syscalls[1].args[0].index", "6"],
        ),
        (
            rule(arg(0, "SCMP_CMP_XX")),
            ["syscalls[1].args[0].op", "SCMP_CMP_XX"],
        ),
        (
            rule(json!({"names": ["mount"], "action": "SCMP_ACT_NOTIFY"})),
            ["listenerPath", "SCMP_ACT_NOTIFY"],
        ),
        (
            rule(json!({"names": ["write"], "action": "SCMP_ACT_NOTIFY"})),
            ["syscalls[1].action", "write"],
        ),
    ] {
        let text = error(json);
        for part in parts {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn a_hostile_number_of_rules_is_an_error() {
    // Alternating actions, so that nothing merges.
    let rules = |count: u64| -> Vec<Value> {
        (0..count)
            .map(|at| {
                let action = if at % 2 == 0 { "SCMP_ACT_LOG" } else { "SCMP_ACT_TRAP" };
                json!({"names": ["read"], "action": action, "args": [{"index": 0, "value": at, "op": "SCMP_CMP_EQ"}]})
            })
            .collect()
    };
    let big = compile(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules(900)})).unwrap();
    for value in [0u64, 1, 254, 255, 256, 257, 898, 899] {
        let want = if value % 2 == 0 {
            Action::Log
        } else {
            Action::Trap
        };
        assert_eq!(ask(&big, "read", [value, 0, 0, 0, 0, 0]), want);
    }
    assert_eq!(ask(&big, "read", [900, 0, 0, 0, 0, 0]), Action::Allow);
    for count in [5_000, 70_000] {
        error(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules(count)}));
    }
}
