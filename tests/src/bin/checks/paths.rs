//! Files of the kernel: masked and read-only paths, sysctls, cgroups, and what
//! tells of the host (T11, T24, T25, T28).

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;

use crate::{Arg, Check, Done, No, gained, only_if, skip};

/// /proc/kmsg gives each message once: whoever reads takes it from others.
fn opens(path: &str) -> Done {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    gained(rustix::fs::open(
        path,
        flags | rustix::fs::OFlags::CLOEXEC,
        0.into(),
    ))
}

/// Has anything in it: bytes, or entries.
fn has_content(path: &str) -> Done {
    let meta = fs::metadata(path)?;
    if meta.is_dir() {
        let count = fs::read_dir(path)?.count();
        return only_if(count > 0, format!("{count} entries"));
    }
    // Some of these block when they have nothing to say.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let fd = rustix::fs::open(path, flags | rustix::fs::OFlags::CLOEXEC, 0.into())?;
    let mut bytes = [0; 4096];
    let n = rustix::io::read(&fd, &mut bytes)?;
    only_if(n > 0, format!("{n} bytes"))
}

/// Opens it for writing. Nothing is written.
fn opens_for_writing(path: impl AsRef<Path>) -> Done {
    gained(fs::OpenOptions::new().write(true).open(path))
}

const MASKED: [&str; 14] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/system/cpu/cpu0/thermal_throttle",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/proc/kmsg",
];

const READ_ONLY: [&str; 15] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/irq/default_smp_affinity",
    "/proc/sysrq-trigger",
    "/proc/mtrr",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/fs/binfmt_misc/register",
    "/sys/kernel/uevent_helper",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/power/state",
    "/sys/kernel/profiling",
    "/sys/module/kernel/parameters/panic",
    "/sys/devices/system/cpu/online",
];

/// Files that tell of the host, beside those that are masked.
const TELL: [(&str, &str); 13] = [
    ("/sys/class/dmi/id/product_uuid", "an id of the machine"),
    ("/sys/class/dmi/id/product_serial", "an id of the machine"),
    ("/sys/class/dmi/id/board_serial", "an id of the machine"),
    ("/proc/vmallocinfo", "addresses of the kernel's memory"),
    ("/proc/slabinfo", "the kernel's objects, for aiming"),
    ("/proc/pagetypeinfo", "the kernel's pages, for aiming"),
    ("/proc/kpagecount", "the node's memory, page by page"),
    ("/proc/kpageflags", "the node's memory, page by page"),
    ("/sys/kernel/debug", "drivers' and the kernel's insides"),
    ("/sys/kernel/security/lsm", "security modules of the host"),
    ("/sys/fs/pstore", "crash dumps of the host"),
    ("/sys/kernel/boot_params/data", "the boot loader's data"),
    ("/proc/self/stack", "addresses of the kernel's code"),
];

/// Lines `ADDRESS …` of which one is not zero.
fn addresses(path: &str) -> Done {
    let mut text = vec![0; 1 << 16];
    let n = fs::File::open(path)?.read(&mut text)?;
    let text = String::from_utf8_lossy(&text[..n]).into_owned();
    let real = text.lines().find(|line| {
        line.split([' ', '-'])
            .map(str::trim)
            .find(|word| !word.is_empty())
            .and_then(|word| u64::from_str_radix(word, 16).ok())
            .is_some_and(|address| address != 0)
    });
    only_if(real.is_some(), "addresses that are not zero")
}

/// A file of tracefs, where that is mounted or where one mounts it.
fn traces(file: &str, write: bool) -> Done {
    let open = |below: &str| {
        let mut how = fs::OpenOptions::new();
        how.read(!write).write(write);
        how.open(format!("{below}/{file}"))
    };
    for usual in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
        if open(usual).is_ok() {
            return Ok(usual.to_owned());
        }
    }
    let at = crate::mounts::made_dir("trace")?;
    let none = rustix::mount::MountFlags::empty();
    let done = rustix::mount::mount("none", &at, "tracefs", none, None)
        .map_err(No::from)
        .and_then(|()| gained(open(&at)));
    let _ = rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH);
    let _ = fs::remove_dir(&at);
    done
}

/// Page frame numbers of the own memory: the way to physical addresses.
fn frames() -> Done {
    use std::os::unix::fs::FileExt;
    let local = [0u8; 1];
    let here = &raw const local as u64;
    let mut word = [0; 8];
    fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut word, here / 4096 * 8)?;
    let frame = u64::from_ne_bytes(word) & ((1 << 55) - 1);
    only_if(frame != 0, "a page frame number")
}

/// Mounts whose options or roots name directories of the host.
fn host_paths() -> Done {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let shown = text
        .split([' ', ',', ':'])
        .find(|word| word.starts_with("lowerdir=/") || word.starts_with("upperdir=/"));
    only_if(shown.is_some(), shown.unwrap_or_default())
}

/// All below a directory of sysctls that opens for writing.
fn writable_below(dir: &Path, found: &mut Vec<PathBuf>, depth: u32) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < 6 => writable_below(&path, found, depth + 1),
            Ok(kind) if kind.is_file() && opens_for_writing(&path).is_ok() => found.push(path),
            _ => {}
        }
    }
}

fn writable_sysctls(dir: &str) -> Done {
    if !Path::new(dir).is_dir() {
        return skip("no such directory");
    }
    let mut found = Vec::new();
    writable_below(dir.as_ref(), &mut found, 0);
    let first = found.first().map(|p| p.display().to_string());
    only_if(
        !found.is_empty(),
        format!("{} files, {}", found.len(), first.unwrap_or_default()),
    )
}

fn cgroup_files(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_name() == name {
            found.push(entry.path());
        }
        let below = entry.path().join(name);
        if below.exists() {
            found.push(below);
        }
    }
    found
}

fn writes_in_cgroups(name: &'static str) -> Done {
    let all = cgroup_files(name);
    if all.is_empty() {
        return skip("no such file to be seen");
    }
    let mut last = No::NotApplicable(String::new());
    for path in all {
        match opens_for_writing(&path) {
            Ok(_) => return Ok(path.display().to_string()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn makes_cgroup() -> Done {
    let mut last = No::NotApplicable("no cgroups to be seen".to_owned());
    for path in cgroup_files("cgroup.procs") {
        let dir = path.with_file_name(format!("casemate-probe-{}", std::process::id()));
        match fs::create_dir(&dir) {
            Ok(()) => {
                let _ = fs::remove_dir(&dir);
                return Ok(dir.display().to_string());
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// Names of cgroups outside of the own: in its path, or as directories.
fn sees_cgroups() -> Done {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    // With a cgroup namespace of one's own every path is `/`. On a host at its
    // root that is so too, so the directories are looked at as well.
    let named = text
        .lines()
        .filter(|line| !line.contains("net_cls"))
        .find(|line| !line.ends_with(":/"));
    if let Some(line) = named {
        return Ok(line.to_owned());
    }
    for path in cgroup_files("cgroup.procs") {
        let dir = path.parent().unwrap_or(&path);
        let below = fs::read_dir(dir)?.flatten().find(|e| e.path().is_dir());
        if let Some(below) = below {
            return Ok(below.path().display().to_string());
        }
    }
    Err(rustix::io::Errno::NOENT.into())
}

fn dmesg() -> Done {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/kmsg", flags | rustix::fs::OFlags::CLOEXEC, 0.into())?;
    let n = rustix::io::read(&fd, &mut [0; 8192][..])?;
    only_if(n > 0, format!("{n} bytes"))
}

fn unmask(path: &str) -> Done {
    if let Err(error) = fs::metadata(path)
        && error.kind() == ErrorKind::NotFound
    {
        return Err(error.into());
    }
    gained(rustix::mount::unmount(path, UnmountFlags::DETACH))
}

fn id_of(path: &str) -> String {
    path.trim_start_matches('/').replace('/', ".")
}

/// The checks of this file.
pub fn checks() -> Vec<Check> {
    use rustix::io::Errno;
    const NONE: &[Errno] = &[Errno::NOENT, Errno::NOTDIR, Errno::NOSYS];
    let mut all = Vec::new();
    for path in MASKED {
        all.push(
            Check::new(
                &format!("T11.read-{}", id_of(path)),
                "what the file or directory has is read",
                move || match path {
                    "/proc/kmsg" => opens(path),
                    _ => has_content(path),
                },
            )
            .absent(NONE),
        );
        all.push(
            Check::new(
                &format!("T11.unmask-{}", id_of(path)),
                "the mask over it is taken away",
                move || unmask(path),
            )
            // Nothing is mounted there: no mask to take away.
            .absent(&[Errno::NOENT, Errno::INVAL, Errno::NOSYS]),
        );
    }
    for path in READ_ONLY {
        all.push(
            Check::new(
                &format!("T11.write-{}", id_of(path)),
                "it opens for writing (directories: all below)",
                move || match fs::metadata(path)?.is_dir() {
                    true => writable_sysctls(path),
                    false => opens_for_writing(path),
                },
            )
            .absent(NONE),
        );
    }
    for dir in ["abi", "debug", "dev", "fs", "kernel", "net", "user", "vm"] {
        all.push(Check::new(
            &format!("T24.write-{dir}"),
            "a sysctl below this directory opens for writing",
            move || writable_sysctls(&format!("/proc/sys/{dir}")),
        ));
    }
    for name in [
        "cgroup.procs",
        "tasks",
        "release_agent",
        "notify_on_release",
        "memory.limit_in_bytes",
        "pids.max",
        "devices.allow",
        "cpu.cfs_quota_us",
        "memory.max",
        "cpu.max",
        "cgroup.subtree_control",
    ] {
        all.push(Check::new(
            &format!("T25.write-{name}"),
            "moves itself, or raises a limit",
            move || writes_in_cgroups(name),
        ));
    }
    all.extend([
        Check::new("T25.mkdir", "a cgroup of its own", makes_cgroup),
        Check::new("T25.hierarchy", "names of other cgroups", sees_cgroups),
        Check::new("T28.kallsyms", "addresses of the kernel's code", || {
            addresses("/proc/kallsyms")
        })
        .absent(NONE),
        Check::new("T28.iomem", "the node's memory map", || {
            addresses("/proc/iomem")
        })
        .absent(NONE),
        Check::new("T28.ioports", "the node's ports", || {
            addresses("/proc/ioports")
        })
        .absent(NONE),
        Check::new("T28.pagemap", "physical addresses of its memory", frames),
        Check::new("T28.mountinfo", "directories of the host", host_paths),
        Check::new("T28.kmsg", "the kernel's log", dmesg).absent(NONE),
        Check::call(
            "T28.syslog",
            "the kernel's log",
            "syslog",
            &[Arg::Int(3), Arg::Null, Arg::Int(0)],
        )
        .entered(&[Errno::INVAL]),
        Check::call(
            "T28.syslog-clear",
            "the kernel's log is cleared (asked with a wrong level)",
            "syslog",
            &[Arg::Int(8), Arg::Null, Arg::Int(99)],
        )
        .entered(&[Errno::INVAL]),
    ]);
    for (name, file, write, means) in [
        ("events", "available_events", false, "the kernel's events"),
        ("pipe", "trace_pipe", false, "what the node's kernel does"),
        (
            "probes",
            "kprobe_events",
            true,
            "probes in the kernel's code",
        ),
    ] {
        all.push(
            Check::new(&format!("T28.tracefs-{name}"), means, move || {
                traces(file, write)
            })
            .absent(&[Errno::NODEV]),
        );
    }
    for (path, means) in TELL {
        all.push(
            Check::new(&format!("T28.read-{}", id_of(path)), means, move || {
                has_content(path)
            })
            .absent(NONE),
        );
    }
    all
}
