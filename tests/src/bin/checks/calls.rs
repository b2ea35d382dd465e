//! System calls that a workload has no business with, and other ways to make them
//! (T06, T18, T29, T30).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use casemate_sys::{attempt, process};
use rustix::io::Errno;

use crate::ids::scratch;
use crate::{Arg, Check, Done, No, gained, skip};

/// The parent in this pid namespace: a process that isn't this one.
fn parent() -> Result<u32, No> {
    match rustix::process::getppid() {
        Some(pid) => Ok(pid.as_raw_nonzero().get() as u32),
        None => skip("no parent to be seen"),
    }
}

/// The smallest static program of the 32-bit ABI: ELF header, one program header,
/// `mov eax, 1; mov ebx, 42; int 0x80`.
fn elf32() -> Vec<u8> {
    let code: [u8; 12] = [0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80];
    let base: u32 = 0x0804_8000;
    let mut out = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |out: &mut Vec<u8>, value: u16| out.extend(value.to_le_bytes());
    half(&mut out, 2);
    half(&mut out, 3);
    for word in [1, base + 84, 52, 0, 0] {
        out.extend(u32::to_le_bytes(word));
    }
    for value in [52, 32, 1, 0, 0, 0] {
        half(&mut out, value);
    }
    let size = 84 + code.len() as u32;
    for word in [1, 0, base, base, size, size, 5, 0x1000] {
        out.extend(u32::to_le_bytes(word));
    }
    out.extend(code);
    out
}

fn run_elf32() -> Done {
    let path = scratch("elf32");
    fs::write(&path, elf32())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let ended = Command::new(&path).status();
    let _ = fs::remove_file(&path);
    let ended = ended?;
    match (ended.code(), ended.signal()) {
        (Some(42), _) => Ok("ran".to_owned()),
        (_, Some(31)) => Err(Errno::PERM.into()),
        _ => skip(&format!("{ended}")),
    }
}

fn number(value: i64) -> Done {
    if value >= 0 {
        Ok(String::new())
    } else {
        let code = i32::try_from(-value).unwrap_or(22);
        Err(Errno::from_raw_os_error(code).into())
    }
}

fn shock() -> Done {
    // A handle of the root, which a guess of inode 2 stands for on most disks.
    let (_, buffers) = attempt::raw(
        "name_to_handle_at",
        &[
            Arg::Int(-100isize as usize),
            Arg::Bytes(b"/"),
            Arg::Bytes(&[128, 0, 0, 0]),
            Arg::Bytes(&[0; 8]),
            Arg::Int(0),
        ],
    )?;
    let handle = buffers
        .get(1)
        .map(|b| b[..136].to_vec())
        .unwrap_or_default();
    let at = fs::File::open("/")?;
    use std::os::fd::AsRawFd;
    gained(attempt::raw(
        "open_by_handle_at",
        &[
            Arg::Int(at.as_raw_fd() as usize),
            Arg::Bytes(&handle),
            Arg::Int(0),
        ],
    ))
}

fn own_words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

/// `union bpf_attr` of these words.
fn bpf(command: usize, words: &[u32]) -> Done {
    let mut attr = own_words(words);
    attr.resize(128, 0);
    gained(attempt::raw(
        "bpf",
        &[Arg::Int(command), Arg::Bytes(&attr), Arg::Int(attr.len())],
    ))
}

/// `struct perf_event_attr`: type, and flags at byte 40.
fn perf(kind: u32, flags: u64) -> Done {
    let mut attr = own_words(&[kind, 112]);
    attr.resize(40, 0);
    attr.extend(flags.to_ne_bytes());
    attr.resize(112, 0);
    let any = Arg::Int(usize::MAX);
    gained(attempt::raw(
        "perf_event_open",
        &[Arg::Bytes(&attr), Arg::Int(0), any, any, Arg::Int(0)],
    ))
}

/// Everything that this kernel has of a call counts as behind the filter.
const BEHIND: &[Errno] = &[
    Errno::INVAL,
    Errno::FAULT,
    Errno::BADF,
    Errno::NOENT,
    Errno::SRCH,
    Errno::TOOBIG,
    Errno::OPNOTSUPP,
    Errno::NODEV,
    Errno::NOTDIR,
    Errno::NXIO,
];

/// By name and arguments. Success, or an error of [`BEHIND`], says that the code
/// behind the lock was reached.
const CALLS: &[(&str, &str, &str, &[Arg<'static>])] = &[
    (
        "T30.settimeofday",
        "sets the clock (to nothing)",
        "settimeofday",
        &[],
    ),
    (
        "T30.clock_settime",
        "clock_settime reaches the kernel",
        "clock_settime",
        &[],
    ),
    // ADJ_TICK, with a tick that no clock has.
    (
        "T30.adjtimex",
        "adjusts the clock",
        "adjtimex",
        &[Arg::Bytes(&[0, 0x40, 0, 0])],
    ),
    (
        "T30.clock_adjtime",
        "adjusts the clock",
        "clock_adjtime",
        &[Arg::Int(0), Arg::Bytes(&[0, 0x40, 0, 0])],
    ),
    // Rights are looked at before the magic numbers, which are wrong.
    (
        "T30.reboot",
        "reboots",
        "reboot",
        &[Arg::Int(1), Arg::Int(2), Arg::Int(3)],
    ),
    ("T30.swapon", "swaps to a file", "swapon", &[]),
    ("T30.swapoff", "switches swap off", "swapoff", &[]),
    (
        "T30.acct",
        "process accounting",
        "acct",
        &[Arg::Bytes(b"/nonexistent/file")],
    ),
    // Q_GETFMT of nothing.
    (
        "T30.quotactl",
        "quotas",
        "quotactl",
        &[Arg::Int(0x8000_0400), Arg::Null],
    ),
    (
        "T30.quotactl_fd",
        "quotas",
        "quotactl_fd",
        &[Arg::Int(usize::MAX), Arg::Int(0x8000_0400)],
    ),
    ("T30.init_module", "kernel modules", "init_module", &[]),
    (
        "T30.finit_module",
        "kernel modules",
        "finit_module",
        &[Arg::Int(usize::MAX)],
    ),
    (
        "T30.delete_module",
        "kernel modules",
        "delete_module",
        &[Arg::Null, Arg::Int(0x800)],
    ),
    (
        "T30.kexec_load",
        "another kernel",
        "kexec_load",
        &[Arg::Int(0), Arg::Int(0), Arg::Null, Arg::Int(1)],
    ),
    (
        "T30.kexec_file_load",
        "another kernel",
        "kexec_file_load",
        &[Arg::Int(usize::MAX), Arg::Int(usize::MAX)],
    ),
    ("T30.iopl", "the machine's ports", "iopl", &[Arg::Int(3)]),
    (
        "T30.ioperm",
        "the machine's ports",
        "ioperm",
        &[Arg::Int(0x80), Arg::Int(1), Arg::Int(1)],
    ),
    (
        "T30.sethostname",
        "the host name",
        "sethostname",
        &[Arg::Bytes(b"probed"), Arg::Int(6)],
    ),
    (
        "T30.setdomainname",
        "the domain name",
        "setdomainname",
        &[Arg::Bytes(b"probed"), Arg::Int(6)],
    ),
    (
        "T30.userfaultfd",
        "page faults of the kernel",
        "userfaultfd",
        &[Arg::Int(0)],
    ),
    (
        "T30.userfaultfd-user",
        "page faults of its own",
        "userfaultfd",
        &[Arg::Int(1)],
    ),
    (
        "T30.io_uring",
        "a ring",
        "io_uring_setup",
        &[Arg::Int(4), Arg::Bytes(&[0; 120])],
    ),
    (
        "T30.fanotify",
        "file events of a mount",
        "fanotify_init",
        &[Arg::Int(0), Arg::Int(0)],
    ),
    (
        "T30.modify_ldt",
        "16-bit segments",
        "modify_ldt",
        &[Arg::Int(0), Arg::Bytes(&[0; 64]), Arg::Int(64)],
    ),
    (
        "T30.memfd_secret",
        "memory that the kernel can't see",
        "memfd_secret",
        &[Arg::Int(0)],
    ),
    (
        "T30.remap_file_pages",
        "remap_file_pages reaches the kernel",
        "remap_file_pages",
        &[],
    ),
    (
        "T30.vmsplice",
        "vmsplice reaches the kernel",
        "vmsplice",
        &[Arg::Int(usize::MAX), Arg::Null, Arg::Int(0), Arg::Int(0)],
    ),
    ("T30.mbind", "memory policy", "mbind", &[]),
    (
        "T30.set_mempolicy",
        "memory policy",
        "set_mempolicy",
        &[Arg::Int(0)],
    ),
    (
        "T30.move_pages",
        "moves pages",
        "move_pages",
        &[Arg::Int(0), Arg::Int(0)],
    ),
    (
        "T30.migrate_pages",
        "moves pages",
        "migrate_pages",
        &[Arg::Int(0), Arg::Int(0)],
    ),
    (
        "T30.lsm_list_modules",
        "security modules",
        "lsm_list_modules",
        &[],
    ),
    ("T30.ustat", "an old call", "ustat", &[]),
    ("T30.sysfs", "an old call", "sysfs", &[Arg::Int(3)]),
    ("T30.uselib", "an old call", "uselib", &[]),
    ("T30.lookup_dcookie", "an old call", "lookup_dcookie", &[]),
    ("T30.listns", "namespaces by number", "listns", &[]),
    (
        "T30.file_setattr",
        "attributes of files",
        "file_setattr",
        &[Arg::Int(usize::MAX)],
    ),
    (
        "T30.open_tree_attr",
        "a changed clone of a tree",
        "open_tree_attr",
        &[
            Arg::Int(usize::MAX),
            Arg::Null,
            Arg::Int(0),
            Arg::Null,
            Arg::Int(32),
        ],
    ),
    (
        "T30.map_shadow_stack",
        "a shadow stack",
        "map_shadow_stack",
        &[],
    ),
    (
        "T30.read_implies_exec",
        "memory that is always executable",
        "personality",
        &[Arg::Int(0x40_0000)],
    ),
    (
        "T30.no_randomize",
        "addresses that can be known",
        "personality",
        &[Arg::Int(0x4_0000)],
    ),
    // SECCOMP_FILTER_FLAG_NEW_LISTENER, without a filter.
    (
        "T30.listener",
        "answers for system calls",
        "seccomp",
        &[Arg::Int(1), Arg::Int(8), Arg::Null],
    ),
    (
        "T29.session",
        "its session key ring",
        "keyctl",
        &[Arg::Int(0), Arg::Int(-3isize as usize)],
    ),
    (
        "T29.user-session",
        "the key ring of all with its id",
        "keyctl",
        &[Arg::Int(0), Arg::Int(-5isize as usize), Arg::Int(1)],
    ),
    (
        "T29.join",
        "another session key ring",
        "keyctl",
        &[Arg::Int(1)],
    ),
    (
        "T29.persistent",
        "a key ring that stays",
        "keyctl",
        &[
            Arg::Int(22),
            Arg::Int(usize::MAX),
            Arg::Int(-2isize as usize),
        ],
    ),
    // KEY_SPEC_PROCESS_KEYRING: gone with the process.
    (
        "T29.add",
        "a key",
        "add_key",
        &[
            Arg::Bytes(b"user"),
            Arg::Bytes(b"probe"),
            Arg::Bytes(b"x"),
            Arg::Int(1),
            Arg::Int(-2isize as usize),
        ],
    ),
    (
        "T29.request",
        "request_key reaches the kernel",
        "request_key",
        &[],
    ),
];

/// Calls of the fixed list (`casemate_sys::attempt`), and what comes from behind
/// the lock.
const FIXED: [(&str, &str, &[Errno]); 10] = [
    (
        "io_uring_enter",
        "io_uring_enter reaches the kernel",
        &[Errno::BADF],
    ),
    (
        "io_uring_register",
        "io_uring_register reaches the kernel",
        &[Errno::BADF, Errno::INVAL],
    ),
    ("ptrace", "ptrace reaches the kernel", &[Errno::SRCH]),
    (
        "process_vm_readv",
        "process_vm_readv reaches the kernel",
        BEHIND,
    ),
    (
        "process_vm_writev",
        "process_vm_writev reaches the kernel",
        BEHIND,
    ),
    (
        "pidfd_getfd",
        "pidfd_getfd reaches the kernel",
        &[Errno::BADF],
    ),
    ("setns", "setns reaches the kernel", &[Errno::BADF]),
    ("fsopen", "fsopen reaches the kernel", &[Errno::FAULT]),
    ("bpf", "bpf reaches the kernel", BEHIND),
    (
        "perf_event_open",
        "perf_event_open reaches the kernel",
        BEHIND,
    ),
];

fn processes(all: &mut Vec<Check>) {
    all.extend([
        Check::new("T18.ptrace-seize", "traces another process", || {
            let pid = parent()? as usize;
            gained(attempt::raw("ptrace", &[Arg::Int(0x4206), Arg::Int(pid)]))
        }),
        Check::new("T18.ptrace-traceme", "is traced", || {
            gained(attempt::raw("ptrace", &[Arg::Int(0)]))
        }),
        Check::new("T18.pidfd_getfd", "a descriptor of another process", || {
            use std::os::fd::AsRawFd;
            let other = process::open_pidfd(parent()?)?;
            let fd = Arg::Int(other.as_raw_fd() as usize);
            gained(attempt::raw("pidfd_getfd", &[fd, Arg::Int(1), Arg::Int(0)]))
        }),
        Check::new("T18.kcmp", "addresses compared in the kernel", || {
            let (own, other) = (process::own_pid() as usize, parent()? as usize);
            gained(attempt::raw(
                "kcmp",
                &[Arg::Int(own), Arg::Int(other), Arg::Int(1)],
            ))
        }),
        Check::new("T18.mem", "writes another process' memory", || {
            let path = format!("/proc/{}/mem", parent()?);
            gained(fs::OpenOptions::new().write(true).open(path))
        }),
        Check::new(
            "T18.process_mrelease",
            "process_mrelease reaches the kernel",
            || {
                gained(attempt::raw(
                    "process_mrelease",
                    &[Arg::Int(usize::MAX), Arg::Int(0)],
                ))
            },
        )
        .entered(&[Errno::BADF]),
        Check::new(
            "T18.process_madvise",
            "process_madvise reaches the kernel",
            || gained(attempt::raw("process_madvise", &[Arg::Int(usize::MAX)])),
        )
        .entered(&[Errno::BADF, Errno::FAULT, Errno::INVAL]),
    ]);
}

fn foreign(all: &mut Vec<Check>) {
    all.extend([
        Check::new("T06.int80", "calls of the 32-bit table", || {
            number(attempt::legacy_gate())
        }),
        Check::new("T06.x32", "calls of the x32 table", || {
            gained(attempt::call("x32-getpid"))
        }),
        Check::new("T06.elf32", "a 32-bit program runs", run_elf32).absent(&[Errno::NOEXEC]),
    ]);
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    let mut all = Vec::new();
    foreign(&mut all);
    processes(&mut all);
    for (id, means, name, args) in CALLS {
        all.push(Check::call(id, means, name, args).entered(BEHIND));
    }
    for (name, means, entered) in FIXED {
        all.push(
            Check::new(&format!("T30.entry-{name}"), means, move || {
                gained(attempt::call(name))
            })
            .entered(entered),
        );
    }
    // EINVAL would be the answer of a filter as well.
    for (id, means, option) in [
        ("T30.prctl-mm", "what /proc says of its memory", 35),
        ("T30.prctl-dispatch", "system calls sent elsewhere", 59),
        ("T30.prctl-mce", "memory errors", 33),
    ] {
        all.push(Check::call(id, means, "prctl", &[Arg::Int(option)]));
    }
    all.push(Check::new("T30.vhangup", "hangs up terminals", || {
        // Of no terminal, in a session of its own.
        rustix::process::setsid()?;
        gained(attempt::raw("vhangup", &[]))
    }));
    all.push(
        Check::new(
            "T30.shocker",
            "files by number, past all directories",
            shock,
        )
        .entered(&[Errno::STALE]),
    );
    for (name, kind) in [
        ("socket-filter", 1u32),
        ("kprobe", 2),
        ("sched-cls", 3),
        ("xdp", 6),
        ("cgroup-skb", 8),
        ("lsm", 29),
    ] {
        all.push(
            Check::new(
                &format!("T30.bpf-{name}"),
                "a BPF program of this kind",
                move || bpf(5, &[kind]),
            )
            .entered(BEHIND),
        );
    }
    all.extend([
        Check::new("T30.bpf-map", "a BPF map", || bpf(0, &[2, 4, 4, 1])),
        Check::new("T30.bpf-next-id", "BPF programs of the host", || {
            bpf(11, &[0])
        })
        .entered(BEHIND),
        Check::new("T30.bpf-btf", "types for BPF", || bpf(18, &[])).entered(BEHIND),
        Check::new("T30.bpf-token", "rights for BPF", || bpf(36, &[])).entered(BEHIND),
        Check::new("T30.perf", "counts events of the kernel", || perf(1, 0)),
        // exclude_kernel, exclude_hv.
        Check::new("T30.perf-user", "counts its own events", || {
            perf(1, 0b110_0000)
        }),
        Check::new("T30.perf-tracepoint", "tracepoints", || perf(2, 0))
            .entered(&[Errno::INVAL, Errno::NOENT]),
    ]);
    all
}
