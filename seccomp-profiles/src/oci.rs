//! Front end for `linux.seccomp` of an OCI `config.json`.
//!
//! Follows the OCI runtime specification, "Seccomp" in config-linux.md, and where
//! that is silent what runc with libseccomp does:
//!
//! * rules whose action is the default action are dropped;
//! * in one rule, conditions on different arguments must all hold; when two are
//!   about the same argument, any single condition of the rule is enough;
//! * a rule without conditions decides its call whatever other rules say (the
//!   first one does); conditional rules are tried in file order;
//! * when the default refuses, numbers above the highest one that the profile
//!   names get `ENOSYS`, so that a C library tries an older call;
//! * names that x86-64 does not have are skipped, with a warning.
//!
//! Comparisons are of all 64 bits, as in libseccomp: a refusal of an `int` value
//! written this way does not see a set high word, which the kernel ignores. The
//! shipped profiles compare the low word and are stacked on top.
//!
//! One deviation: sub-architectures (`SCMP_ARCH_X86`, `SCMP_ARCH_X32`) are not
//! honoured. Calls through a foreign architecture kill the process and x32
//! numbers get `ENOSYS`, as in the shipped profiles; a warning says so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::action::{Action, RET_KILL_PROCESS};
use crate::compile::{Clause, CompileError, Rules, X32};
use crate::profile::{ArgSet, Condition, ENOSYS, Op, Width};
use crate::program::Program;
use crate::table;

/// `EPERM`, what an action that carries an error number has when none is given.
const EPERM: u16 = 1;
/// `MAX_ERRNO` of the kernel: larger numbers would not look like an error.
const MAX_ERRNO: u32 = 4095;
/// How many clauses all rules together may expand to.
const MAX_CLAUSES: usize = 1 << 16;

/// `SECCOMP_FILTER_FLAG_TSYNC`, see seccomp(2).
pub const FLAG_TSYNC: u32 = 1;
/// `SECCOMP_FILTER_FLAG_LOG`, see seccomp(2).
pub const FLAG_LOG: u32 = 1 << 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`, see seccomp(2).
pub const FLAG_SPEC_ALLOW: u32 = 1 << 2;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`, see seccomp_unotify(2).
pub const FLAG_NEW_LISTENER: u32 = 1 << 3;
/// `SECCOMP_FILTER_FLAG_TSYNC_ESRCH`, see seccomp(2).
pub const FLAG_TSYNC_ESRCH: u32 = 1 << 4;
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, see linux/seccomp.h.
pub const FLAG_WAIT_KILLABLE_RECV: u32 = 1 << 5;

/// Values of `action` and `defaultAction`, for `features`.
pub const ACTIONS: &[&str] = &[
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
];
/// Values of `op`, for `features`.
pub const OPERATORS: &[&str] = &[
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];
/// The one architecture that programs are made for.
pub const NATIVE_ARCHITECTURE: &str = "SCMP_ARCH_X86_64";
/// Values of `architectures` that the specification lists.
pub const ARCHITECTURES: &[&str] = &[
    "SCMP_ARCH_NATIVE",
    "SCMP_ARCH_X86",
    NATIVE_ARCHITECTURE,
    "SCMP_ARCH_X32",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
];
/// Values of `flags` and their bits, for `features`.
pub const FLAGS: &[(&str, u32)] = &[
    ("SECCOMP_FILTER_FLAG_TSYNC", FLAG_TSYNC),
    ("SECCOMP_FILTER_FLAG_LOG", FLAG_LOG),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", FLAG_SPEC_ALLOW),
    (
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        FLAG_WAIT_KILLABLE_RECV,
    ),
];

/// `linux.seccomp` (config-linux.md, "Seccomp").
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciSeccomp {
    /// The action for calls that no rule matches.
    pub default_action: String,
    /// Its error number, for `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_errno_ret: Option<u32>,
    /// ABIs that the profile is about.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// `SECCOMP_FILTER_FLAG_*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<String>,
    /// Socket that gets the notification descriptor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listener_path: Option<String>,
    /// Passed along with the descriptor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listener_metadata: Option<String>,
    /// The rules.
    #[serde(default)]
    pub syscalls: Vec<OciSyscall>,
}

/// One element of `linux.seccomp.syscalls`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciSyscall {
    /// The calls.
    pub names: Vec<String>,
    /// What happens when the conditions hold.
    pub action: String,
    /// Its error number, for `SCMP_ACT_ERRNO` and `SCMP_ACT_TRACE`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno_ret: Option<u32>,
    /// Conditions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<OciArg>,
}

/// One element of `linux.seccomp.syscalls[].args`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciArg {
    /// Argument, 0 to 5.
    pub index: u32,
    /// Compared with the argument; the mask for `SCMP_CMP_MASKED_EQ`.
    pub value: u64,
    /// The wanted value for `SCMP_CMP_MASKED_EQ`.
    #[serde(default)]
    pub value_two: u64,
    /// The comparison.
    pub op: String,
}

/// A filter made from `linux.seccomp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// The filter.
    pub program: Program,
    /// Flags for seccomp(2), with [`FLAG_NEW_LISTENER`] when `listener`.
    pub flags: u32,
    /// What was skipped or not honoured, each on one line.
    pub warnings: Vec<String>,
    /// Whether a rule asks a listener: seccomp(2) will return a descriptor, to
    /// be sent to `listenerPath`.
    pub listener: bool,
}

/// `linux.seccomp` that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OciError {
    /// A value that the specification does not list.
    #[error("read linux.seccomp: {field} is \"{value}\", which is not known; use one of {known}")]
    Unknown {
        /// The field.
        field: String,
        /// The value as found.
        value: String,
        /// What is possible.
        known: String,
    },
    /// A number that is out of range or has no meaning here.
    #[error("read linux.seccomp: {field} is {value}, {reason}")]
    Value {
        /// The field.
        field: String,
        /// The value as found.
        value: u64,
        /// What would be right.
        reason: &'static str,
    },
    /// `SCMP_ACT_NOTIFY` where it cannot work.
    #[error("read linux.seccomp: {field} is SCMP_ACT_NOTIFY, {reason}")]
    Notify {
        /// The field.
        field: String,
        /// Why not, and what would be right.
        reason: &'static str,
    },
    /// Too many rules.
    #[error(
        "read linux.seccomp: syscalls expand to more than {MAX_CLAUSES} conditions; use fewer rules"
    )]
    TooManyRules,
    /// The rules do not fit a program.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

fn action(text: &str, errno: Option<u32>, field: &str) -> Result<Action, OciError> {
    let errno_field = || match field.strip_suffix("defaultAction") {
        Some(prefix) => format!("{prefix}defaultErrnoRet"),
        None => format!("{}errnoRet", field.trim_end_matches("action")),
    };
    let data = |limit: u32| {
        let value = errno.unwrap_or(EPERM.into());
        u16::try_from(value)
            .ok()
            .filter(|_| value <= limit)
            .ok_or_else(|| OciError::Value {
                field: errno_field(),
                value: value.into(),
                reason: "which is larger than the kernel takes; use an error number",
            })
    };
    let action = match text {
        "SCMP_ACT_ERRNO" => return Ok(Action::Errno(data(MAX_ERRNO)?)),
        "SCMP_ACT_TRACE" => return Ok(Action::Trace(data(u16::MAX.into())?)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_NOTIFY" => Action::Notify,
        _ => {
            return Err(OciError::Unknown {
                field: field.to_owned(),
                value: text.to_owned(),
                known: ACTIONS.join(", "),
            });
        }
    };
    match errno {
        // config-linux.md: an error number that the action cannot carry MUST fail.
        Some(value) => Err(OciError::Value {
            field: errno_field(),
            value: value.into(),
            reason: "which only SCMP_ACT_ERRNO and SCMP_ACT_TRACE can carry; remove it",
        }),
        None => Ok(action),
    }
}

fn condition(arg: &OciArg, field: &str) -> Result<Condition, OciError> {
    let index = u8::try_from(arg.index)
        .ok()
        .filter(|index| *index <= 5)
        .ok_or_else(|| OciError::Value {
            field: format!("{field}.index"),
            value: arg.index.into(),
            reason: "calls have arguments 0 to 5",
        })?;
    let (op, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (Op::Ne, arg.value),
        "SCMP_CMP_LT" => (Op::Lt, arg.value),
        "SCMP_CMP_LE" => (Op::Le, arg.value),
        "SCMP_CMP_EQ" => (Op::Eq, arg.value),
        "SCMP_CMP_GE" => (Op::Ge, arg.value),
        "SCMP_CMP_GT" => (Op::Gt, arg.value),
        "SCMP_CMP_MASKED_EQ" => (Op::MaskedEq(arg.value), arg.value_two & arg.value),
        _ => {
            return Err(OciError::Unknown {
                field: format!("{field}.op"),
                value: arg.op.clone(),
                known: OPERATORS.join(", "),
            });
        }
    };
    Ok(Condition {
        index,
        op,
        value,
        width: Width::W64,
    })
}

/// The rule's conditions as lists of which one must hold entirely.
fn alternatives(syscall: &OciSyscall, field: &str) -> Result<Vec<Vec<Condition>>, OciError> {
    let conditions = syscall
        .args
        .iter()
        .enumerate()
        .map(|(at, arg)| condition(arg, &format!("{field}.args[{at}]")))
        .collect::<Result<Vec<_>, _>>()?;
    let mut used = [false; 6];
    let repeated = conditions.iter().any(|condition| {
        used.get_mut(usize::from(condition.index))
            .is_some_and(|used| std::mem::replace(used, true))
    });
    Ok(if repeated {
        conditions.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![conditions]
    })
}

/// Reads `flags`. The listener's own flag is added, those that need a listener
/// are dropped without one.
fn flags(
    seccomp: &OciSeccomp,
    listener: bool,
    warnings: &mut Vec<String>,
) -> Result<u32, OciError> {
    let mut bits = 0;
    for (at, flag) in seccomp.flags.iter().enumerate() {
        match FLAGS.iter().find(|(name, _)| name == flag) {
            Some((_, bit)) => bits |= bit,
            None => {
                let known: Vec<&str> = FLAGS.iter().map(|(name, _)| *name).collect();
                return Err(OciError::Unknown {
                    field: format!("flags[{at}]"),
                    value: flag.clone(),
                    known: known.join(", "),
                });
            }
        }
    }
    if listener {
        bits |= FLAG_NEW_LISTENER;
        if bits & FLAG_TSYNC != 0 {
            // Both report through the return value; the kernel wants to know
            // that a failed synchronisation may be a plain ESRCH.
            bits |= FLAG_TSYNC_ESRCH;
        }
    } else if bits & FLAG_WAIT_KILLABLE_RECV != 0 {
        bits &= !FLAG_WAIT_KILLABLE_RECV;
        warnings.push(
            "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV ignored, no rule has SCMP_ACT_NOTIFY"
                .to_owned(),
        );
    }
    Ok(bits)
}

fn check_architectures(seccomp: &OciSeccomp, warnings: &mut Vec<String>) -> Result<(), OciError> {
    let mut foreign = Vec::new();
    for (at, arch) in seccomp.architectures.iter().enumerate() {
        if !ARCHITECTURES.contains(&arch.as_str()) {
            return Err(OciError::Unknown {
                field: format!("architectures[{at}]"),
                value: arch.clone(),
                known: ARCHITECTURES.join(", "),
            });
        }
        if arch != NATIVE_ARCHITECTURE && arch != "SCMP_ARCH_NATIVE" {
            foreign.push(arch.as_str());
        }
    }
    if !foreign.is_empty() {
        warnings.push(format!(
            "linux.seccomp.architectures: {} not honoured, calls through ABIs other than x86-64 are refused",
            foreign.join(", ")
        ));
    }
    Ok(())
}

/// Whether the default lets calls run; a tracer is expected to answer `ENOSYS` itself.
fn lets_run(action: Action) -> bool {
    matches!(action, Action::Allow | Action::Log | Action::Trace(_))
}

/// Compiles `linux.seccomp`.
///
/// # Errors
/// [`OciError`], naming the field and its value.
pub fn compile(seccomp: &OciSeccomp) -> Result<Compiled, OciError> {
    let mut warnings = Vec::new();
    check_architectures(seccomp, &mut warnings)?;
    let default = action(
        &seccomp.default_action,
        seccomp.default_errno_ret,
        "defaultAction",
    )?;
    if default == Action::Notify {
        return Err(OciError::Notify {
            field: "defaultAction".to_owned(),
            reason: "which would stop the process that installs the filter; use it in rules",
        });
    }

    let mut calls: BTreeMap<u32, Vec<Clause>> = BTreeMap::new();
    let mut unknown: Vec<&str> = Vec::new();
    let mut highest = None;
    let mut listener = false;
    let mut clauses = 0usize;
    for (at, syscall) in seccomp.syscalls.iter().enumerate() {
        let field = format!("syscalls[{at}]");
        let action = action(
            &syscall.action,
            syscall.errno_ret,
            &format!("{field}.action"),
        )?;
        if action == Action::Notify && syscall.names.iter().any(|name| name == "write") {
            return Err(OciError::Notify {
                field: format!("{field}.action"),
                reason: "which cannot be used for write: the descriptor is handed over with it",
            });
        }
        let lists = alternatives(syscall, &field)?;
        for name in &syscall.names {
            let Some(number) = table::number(name) else {
                unknown.push(name);
                continue;
            };
            highest = highest.max(Some(number));
            if action == default {
                continue;
            }
            listener |= action == Action::Notify;
            clauses = clauses.saturating_add(lists.len());
            if clauses > MAX_CLAUSES {
                return Err(OciError::TooManyRules);
            }
            let list = calls.entry(number).or_default();
            list.extend(lists.iter().map(|conditions| Clause {
                args: conditions.iter().map(ArgSet::from).collect(),
                ret: action.to_ret(),
            }));
        }
    }
    for list in calls.values_mut() {
        if let Some(always) = list.iter().find(|clause| clause.args.is_empty()) {
            *list = vec![always.clone()];
        }
    }
    if listener
        && seccomp
            .listener_path
            .as_deref()
            .unwrap_or_default()
            .is_empty()
    {
        return Err(OciError::Notify {
            field: "syscalls[].action".to_owned(),
            reason: "but listenerPath is not set; set it",
        });
    }
    if !unknown.is_empty() {
        unknown.sort_unstable();
        unknown.dedup();
        warnings.push(format!(
            "linux.seccomp.syscalls: {} names unknown on x86-64 skipped: {}",
            unknown.len(),
            unknown.join(", ")
        ));
    }
    let flags = flags(seccomp, listener, &mut warnings)?;

    let mut ranges = BTreeMap::from([(0, default.to_ret()), (X32, ENOSYS.to_ret())]);
    if let Some(highest) = highest
        && !lets_run(default)
    {
        ranges.insert(highest + 1, ENOSYS.to_ret());
    }
    let foreign = RET_KILL_PROCESS;
    let program = Rules {
        ranges,
        calls,
        foreign,
    }
    .compile()?;
    Ok(Compiled {
        program,
        flags,
        warnings,
        listener,
    })
}
