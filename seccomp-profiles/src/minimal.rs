//! The least profile for what was observed.

use crate::action::Action;
use crate::observed::{Class, Kind, Observed, classes};
use crate::profile::{ArgSet, Group, LeftOut, Op, Profile, Rule, Width};
use crate::table;

/// What every program needs to start, to take a signal and to end. The forker of a
/// container, which is bound by the same filter, needs most of it too; what it calls
/// beside has a mark ([`crate::marked::FORKER`]). With the arguments that it passes,
/// where they tell kinds of calls apart.
pub const BASE: &[(&str, &[[u64; 3]])] = &[
    ("read", &[]),
    ("write", &[]),
    ("close", &[]),
    ("fstat", &[]),
    ("newfstatat", &[]),
    ("lseek", &[]),
    ("openat", &[]),
    ("mmap", &[]),
    ("munmap", &[]),
    ("mprotect", &[]),
    ("brk", &[]),
    ("madvise", &[[0, 0, 4]]),
    ("futex", &[]),
    ("execve", &[]),
    ("exit", &[]),
    ("exit_group", &[]),
    ("rt_sigaction", &[]),
    ("rt_sigprocmask", &[]),
    ("rt_sigreturn", &[]),
    ("restart_syscall", &[]),
    ("set_tid_address", &[]),
    // ARCH_SET_FS, ARCH_CET_STATUS, ARCH_SHSTK_STATUS
    (
        "arch_prctl",
        &[[0x1002, 0, 0], [0x3001, 0, 0], [0x5005, 0, 0]],
    ),
];

/// [`BASE`], as observed.
#[must_use]
pub fn base() -> Observed {
    let mut base = Observed::default();
    for (name, kinds) in BASE {
        let Some(number) = table::number(name) else {
            continue;
        };
        if kinds.is_empty() {
            base.add(number, &[0; 6]);
        }
        for &[a, b, c] in *kinds {
            base.add(number, &[a, b, c, 0, 0, 0]);
        }
    }
    base
}

/// The least profile called `name` with which all of `observed` that `node` allows
/// runs, and [`BASE`].
///
/// It is `node` with each allowing rule cut down to what was seen, and the refusing
/// rules as they are: whatever was observed, and whoever observed it, the result
/// allows nothing that `node` refuses.
#[must_use]
pub fn minimal(name: &str, observed: &Observed, node: &Profile) -> Profile {
    let mut seen = observed.clone();
    for kind in base().kinds() {
        seen.add(kind.number, &kind.args);
    }
    cut_down(name, &seen, node)
}

/// As [`minimal`], without [`BASE`]: a container starts with it only if that was seen,
/// too.
#[must_use]
pub fn cut_down(name: &str, seen: &Observed, node: &Profile) -> Profile {
    let mut groups = Vec::new();
    for group in &node.groups {
        let rules = match group.action {
            Action::Allow | Action::Log => group
                .rules
                .iter()
                .flat_map(|rule| narrowed(rule, seen))
                .collect(),
            _ => group.rules.clone(),
        };
        if !rules.is_empty() {
            groups.push(Group {
                name: group.name.clone(),
                action: group.action,
                rules,
            });
        }
    }
    let said = |name: &&str| {
        let rules = groups.iter().flat_map(|group: &Group| &group.rules);
        rules.flat_map(|rule| &rule.syscalls).any(|s| s == name)
    };
    let unseen: Vec<String> = node
        .groups
        .iter()
        .flat_map(|group| &group.rules)
        .flat_map(|rule| &rule.syscalls)
        .filter(|name| !said(&name.as_str()))
        .cloned()
        .collect();
    let mut left_out = node.left_out.clone();
    if !unseen.is_empty() {
        let mut syscalls = unseen;
        syscalls.sort();
        syscalls.dedup();
        left_out.push(LeftOut {
            syscalls,
            reason: format!("{} allows it, and it was not seen", node.name),
            quiet: false,
        });
    }
    Profile {
        name: name.to_owned(),
        description: format!("what was seen, within {}", node.name),
        within: Some(node.within.clone().unwrap_or_else(|| node.name.clone())),
        default: node.default,
        unknown: node.unknown,
        x32: node.x32,
        groups,
        left_out,
    }
}

/// `rule` for what was seen alone.
fn narrowed(rule: &Rule, seen: &Observed) -> Vec<Rule> {
    let mut narrowed: Vec<Rule> = Vec::new();
    let mut plain = Vec::new();
    for name in &rule.syscalls {
        let Some(number) = table::number(name) else {
            continue;
        };
        let kinds: Vec<&Kind> = seen.of(number).collect();
        match classes(number) {
            [] if kinds.is_empty() => {}
            [] => plain.push(name.clone()),
            classes => narrowed.extend(by_kinds(rule, name, classes, &kinds)),
        }
    }
    if !plain.is_empty() {
        narrowed.insert(
            0,
            Rule {
                syscalls: plain,
                ..rule.clone()
            },
        );
    }
    narrowed
}

/// `rule` of the call `name` for these kinds of it: the kinds that differ in their
/// last argument alone are one rule.
fn by_kinds(rule: &Rule, name: &str, classes: &[Class], kinds: &[&Kind]) -> Vec<Rule> {
    // What the kind decides need not be asked again.
    let decided = |arg: &&ArgSet| {
        arg.width == Width::W32
            && classes
                .iter()
                .any(|(index, mask, _)| *index == arg.index && covers(*mask, arg.op))
    };
    let (asked, rest): (Vec<&ArgSet>, Vec<&ArgSet>) = rule.args.iter().partition(decided);
    let fits = |kind: &&&Kind| asked.iter().all(|arg| arg.holds(&kind.args));
    let Some(((last, last_mask, _), first)) = classes.split_last() else {
        return Vec::new();
    };
    let of = |kind: &Kind, index: u8| kind.args.get(usize::from(index)).copied().unwrap_or(0);
    let mut rules: Vec<Rule> = Vec::new();
    let mut heads: Vec<Vec<u64>> = Vec::new();
    for kind in kinds.iter().filter(fits) {
        let head: Vec<u64> = first.iter().map(|(index, ..)| of(kind, *index)).collect();
        let value = of(kind, *last);
        if let Some(at) = heads.iter().position(|known| *known == head) {
            let set = rules.get_mut(at).and_then(|rule| rule.args.last_mut());
            if let Some(set) = set {
                set.values.push(value);
            }
            continue;
        }
        let mut args: Vec<ArgSet> = rest.iter().map(|arg| (*arg).clone()).collect();
        let heads_of = first.iter().zip(&head);
        args.extend(heads_of.map(|((index, mask, _), value)| ArgSet::one(*index, *mask, *value)));
        args.push(ArgSet::one(*last, *last_mask, value));
        heads.push(head);
        rules.push(Rule {
            syscalls: vec![name.to_owned()],
            args,
            reason: rule.reason.clone(),
            quiet: rule.quiet,
        });
    }
    rules
}

/// Whether an argument cut down by `mask` says all that `op` asks about.
fn covers(mask: u32, op: Op) -> bool {
    match op {
        Op::MaskedEq(asked) => asked & !u64::from(mask) == 0,
        _ => mask == u32::MAX,
    }
}
