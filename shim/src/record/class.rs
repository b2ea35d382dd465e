//! What of a call's arguments is told of a refusal: enough to know what was
//! wanted, and nothing that a workload could hide a message or a path in.

use seccomp_profiles::table;

/// How a value is written.
#[derive(Clone, Copy)]
enum As {
    Number,
    Hex,
    Family,
}

/// One argument: its index, its name, its form.
type Argument = (u8, &'static str, As);

/// Calls whose refusal depends on arguments. At most three of each, ascending.
static CLASSES: &[(&str, &[Argument])] = &[
    (
        "socket",
        &[
            (0, "family", As::Family),
            (1, "type", As::Hex),
            (2, "protocol", As::Number),
        ],
    ),
    (
        "socketpair",
        &[(0, "family", As::Family), (1, "type", As::Hex)],
    ),
    (
        "setsockopt",
        &[(1, "level", As::Number), (2, "option", As::Number)],
    ),
    (
        "getsockopt",
        &[(1, "level", As::Number), (2, "option", As::Number)],
    ),
    ("ioctl", &[(1, "request", As::Hex)]),
    ("fcntl", &[(1, "command", As::Number)]),
    ("prctl", &[(0, "option", As::Number)]),
    ("arch_prctl", &[(0, "option", As::Hex)]),
    ("clone", &[(0, "flags", As::Hex)]),
    ("unshare", &[(0, "flags", As::Hex)]),
    ("setns", &[(1, "type", As::Hex)]),
    ("personality", &[(0, "persona", As::Hex)]),
    ("keyctl", &[(0, "operation", As::Number)]),
    ("madvise", &[(2, "advice", As::Number)]),
    ("ptrace", &[(0, "request", As::Number)]),
    (
        "seccomp",
        &[(0, "operation", As::Number), (1, "flags", As::Hex)],
    ),
    ("bpf", &[(0, "command", As::Number)]),
    ("mmap", &[(2, "protection", As::Hex), (3, "flags", As::Hex)]),
    ("mprotect", &[(2, "protection", As::Hex)]),
];

fn arguments(nr: u32) -> &'static [Argument] {
    let name = table::name(nr).unwrap_or_default();
    let found = CLASSES.iter().find(|(known, _)| *known == name);
    found.map_or(&[], |(_, arguments)| arguments)
}

/// The table for the agent: numbers of calls, and which arguments to tell.
pub fn masks() -> Vec<(u32, u8)> {
    CLASSES
        .iter()
        .filter_map(|(name, arguments)| {
            let mask = arguments
                .iter()
                .fold(0, |mask, (index, ..)| mask | 1 << index);
            Some((table::number(name)?, mask))
        })
        .collect()
}

/// The call's name, or its number.
pub fn syscall(nr: u32) -> String {
    table::name(nr).map_or_else(|| format!("call {nr}"), str::to_owned)
}

/// What was told of the arguments, for people.
pub fn describe(nr: u32, args: [u32; 3]) -> String {
    let words: Vec<String> = arguments(nr)
        .iter()
        .zip(args)
        .map(|((_, name, form), value)| match form {
            As::Number => format!("{name}={value}"),
            As::Hex => format!("{name}={value:#x}"),
            As::Family => format!("{name}={}", family(value)),
        })
        .collect();
    words.join(" ")
}

/// The six arguments as far as they are known.
pub fn restore(nr: u32, args: [u32; 3]) -> [u64; 6] {
    let mut all = [0; 6];
    for ((index, ..), value) in arguments(nr).iter().zip(args) {
        if let Some(place) = all.get_mut(usize::from(*index)) {
            *place = u64::from(value);
        }
    }
    all
}

/// Name of a socket family (linux/socket.h).
fn family(number: u32) -> String {
    let name = match number {
        0 => "AF_UNSPEC",
        1 => "AF_UNIX",
        2 => "AF_INET",
        3 => "AF_AX25",
        9 => "AF_X25",
        10 => "AF_INET6",
        15 => "AF_KEY",
        16 => "AF_NETLINK",
        17 => "AF_PACKET",
        21 => "AF_RDS",
        29 => "AF_CAN",
        30 => "AF_TIPC",
        31 => "AF_BLUETOOTH",
        38 => "AF_ALG",
        40 => "AF_VSOCK",
        43 => "AF_SMC",
        44 => "AF_XDP",
        _ => return number.to_string(),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_is_of_a_known_call_and_fits_what_is_told() {
        assert_eq!(masks().len(), CLASSES.len());
        for (name, arguments) in CLASSES {
            assert!(arguments.len() <= 3, "{name}");
            assert!(arguments.is_sorted_by_key(|(index, ..)| *index), "{name}");
        }
    }

    #[test]
    fn a_class_is_readable_and_restored() {
        let socket = table::number("socket").unwrap();
        assert_eq!(
            describe(socket, [17, 3, 768]),
            "family=AF_PACKET type=0x3 protocol=768"
        );
        assert_eq!(restore(socket, [17, 3, 768]), [17, 3, 768, 0, 0, 0]);
        let setsockopt = table::number("setsockopt").unwrap();
        assert_eq!(restore(setsockopt, [6, 31, 0]), [0, 6, 31, 0, 0, 0]);
        let mount = table::number("mount").unwrap();
        assert_eq!(describe(mount, [1, 2, 3]), "");
        assert_eq!(syscall(9999), "call 9999");
    }
}
