//! Device rules (OCI runtime-spec, config-linux.md, "Allowed Device list") for
//! version 1's `devices.allow` and `devices.deny` and as a program for version 2.
//!
//! The meaning, the same on both: nothing is allowed at first; of the rules
//! that cover a device and an access, the last one decides.

use std::fmt;

use casemate_sys::bpf::Instruction;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::CgroupError;

/// Access bits as the kernel's device programs see them (`BPF_DEVCG_ACC_*`).
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// More than any list needs; keeps the program far below the verifier's limits.
const MAX_RULES: usize = 1024;

/// `BPF_DEVCG_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Block = 1,
    Char = 2,
}

/// A set of devices; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Set {
    typ: Option<Type>,
    major: Option<u32>,
    minor: Option<u32>,
}

impl Set {
    const EVERY: Set = Set {
        typ: None,
        major: None,
        minor: None,
    };

    fn overlaps(self, other: Set) -> bool {
        fn meet<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
            a.is_none() || b.is_none() || a == b
        }
        meet(self.typ, other.typ) && meet(self.major, other.major) && meet(self.minor, other.minor)
    }

    fn covers(self, other: Set) -> bool {
        fn over<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
            a.is_none() || a == b
        }
        over(self.typ, other.typ) && over(self.major, other.major) && over(self.minor, other.minor)
    }
}

/// A checked rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    set: Set,
    access: u8,
}

impl fmt::Display for Rule {
    /// The line that version 1's files take.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let typ = match self.set.typ {
            None => 'a',
            Some(Type::Block) => 'b',
            Some(Type::Char) => 'c',
        };
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        write!(
            f,
            "{typ} {}:{} ",
            number(self.set.major),
            number(self.set.minor)
        )?;
        f.write_str(&letters(self.access))
    }
}

fn letters(access: u8) -> String {
    [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
        .into_iter()
        .filter(|(bit, _)| access & bit != 0)
        .map(|(_, letter)| letter)
        .collect()
}

/// Checks the rules of `linux.resources.devices`.
pub(crate) fn parse(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, CgroupError> {
    if rules.len() > MAX_RULES {
        return Err(CgroupError::limit(
            "devices",
            format!("{} rules", rules.len()),
            format!("more than {MAX_RULES} rules"),
            "use wildcards for major or minor",
        ));
    }
    rules
        .iter()
        .enumerate()
        .map(|(i, rule)| parse_one(i, rule))
        .collect()
}

fn parse_one(index: usize, rule: &LinuxDeviceCgroup) -> Result<Rule, CgroupError> {
    let refuse = |reason: &str, way_out: &str| {
        CgroupError::limit(
            &format!("devices[{index}]"),
            format!("{:?}", rule.to_string()),
            reason,
            way_out,
        )
    };
    let typ = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(Type::Block),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Type::Char),
        Some(LinuxDeviceType::P) => {
            return Err(refuse(
                "a fifo is no device and has no rule",
                "use type a, b or c",
            ));
        }
    };
    // -1 means any, as the field's absence does.
    let number = |n: Option<i64>| match n {
        None | Some(-1) => Ok(None),
        Some(n) => u32::try_from(n)
            .map(Some)
            .map_err(|_| refuse("not a device number", "give 0 to 4294967295, or -1 for any")),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err(refuse("unknown access", "use letters of `rwm`")),
        };
    }
    if access == 0 {
        return Err(refuse("access is empty", "use letters of `rwm`"));
    }
    Ok(Rule {
        allow: rule.allow(),
        set: Set {
            typ,
            major: number(rule.major())?,
            minor: number(rule.minor())?,
        },
        access,
    })
}

/// A write to one of version 1's files.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) file: &'static str,
    pub(crate) text: String,
}

impl Write {
    fn new(rule: &Rule) -> Self {
        let file = if rule.allow {
            "devices.allow"
        } else {
            "devices.deny"
        };
        Self {
            file,
            text: rule.to_string(),
        }
    }
}

/// The writes that give version 1 the rules' meaning.
///
/// The kernel there (cgroup-v1/devices.rst) has one default and exceptions from
/// it. It drops an exception only if a rule names exactly the same devices, and
/// else ignores the rule silently: so a rule that takes back earlier ones is
/// written as one line for each of them, and one that takes back a *part* of an
/// earlier one can't be had. Type `a` makes it ignore numbers and access, so
/// such a rule is written as one for `b` and one for `c`.
pub(crate) fn v1_writes(rules: &[Rule]) -> Result<Vec<Write>, CgroupError> {
    v1_state(rules).map(|(writes, _, _)| writes)
}

/// What version 1's `devices.list` says after [`v1_writes`].
pub(crate) fn v1_list(rules: &[Rule]) -> Result<Vec<String>, CgroupError> {
    let (_, default, exceptions) = v1_state(rules)?;
    if default {
        // Its exceptions aren't told.
        return Ok(vec!["a *:* rwm".to_owned()]);
    }
    let line = |(set, access)| {
        let rule = Rule {
            allow: true,
            set,
            access,
        };
        rule.to_string()
    };
    Ok(exceptions.into_iter().map(line).collect())
}

/// Some devices that are allowed, where the default is that none are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) block: bool,
    pub(crate) major: Option<u32>,
    pub(crate) minor: Option<u32>,
    /// Letters of `rwm`.
    pub(crate) access: String,
}

/// What the rules allow in the end; `None` if that is all but something, or
/// can't be said on version 1.
pub(crate) fn allowed(rules: &[Rule]) -> Option<Vec<Allowed>> {
    let (_, default, exceptions) = v1_state(rules).ok()?;
    let allowed = exceptions.into_iter().map(|(set, access)| Allowed {
        block: set.typ == Some(Type::Block),
        major: set.major,
        minor: set.minor,
        access: letters(access),
    });
    (!default).then(|| allowed.collect())
}

/// The writes, the default after them, and the exceptions from it.
type State = (Vec<Write>, bool, Vec<(Set, u8)>);

fn v1_state(rules: &[Rule]) -> Result<State, CgroupError> {
    let deny_all = Rule {
        allow: false,
        set: Set::EVERY,
        access: ALL,
    };
    let mut writes = vec![Write::new(&deny_all)];
    let mut default = false;
    let mut exceptions: Vec<(Set, u8)> = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        if rule.set == Set::EVERY && rule.access == ALL {
            default = rule.allow;
            exceptions.clear();
            let write = Write::new(rule);
            // The list's usual first rule is what we start with.
            if writes.len() > 1 || write != Write::new(&deny_all) {
                writes.push(write);
            }
            continue;
        }
        let types = match rule.set.typ {
            Some(typ) => vec![typ],
            None => vec![Type::Block, Type::Char],
        };
        for typ in types {
            let set = Set {
                typ: Some(typ),
                ..rule.set
            };
            if rule.allow != default {
                match exceptions.iter_mut().find(|(s, _)| *s == set) {
                    Some((_, access)) => *access |= rule.access,
                    None => exceptions.push((set, rule.access)),
                }
                writes.push(Write::new(&Rule { set, ..*rule }));
                continue;
            }
            for (earlier, access) in &mut exceptions {
                let both = *access & rule.access;
                if both == 0 || !set.overlaps(*earlier) {
                    continue;
                }
                if !set.covers(*earlier) {
                    let wider = Rule {
                        allow: !rule.allow,
                        set: *earlier,
                        access: *access,
                    };
                    return Err(CgroupError::limit(
                        &format!("devices[{index}]"),
                        format!("{:?}", rule.to_string()),
                        format!(
                            "cgroup v1 can't take it out of the wider earlier rule \"{wider}\""
                        ),
                        "list the devices one by one or use a host with cgroup v2",
                    ));
                }
                *access &= !both;
                writes.push(Write::new(&Rule {
                    set: *earlier,
                    access: both,
                    ..*rule
                }));
            }
            exceptions.retain(|(_, access)| *access != 0);
        }
    }
    Ok((writes, default, exceptions))
}

// Registers: the context, and what the program takes out of it.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
/// The asked-for access bits that no rule has decided yet.
const OPEN: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// Operations (kernel: Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP32_UNEQUAL: u8 = 0x56;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_UNEQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [
        op(SET, RESULT, 0, 0, i32::from(allow)),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// The program for version 2: `struct bpf_cgroup_dev_ctx` has `access_type`
/// (access bits above, type below 16 bits), `major`, `minor`. From the last
/// rule to the first, each decides its bits of the access; a denied bit ends it.
pub(crate) fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut code = vec![
        op(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        op(MOVE, OPEN, TYPE, 0, 0),
        op(AND, TYPE, 0, 0, 0xffff),
        op(SHIFT_RIGHT, OPEN, 0, 0, 16),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut body = Vec::new();
        let mask = i32::from(rule.access);
        if rule.allow {
            body.push(op(AND, OPEN, 0, 0, !mask));
            body.push(op(JUMP_UNEQUAL, OPEN, 0, 2, 0));
            body.extend(answer(true));
        } else {
            body.push(op(MOVE, SCRATCH, OPEN, 0, 0));
            body.push(op(AND, SCRATCH, 0, 0, mask));
            body.push(op(JUMP_EQUAL, SCRATCH, 0, 2, 0));
            body.extend(answer(false));
        }
        // Numbers are compared as 32 bits: a constant is sign-extended otherwise.
        let tests: Vec<(u8, i32)> = [
            rule.set.typ.map(|t| (TYPE, t as i32)),
            rule.set.major.map(|n| (MAJOR, n as i32)),
            rule.set.minor.map(|n| (MINOR, n as i32)),
        ]
        .into_iter()
        .flatten()
        .collect();
        for (i, (register, value)) in tests.iter().enumerate() {
            // Over the tests that follow and the body: ten instructions at most.
            let skip = (tests.len() - i - 1 + body.len()) as i16;
            code.push(op(JUMP32_UNEQUAL, *register, 0, skip, *value));
        }
        code.extend(body);
        if rule.set == Set::EVERY && rule.access == ALL {
            // Nothing before it can matter.
            break;
        }
    }
    code.extend(answer(false));
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    fn rule(allow: bool, typ: char, numbers: (i64, i64), access: &str) -> LinuxDeviceCgroup {
        let typ = match typ {
            'a' => LinuxDeviceType::A,
            'b' => LinuxDeviceType::B,
            'c' => LinuxDeviceType::C,
            _ => LinuxDeviceType::P,
        };
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(typ)
            .major(numbers.0)
            .minor(numbers.1)
            .access(access)
            .build()
            .unwrap()
    }

    fn writes(rules: &[LinuxDeviceCgroup]) -> Result<Vec<String>, String> {
        let text = |w: Write| format!("{} {}", w.file.trim_start_matches("devices."), w.text);
        v1_writes(&parse(rules).map_err(|e| e.to_string())?)
            .map(|w| w.into_iter().map(text).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn version_1_starts_from_nothing_and_keeps_the_order() {
        let got = writes(&[
            rule(false, 'a', (-1, -1), "rwm"),
            rule(true, 'c', (1, 3), "rw"),
            rule(true, 'c', (136, -1), "rwm"),
            rule(true, 'a', (10, 200), "r"),
        ]);
        let want = [
            "deny a *:* rwm",
            "allow c 1:3 rw",
            "allow c 136:* rwm",
            "allow b 10:200 r",
            "allow c 10:200 r",
        ];
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn a_later_rule_takes_back_earlier_ones_on_version_1_or_says_that_it_cannot() {
        let got = writes(&[
            rule(true, 'c', (1, 3), "rwm"),
            rule(true, 'c', (1, 5), "rw"),
            rule(false, 'c', (-1, -1), "m"),
        ]);
        let want = [
            "deny a *:* rwm",
            "allow c 1:3 rwm",
            "allow c 1:5 rw",
            "deny c 1:3 m",
        ];
        assert_eq!(got.unwrap(), want);

        let error = writes(&[
            rule(true, 'c', (1, -1), "rwm"),
            rule(false, 'c', (1, 5), "w"),
        ]);
        assert_eq!(
            error.unwrap_err(),
            "linux.resources.devices[1] = \"c 1:5 w\": cgroup v1 can't take it out of the wider earlier rule \"c 1:* rwm\": list the devices one by one or use a host with cgroup v2"
        );
    }

    #[test]
    fn a_privileged_list_allows_all_but_what_comes_after() {
        let got = writes(&[
            rule(true, 'a', (-1, -1), "rwm"),
            rule(false, 'b', (8, 0), "rwm"),
            rule(true, 'b', (8, -1), "w"),
        ]);
        let want = [
            "deny a *:* rwm",
            "allow a *:* rwm",
            "deny b 8:0 rwm",
            "allow b 8:0 w",
        ];
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn odd_rules_are_named() {
        for (bad, reason) in [
            (rule(true, 'c', (1, 3), ""), "access is empty"),
            (rule(true, 'c', (1, 3), "rx"), "unknown access"),
            (rule(true, 'p', (1, 3), "r"), "a fifo is no device"),
            (rule(true, 'c', (-2, 3), "r"), "not a device number"),
            (rule(true, 'c', (1, 1 << 32), "r"), "not a device number"),
        ] {
            let error = parse(&[rule(true, 'c', (1, 3), "r"), bad]).unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with("linux.resources.devices[1] = ") && text.contains(reason),
                "{text}"
            );
        }
        assert!(parse(&vec![rule(true, 'c', (1, 3), "r"); MAX_RULES + 1]).is_err());
    }
}
