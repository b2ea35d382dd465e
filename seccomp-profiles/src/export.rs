//! Profiles in the forms that others read: TOML, `linux.seccomp` of the OCI runtime
//! specification, and the SeccompProfile resource of Kubernetes'
//! security-profiles-operator.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::action::Action;
use crate::marked;
use crate::observed::{Kind, Observed, classes};
use crate::oci::{NATIVE_ARCHITECTURE, OciArg, OciSeccomp, OciSyscall};
use crate::profile::{ArgSet, Condition, Op, Profile, Rule, Width, alternatives};
use crate::table;

/// What runc's own init calls once it has installed a container's filter, before it
/// executes (of 1.1.5, with no_new_privs): a filter for other runtimes lets it.
pub const RUNTIME: &[&str] = &["fstatfs", "getdents64"];

/// What a filter for other runtimes has beside what was seen: [`RUNTIME`], and, without
/// a mark, which is our forker's alone, what sets ids, limits and descriptors
/// ([`marked::FORKER`]): without no_new_privs it is installed before these are.
#[must_use]
pub fn runtimes() -> Observed {
    let mut all = Observed::default();
    for number in RUNTIME.iter().filter_map(|name| table::number(name)) {
        all.add(number, &[0; 6]);
    }
    for (number, fixed) in marked::kinds() {
        let mut args = [0; 6];
        for (index, value) in fixed {
            if let Some(arg) = args.get_mut(usize::from(*index)) {
                *arg = u64::from(*value);
            }
        }
        all.add(number, &args);
    }
    all
}

/// A rule that the other form has no words for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "export seccomp profile {profile}: group \"{group}\", {syscall}: {reason}; export it as TOML, or change the rule"
)]
pub struct ExportError {
    /// The profile.
    pub profile: String,
    /// The group.
    pub group: String,
    /// The call.
    pub syscall: String,
    /// What can't be said.
    pub reason: &'static str,
}

/// The profile as TOML, which [`Profile::from_toml`] reads back.
#[must_use]
pub fn toml(profile: &Profile) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write_toml(&mut out, profile);
    out
}

fn write_toml(out: &mut String, profile: &Profile) -> std::fmt::Result {
    writeln!(out, "name = {}", quoted(&profile.name))?;
    writeln!(out, "description = {}", quoted(&profile.description))?;
    if let Some(within) = &profile.within {
        writeln!(out, "within = {}", quoted(within))?;
    }
    writeln!(out, "default = \"{}\"", profile.default)?;
    writeln!(out, "unknown = \"{}\"", profile.unknown)?;
    writeln!(out, "x32 = \"{}\"", profile.x32)?;
    for group in &profile.groups {
        writeln!(out, "\n[[group]]\nname = {}", quoted(&group.name))?;
        writeln!(out, "action = \"{}\"", group.action)?;
        for rule in &group.rules {
            write_rule(out, rule)?;
        }
    }
    for left_out in &profile.left_out {
        writeln!(out, "\n[[left_out]]")?;
        names(out, &left_out.syscalls)?;
        writeln!(out, "reason = {}", quoted(&left_out.reason))?;
        if left_out.quiet {
            writeln!(out, "quiet = true")?;
        }
    }
    Ok(())
}

/// What to put before the first group of a profile's file to allow calls of this kind,
/// and no others: as TOML.
#[must_use]
pub fn lines_to_allow(kind: &Kind) -> String {
    let name = table::name(kind.number).unwrap_or_default();
    let args = classes(kind.number).iter().map(|&(index, mask, _)| {
        let value = kind.args.get(usize::from(index)).copied().unwrap_or(0);
        ArgSet::one(index, mask, value)
    });
    let rule = Rule {
        syscalls: vec![name.to_owned()],
        args: args.collect(),
        reason: "missing when this was learned".to_owned(),
        quiet: false,
    };
    let mut out = format!("[[group]]\nname = \"added: {name}\"\naction = \"allow\"\n");
    let _infallible = write_rule(&mut out, &rule);
    out
}

fn write_rule(out: &mut String, rule: &Rule) -> std::fmt::Result {
    writeln!(out, "\n[[group.rule]]")?;
    names(out, &rule.syscalls)?;
    if !rule.args.is_empty() {
        writeln!(out, "args = [")?;
        for arg in &rule.args {
            writeln!(out, "    {},", arg_toml(arg))?;
        }
        writeln!(out, "]")?;
    }
    writeln!(out, "reason = {}", quoted(&rule.reason))?;
    if rule.quiet {
        writeln!(out, "quiet = true")?;
    }
    Ok(())
}

fn names(out: &mut String, names: &[String]) -> std::fmt::Result {
    let quoted: Vec<String> = names.iter().map(|name| quoted(name)).collect();
    writeln!(out, "syscalls = [{}]", quoted.join(", "))
}

fn arg_toml(arg: &ArgSet) -> String {
    let (op, mask) = match arg.op {
        Op::Eq => ("eq", None),
        Op::Ne => ("ne", None),
        Op::Lt => ("lt", None),
        Op::Le => ("le", None),
        Op::Gt => ("gt", None),
        Op::Ge => ("ge", None),
        Op::MaskedEq(mask) => ("masked_eq", Some(mask)),
    };
    let number = |value: u64| format!("{value:#x}");
    let values: Vec<String> = arg.values.iter().copied().map(number).collect();
    let mask = mask.map_or_else(String::new, |mask| format!(" mask = {mask:#x},"));
    let width = match arg.width {
        Width::W32 => "",
        Width::W64 => ", width = 64",
    };
    format!(
        "{{ index = {}, op = \"{op}\",{mask} values = [{}]{width} }}",
        arg.index,
        values.join(", ")
    )
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The profile as `linux.seccomp`. What may run is the same. What may not gets the
/// profile's answer where a call is refused whatever its arguments are, and the
/// default's for the other arguments of a call that may run with some: the
/// specification has no way to say "otherwise".
///
/// # Errors
/// [`ExportError`] for a condition that has no equal in 64-bit comparisons.
pub fn oci(profile: &Profile) -> Result<OciSeccomp, ExportError> {
    // By action and conditions, so that calls with equal ones are one entry.
    let mut entries: Vec<(OciSyscall, Vec<OciArg>)> = Vec::new();
    for &(_, name) in table::SYSCALLS {
        for (action, args) in call_rules(profile, name)? {
            if action == profile.default {
                continue;
            }
            let (action, errno_ret) = oci_action(action);
            let same = entries.iter_mut().find(|(entry, known)| {
                entry.action == action && entry.errno_ret == errno_ret && *known == args
            });
            match same {
                Some((entry, _)) => entry.names.push(name.to_owned()),
                None => entries.push((
                    OciSyscall {
                        names: vec![name.to_owned()],
                        action,
                        errno_ret,
                        args: args.clone(),
                    },
                    args,
                )),
            }
        }
    }
    let (default_action, default_errno_ret) = oci_action(profile.default);
    Ok(OciSeccomp {
        default_action,
        default_errno_ret,
        architectures: vec![NATIVE_ARCHITECTURE.to_owned()],
        syscalls: entries.into_iter().map(|(entry, _)| entry).collect(),
        ..OciSeccomp::default()
    })
}

fn oci_action(action: Action) -> (String, Option<u32>) {
    let (name, number) = match action {
        Action::Allow => ("SCMP_ACT_ALLOW", None),
        Action::Log => ("SCMP_ACT_LOG", None),
        Action::Notify => ("SCMP_ACT_NOTIFY", None),
        Action::Trap => ("SCMP_ACT_TRAP", None),
        Action::KillThread => ("SCMP_ACT_KILL_THREAD", None),
        Action::KillProcess => ("SCMP_ACT_KILL_PROCESS", None),
        Action::Trace(data) => ("SCMP_ACT_TRACE", Some(data.into())),
        Action::Errno(number) => ("SCMP_ACT_ERRNO", Some(number.into())),
    };
    (name.to_owned(), number)
}

fn runs(action: Action) -> bool {
    matches!(action, Action::Allow | Action::Log)
}

/// What is to be said about one call: entries of which none overlaps another, or one
/// without conditions.
fn call_rules(profile: &Profile, name: &str) -> Result<Vec<(Action, Vec<OciArg>)>, ExportError> {
    let mut entries = Vec::new();
    let mut refused: Vec<&Rule> = Vec::new();
    for group in &profile.groups {
        let of_call = group
            .rules
            .iter()
            .filter(|rule| rule.syscalls.iter().any(|syscall| syscall == name));
        for rule in of_call {
            let wrong = |reason| ExportError {
                profile: profile.name.clone(),
                group: group.name.clone(),
                syscall: name.to_owned(),
                reason,
            };
            if !runs(group.action) {
                if rule.args.is_empty() {
                    if entries.is_empty() {
                        entries.push((group.action, Vec::new()));
                    }
                    return Ok(entries);
                }
                refused.push(rule);
                continue;
            }
            let mut lists = alternatives(&rule.args);
            for refusal in &refused {
                let narrower = lists.iter().map(|list| without(list, refusal));
                lists = narrower
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(wrong)?
                    .concat();
            }
            for list in lists {
                let args = list.iter().map(oci_arg).collect::<Result<_, _>>();
                entries.push((group.action, args.map_err(wrong)?));
            }
            if rule.args.is_empty() {
                return Ok(entries);
            }
        }
    }
    Ok(entries)
}

/// `list` without what `refusal`, which comes first, takes: lists of which none
/// overlaps another; none when that is all.
fn without(list: &[Condition], refusal: &Rule) -> Result<Vec<Vec<Condition>>, &'static str> {
    const NO_WORDS: &str = "a refusal of some arguments before others are allowed";
    let on = |index: u8| list.iter().find(|condition| condition.index == index);
    // Apart: what the refusal asks of some argument can't be, as the list has it.
    let apart = |arg: &ArgSet| match (on(arg.index), arg.op) {
        (Some(known), _) if known.op == Op::Eq => {
            let mut args = [0; 6];
            if let Some(place) = args.get_mut(usize::from(arg.index)) {
                *place = known.value;
            }
            !arg.holds(&args)
        }
        (Some(known), Op::Eq) => match known.op {
            Op::MaskedEq(mask) => arg.values.iter().all(|value| value & mask != known.value),
            _ => false,
        },
        _ => false,
    };
    if refusal.args.iter().any(apart) {
        return Ok(vec![list.to_vec()]);
    }
    // What is left of the refusal: arguments of which the list doesn't say that they
    // are just so. Each the other way, while those before it are as refused.
    let mut before = list.to_vec();
    let mut left = Vec::new();
    for arg in &refusal.args {
        match (on(arg.index), arg.values.as_slice()) {
            (Some(known), _) if known.op == Op::Eq => continue,
            (Some(known), [value]) if (known.op, known.value) == (arg.op, *value) => continue,
            (None, [value]) => {
                let condition = Condition {
                    index: arg.index,
                    op: arg.op,
                    value: *value,
                    width: arg.width,
                };
                for other in otherwise(condition).ok_or(NO_WORDS)? {
                    left.push([&before[..], &[other]].concat());
                }
                before.push(condition);
            }
            _ => return Err(NO_WORDS),
        }
    }
    Ok(left)
}

/// Conditions of which just one holds where this doesn't; `None`: there are no words.
fn otherwise(condition: Condition) -> Option<Vec<Condition>> {
    let with = |op, value| Condition {
        op,
        value,
        ..condition
    };
    let value = condition.value;
    match (condition.op, condition.width) {
        (Op::MaskedEq(mask), _) if mask.is_power_of_two() => {
            Some(vec![with(condition.op, value ^ mask)])
        }
        (Op::Eq, Width::W64) => Some(vec![with(Op::Ne, value)]),
        (Op::Ne, Width::W64) => Some(vec![with(Op::Eq, value)]),
        // Of 32 bits that are compared the lowest that differs.
        (Op::Eq, Width::W32) => {
            let differs = |bit: u32| {
                let mask = u64::MAX >> (63 - bit);
                with(Op::MaskedEq(mask), (value ^ 1 << bit) & mask)
            };
            Some((0..32).map(differs).collect())
        }
        _ => None,
    }
}

fn oci_arg(condition: &Condition) -> Result<OciArg, &'static str> {
    let low = u64::from(u32::MAX);
    let (op, value, value_two) = match (condition.op, condition.width) {
        // All 64 bits are compared there, and the kernel ignores the upper half.
        (Op::Eq, Width::W32) => ("SCMP_CMP_MASKED_EQ", low, condition.value),
        (Op::MaskedEq(mask), _) => ("SCMP_CMP_MASKED_EQ", mask, condition.value),
        (Op::Eq, Width::W64) => ("SCMP_CMP_EQ", condition.value, 0),
        (Op::Ne, Width::W64) => ("SCMP_CMP_NE", condition.value, 0),
        (Op::Lt, Width::W64) => ("SCMP_CMP_LT", condition.value, 0),
        (Op::Le, Width::W64) => ("SCMP_CMP_LE", condition.value, 0),
        (Op::Gt, Width::W64) => ("SCMP_CMP_GT", condition.value, 0),
        (Op::Ge, Width::W64) => ("SCMP_CMP_GE", condition.value, 0),
        (Op::Ne | Op::Lt | Op::Le | Op::Gt | Op::Ge, Width::W32) => {
            return Err("an unequal comparison of 32 bits, where there are 64 to compare");
        }
    };
    Ok(OciArg {
        index: condition.index.into(),
        value,
        value_two,
        op: op.to_owned(),
    })
}

/// A SeccompProfile of `security-profiles-operator.x-k8s.io/v1beta1`. JSON of it is
/// YAML too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SeccompProfileResource {
    api_version: &'static str,
    kind: &'static str,
    metadata: BTreeMap<&'static str, String>,
    spec: OciSeccomp,
}

/// The profile as a resource called `name` (in `namespace`, if one is given). The
/// resource has no error number for its default action, so every call that the
/// default refuses is named with it.
///
/// # Errors
/// As [`oci`].
pub fn resource(
    profile: &Profile,
    name: &str,
    namespace: Option<&str>,
) -> Result<SeccompProfileResource, ExportError> {
    let mut spec = oci(profile)?;
    if spec.default_errno_ret.take().is_some() {
        let mut names: Vec<String> = Vec::new();
        for &(_, call) in table::SYSCALLS {
            if !spec
                .syscalls
                .iter()
                .any(|entry| entry.names.iter().any(|n| n == call))
            {
                names.push(call.to_owned());
            }
        }
        let (action, errno_ret) = oci_action(profile.default);
        spec.syscalls.push(OciSyscall {
            names,
            action,
            errno_ret,
            args: Vec::new(),
        });
    }
    let mut metadata = BTreeMap::from([("name", name.to_owned())]);
    if let Some(namespace) = namespace {
        metadata.insert("namespace", namespace.to_owned());
    }
    Ok(SeccompProfileResource {
        api_version: "security-profiles-operator.x-k8s.io/v1beta1",
        kind: "SeccompProfile",
        metadata,
        spec,
    })
}
