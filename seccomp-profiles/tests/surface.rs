//! `docs/surface.md`: how much of the kernel the shipped filters leave in reach,
//! beside the filter that runc has from containerd.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use seccomp_profiles::surface::{Abi, reachable, reaches, verdict};
use seccomp_profiles::{Action, Program, SockFilter, shipped_program, table};

const RUNC: &str = include_str!("data/runc-default.txt");
const REQUESTS: &str = include_str!("data/requests.txt");
/// What a workload reached by making the calls, as `make probes` measured it.
const REACH: &str = include_str!("../../tests/reach.md");
const WORKLOADS: [&str; 3] = ["compat", "default", "strict"];

/// CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NAMESPACES: [u64; 8] = [
    0x80,
    0x2_0000,
    0x200_0000,
    0x400_0000,
    0x800_0000,
    0x1000_0000,
    0x2000_0000,
    0x4000_0000,
];

fn shipped(name: &str) -> Program {
    Program::from_bytes(shipped_program(name).unwrap()).unwrap()
}

fn runc() -> Program {
    let lines = RUNC.lines().filter(|line| !line.starts_with('#'));
    let instructions = lines.map(|line| {
        let [code, jt, jf, k] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        SockFilter {
            code: u16::from_str_radix(code, 16).unwrap(),
            jt: jt.parse().unwrap(),
            jf: jf.parse().unwrap(),
            k: u32::from_str_radix(k, 16).unwrap(),
        }
    });
    Program::new(instructions.collect())
}

/// Kind, name and number of every request and option of the list.
fn requests() -> Vec<(&'static str, &'static str, u64)> {
    let lines = REQUESTS.lines().filter(|line| !line.starts_with('#'));
    let parsed = lines.map(|line| {
        let (rest, number) = line.rsplit_once(' ').unwrap();
        let (kind, name) = rest.rsplit_once(' ').unwrap();
        let number = number.strip_prefix("0x").unwrap();
        (kind, name, u64::from_str_radix(number, 16).unwrap())
    });
    parsed.collect()
}

fn nr(name: &str) -> u32 {
    table::number(name).unwrap()
}

/// What is counted of stacked filters.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    x86_64: usize,
    x32: usize,
    i386: usize,
    families: usize,
    netlink: usize,
    inet: usize,
    terminal: usize,
    devices: usize,
    options: usize,
    prctl: usize,
    madvise: usize,
    namespaces: usize,
}

impl Counts {
    fn of(chain: &[&Program]) -> Self {
        let can = |name, fixed: &[(usize, u64)]| reaches(chain, Abi::X86_64, nr(name), fixed);
        let requests = requests();
        let ioctls = |kind: &str| {
            let of_kind = requests.iter().filter(|(k, _, _)| *k == kind);
            of_kind
                .filter(|(_, _, number)| can("ioctl", &[(1, *number)]))
                .count()
        };
        let options = requests.iter().filter(|(kind, _, number)| {
            kind.strip_prefix("option ").is_some_and(|level| {
                can("setsockopt", &[(1, level.parse().unwrap()), (2, *number)])
            })
        });
        let clones = NAMESPACES.iter().filter(|flag| {
            // In clone(2) the lowest byte is a signal, so CLONE_NEWTIME is none.
            **flag > 0xff && can("clone", &[(0, **flag)])
        });
        let others = ["clone3", "unshare", "setns"]
            .into_iter()
            .filter(|name| can(name, &[]));
        Self {
            x86_64: reachable(chain, Abi::X86_64).len(),
            x32: reachable(chain, Abi::X32).len(),
            i386: reachable(chain, Abi::I386).len(),
            families: (0..46).filter(|f| can("socket", &[(0, *f)])).count(),
            netlink: (0..32)
                .filter(|p| can("socket", &[(0, 16), (2, *p)]))
                .count(),
            inet: (0..263)
                .filter(|p| can("socket", &[(0, 2), (2, *p)]))
                .count(),
            terminal: ioctls("terminal"),
            devices: ioctls("device"),
            options: options.count(),
            prctl: (1..100)
                .chain([0x4155_5856, 0x5356_4d41, 0x5961_6d61])
                .filter(|option| can("prctl", &[(0, *option)]))
                .count(),
            madvise: (0..104).filter(|a| can("madvise", &[(2, *a)])).count(),
            namespaces: clones.count() + NAMESPACES.len() * others.count(),
        }
    }

    fn all(&self) -> usize {
        self.x86_64 + self.x32 + self.i386
    }
}

/// Of runc's filter, then of each profile with the agent's under it.
fn counted() -> Vec<(&'static str, usize, Counts)> {
    let (agent, runc) = (shipped("agent"), runc());
    let mut all = vec![("runc", runc.instructions().len(), Counts::of(&[&runc]))];
    for name in WORKLOADS {
        let own = shipped(name);
        let size = own.instructions().len();
        all.push((name, size, Counts::of(&[&agent, &own])));
    }
    all
}

#[test]
fn the_page_is_what_the_programs_say() {
    let mut page = String::from(
        "# Surface\n\n\
         What can be called, by evaluating the programs that are installed for all numbers 0 to\n\
         1023 of each ABI and all arguments that make a difference. Of casemate both filters of a\n\
         workload count, the agent's and the profile's. runc: its program for the default profile\n\
         of containerd 2.3.4, as read back from the kernel. Made by `make docs-tables`; a test\n\
         compares.\n\n\
         | | runc | compat | default | strict |\n| --- | ---: | ---: | ---: | ---: |\n",
    );
    let all = counted();
    let mut row = |what: &str, count: &dyn Fn(&(&str, usize, Counts)) -> usize| {
        write!(page, "| {what} |").unwrap();
        for column in &all {
            write!(page, " {} |", count(column)).unwrap();
        }
        page.push('\n');
    };
    row("Calls, all ABIs", &|c| c.2.all());
    row("of them x86-64", &|c| c.2.x86_64);
    row("x32", &|c| c.2.x32);
    row("i386", &|c| c.2.i386);
    row("Socket families, of 46", &|c| c.2.families);
    row("Protocols of netlink, of 32", &|c| c.2.netlink);
    row("Protocols of AF_INET, of 263", &|c| c.2.inet);
    row("`ioctl`: requests of terminals", &|c| c.2.terminal);
    row("`ioctl`: of devices, files, interfaces", &|c| c.2.devices);
    row("`setsockopt`: pairs of level and option", &|c| c.2.options);
    row("`prctl`: options, of 102", &|c| c.2.prctl);
    row("`madvise`: kinds of advice, of 104", &|c| c.2.madvise);
    row("Flags that make or join namespaces, of 31", &|c| {
        c.2.namespaces
    });
    row("Instructions of the program", &|c| c.1);
    page.push_str(
        "\nThe requests and options are those that Linux's headers name, in\n\
         `seccomp-profiles/tests/data/requests.txt`. Two numbers, 335 and 336, are not counted: no\n\
         filter binds them. What is reachable is what a filter lets through, not what then\n\
         succeeds: capabilities, user namespaces and Landlock come after it. (Of the requests of\n\
         devices, `compat` lets those of drivers through: which devices there are is the node's\n\
         `devices.allow`.)\n\n\
         ## By making the calls\n\n\
         The same from inside of a container, with all locks: root opens sockets of each family and\n\
         protocol, makes namespaces, and tries each request and option on sockets, files, pipes,\n\
         devices and both ends of a terminal of its own. What is neither refused nor unknown (EPERM,\n\
         EACCES, ENOSYS, ENOTTY, ENOPROTOOPT and their like) is counted. runc, on the same kernel,\n\
         has containerd's default profile. A trial (`probes_reach_is_within_bars`) fails where\n\
         `default` or `strict` reaches more than 4 families, one protocol of netlink, 0.4 of runc's\n\
         requests (terminals' and the others together), a third of its options, or any namespace. Made by `make probes`.\n\n",
    );
    page.push_str(REACH);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/surface.md");
    if std::env::var_os("CASEMATE_WRITE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(written, page, "docs/surface.md: run make docs-tables");
}

#[test]
fn the_bars_hold() {
    let all = counted();
    let of = |name: &str| &all.iter().find(|(n, _, _)| *n == name).unwrap().2;
    let runc = of("runc");
    // What has been published of that profile; x32 only up to the last x86-64 number.
    assert_eq!((runc.x86_64, runc.i386), (301, 353));
    let published = 917;
    assert!(runc.all() >= published, "{runc:?}");
    for name in ["default", "strict"] {
        let own = of(name);
        assert!(own.all() * 100 <= published * 31, "{name}: {own:?}");
        assert_eq!((own.x32, own.i386), (0, 0));
        assert!(own.families <= 4, "{name}: {own:?}");
        assert_eq!(own.netlink, 1);
        assert!(own.terminal * 10 <= runc.terminal * 4, "{name}: {own:?}");
        assert!(own.devices * 10 <= runc.devices * 4, "{name}: {own:?}");
        assert!(own.options * 3 <= runc.options, "{name}: {own:?}");
        assert_eq!(own.namespaces, 0);
    }
    assert!(of("default").x86_64 <= 284);
    assert!(of("strict").x86_64 <= 150);
    assert_eq!(of("compat").namespaces, 0);
    // Of what containerd's default allows, compat lacks what reads or changes other
    // processes.
    let (agent, compat) = (shipped("agent"), shipped("compat"));
    let compat = reachable(&[&agent, &compat], Abi::X86_64);
    let theirs = reachable(&[&self::runc()], Abi::X86_64);
    let missing: Vec<_> = theirs.iter().filter(|n| !compat.contains(n)).collect();
    let missing: Vec<_> = missing.iter().map(|n| table::name(**n).unwrap()).collect();
    // The kernel has the four others for 32-bit code alone, or not at all.
    let expected = [
        "ptrace",
        "set_thread_area",
        "get_thread_area",
        "epoll_ctl_old",
        "epoll_wait_old",
        "process_vm_readv",
        "process_vm_writev",
    ];
    assert_eq!(missing, expected);
}

#[test]
fn stacked_filters_answer_as_the_kernel_does() {
    let ret = |k| {
        Program::new(vec![SockFilter {
            code: 6,
            jt: 0,
            jf: 0,
            k,
        }])
    };
    let data = Abi::X86_64.call(0, [0; 6]);
    let order = [
        Action::KillProcess,
        Action::KillThread,
        Action::Trap,
        Action::Errno(1),
        Action::Notify,
        Action::Trace(0),
        Action::Log,
        Action::Allow,
    ];
    for (at, severe) in order.iter().enumerate() {
        for mild in &order[at..] {
            let (severe_one, mild_one) = (ret(severe.to_ret()), ret(mild.to_ret()));
            for chain in [[&severe_one, &mild_one], [&mild_one, &severe_one]] {
                assert_eq!(verdict(&chain, &data), *severe);
            }
        }
    }
    let (old, new) = (
        ret(Action::Errno(1).to_ret()),
        ret(Action::Errno(2).to_ret()),
    );
    assert_eq!(verdict(&[&old, &new], &data), Action::Errno(2));
}
