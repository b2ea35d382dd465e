//! What the kernel says of a container's init, before containerd is told that
//! it exists. The agent said it is locked; this is where it is seen.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use casemate_cgroup::Cgroup;
use casemate_protocol::plan::ProcessPlan;
use casemate_spec::ProcessSpec;

use super::namespaces::identity_of;
use super::{SandboxError, pause};
use crate::bootstrap::proc;
use crate::host::lsm;

/// The host pid behind a pidfd that came from inside, which must be of a child
/// of `parent`: whoever sent it could have sent a descriptor of the shim itself
/// (SO_PEERPIDFD of its channel), or of a process of another container, to have
/// it signalled. `None`: it has ended and was reaped.
pub fn child(pidfd: &OwnedFd, parent: u32) -> Result<Option<u32>, SandboxError> {
    let Ok(pid) = casemate_sys::process::pid_of(pidfd) else {
        // Signal 0 is none: it only looks, and only takes a pidfd.
        return match casemate_sys::process::signal(pidfd, 0) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            _ => Err(lie("sends something that is no process".into())),
        };
    };
    let is = proc::parent(pid);
    // Only while it lives that was certainly its own entry; once it has ended
    // no signal does anything, and the number is for show.
    let ended = proc::poll_in(pidfd, Duration::ZERO).unwrap_or(true);
    if ended || is == Some(parent) {
        Ok(Some(pid))
    } else {
        Err(lie(format!(
            "names a process ({pid}) that is not its child"
        )))
    }
}

/// In the container's user namespace; what a filter takes without no_new_privs.
const SYS_ADMIN: u64 = 1 << 21;
/// That what came as a terminal's master is one.
pub fn terminal(master: &OwnedFd) -> Result<(), SandboxError> {
    if rustix::termios::isatty(master) {
        Ok(())
    } else {
        Err(lie("sends something that is no terminal".into()))
    }
}

fn lie(what: String) -> SandboxError {
    SandboxError::Unavailable(format!("the container's forker {what}"))
}

/// Checks ids, capabilities, no_new_privs, filter and cgroup of host process
/// `pid`. `root` is the host id of the container's root. What it is to execute
/// as is in `spec`; `plan` says what it keeps until then.
pub fn init(
    pid: u32,
    root: u32,
    (spec, plan): (&ProcessSpec, &ProcessPlan),
    cgroup: &Cgroup,
) -> Result<(), SandboxError> {
    let unseen = |e: String| SandboxError::Unavailable(format!("look at init ({pid}): {e}"));
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .map_err(|e| unseen(e.to_string()))?;
    let kept = if plan.keep_for_filter { SYS_ADMIN } else { 0 };
    check(&text, root, spec, kept)?;
    let places = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .map_err(|e| unseen(e.to_string()))?;
    let leaves: Vec<&Path> = cgroup.leaf_dirs().collect();
    if inside(&places, &leaves, cgroup.is_v2()) {
        Ok(())
    } else {
        Err(unlike("cgroup", "another", "the container's"))
    }
}

/// Checks that a process which has passed execve took its labels on with it. A
/// policy may have moved it on since; what it can't be any more is what its
/// forker is.
pub fn labels(
    (pid, pidfd): (u32, &OwnedFd),
    forker: u32,
    spec: &ProcessSpec,
) -> Result<(), SandboxError> {
    const FILES: [&str; 2] = ["apparmor/current", "current"];
    for (field, wanted, files) in [
        (
            "process.apparmorProfile",
            &spec.apparmor_profile,
            &FILES[..],
        ),
        ("process.selinuxLabel", &spec.selinux_label, &FILES[1..]),
    ] {
        let Some(wanted) = wanted else { continue };
        let of = |pid: u32| {
            let read = |file| std::fs::read_to_string(format!("/proc/{pid}/attr/{file}")).ok();
            let label = files.iter().find_map(read);
            label.map(|text| text.trim_end_matches(['\0', '\n']).to_owned())
        };
        let is = of(pid);
        let taken = is.as_deref().is_some_and(|is| has_label(is, wanted));
        let moved_on = is.is_some() && of(forker).is_some_and(|of| Some(of) != is);
        // Of a process that is no more there is nothing to say.
        if !taken && !moved_on && !proc::poll_in(pidfd, Duration::ZERO).unwrap_or(true) {
            return Err(SandboxError::Failed(format!(
                "{field} {wanted} is not in force and the process was killed: it is {}; see the \
                 kernel's log for audit messages of AppArmor or SELinux",
                is.as_deref().unwrap_or("unknown"),
            )));
        }
    }
    Ok(())
}

/// Whether a label is, or has in its stack, the one that was asked for.
fn has_label(is: &str, wanted: &str) -> bool {
    let name = lsm::split_mode(is).map_or(is, |(name, _)| name);
    is == wanted || lsm::parts(wanted).all(|part| lsm::parts(name).any(|is| is == part))
}

/// Checks that init is where it was to join others.
pub fn pids(init: &OwnedFd, wanted: &OwnedFd) -> Result<(), SandboxError> {
    let is = pause::pid_namespace(init)
        .map_err(|e| SandboxError::Unavailable(format!("look at init: {e}")))?;
    if identity_of(is) == identity_of(wanted) {
        Ok(())
    } else {
        Err(unlike("pid namespace", "another", "the one it was to join"))
    }
}

/// Whether every hierarchy that has a directory for this container shows the
/// process there (cgroups(7), /proc/PID/cgroup). The unified hierarchy beside
/// v1 ones has no cheap way in and is left out.
fn inside(places: &str, dirs: &[&Path], v2: bool) -> bool {
    let mut seen = false;
    for line in places.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(names), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        let path = path.trim_start_matches('/');
        let names: Vec<&str> = names
            .split(',')
            .map(|n| n.trim_start_matches("name="))
            .collect();
        for dir in dirs {
            // /sys/fs/cgroup/NAMES/… on v1.
            let hierarchy = dir
                .iter()
                .nth(4)
                .and_then(|c| c.to_str())
                .unwrap_or_default();
            let meant = if v2 {
                names == [""]
            } else {
                names != [""] && hierarchy.split(',').any(|h| names.contains(&h))
            };
            if meant {
                if path.is_empty() || !dir.ends_with(path) {
                    return false;
                }
                seen = true;
            }
        }
    }
    seen
}

fn unlike(what: &str, is: &str, wanted: &str) -> SandboxError {
    SandboxError::Failed(format!(
        "init is not locked as planned and was killed: its {what} is {is}, not {wanted}"
    ))
}

fn check(status: &str, root: u32, spec: &ProcessSpec, kept: u64) -> Result<(), SandboxError> {
    let fields: BTreeMap<&str, Vec<&str>> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.split_ascii_whitespace().collect()))
        .collect();
    let expect = |key: &str, count: usize, wanted: String| {
        let is = fields.get(key).cloned().unwrap_or_default();
        if is.len() == count && is.iter().all(|v| *v == wanted) {
            Ok(())
        } else {
            Err(unlike(key, &is.join(" "), &wanted))
        }
    };
    let mask = |set: u64| format!("{set:016x}");
    expect("Uid", 4, (root + spec.uid).to_string())?;
    expect("Gid", 4, (root + spec.gid).to_string())?;
    expect("CapBnd", 1, mask(spec.caps.bounding))?;
    expect("CapPrm", 1, mask(spec.caps.permitted | kept))?;
    expect("CapEff", 1, mask(spec.caps.effective | kept))?;
    expect("Seccomp", 1, "2".into())?;
    if spec.no_new_privs {
        expect("NoNewPrivs", 1, "1".into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{check, has_label, inside};
    use std::path::Path;

    use casemate_spec::{Config, Context};

    const LOCKED: &str = "Name:\tx\nUid:\t1001\t1001\t1001\t1001\nGid:\t1001\t1001\t1001\t1001\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t2\n";

    #[test]
    fn every_missing_lock_is_seen_and_named() {
        let json = br#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["x"],
            "cwd":"/"},"root":{"path":"rootfs"},"linux":{"namespaces":[{"type":"pid"},
            {"type":"network"},{"type":"ipc"},{"type":"uts"},{"type":"mount"}]}}"#;
        let loaded = casemate_spec::load(json).unwrap();
        let context = Context {
            id: "x",
            ..Context::default()
        };
        let spec = casemate_spec::tighten(loaded, &Config::default(), &context)
            .unwrap()
            .process;
        check(LOCKED, 1001, &spec, 0).unwrap();
        for (is, would_be, named) in [
            ("Uid:\t1001\t1001\t1001\t1001", "Uid:\t0\t0\t0\t0", "Uid"),
            ("Gid:\t1001", "Gid:\t0", "Gid"),
            (
                "CapBnd:\t0000000000000000",
                "CapBnd:\t0000000000200000",
                "CapBnd",
            ),
            (
                "CapPrm:\t0000000000000000",
                "CapPrm:\t0000000000200000",
                "CapPrm",
            ),
            (
                "CapEff:\t0000000000000000",
                "CapEff:\t0000000000200000",
                "CapEff",
            ),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "NoNewPrivs"),
            ("Seccomp:\t2", "Seccomp:\t0", "Seccomp"),
        ] {
            let status = LOCKED.replace(is, would_be);
            assert_ne!(status, LOCKED);
            let error = check(&status, 1001, &spec, 0).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(check("", 1001, &spec, 0).is_err());
    }

    #[test]
    fn labels_are_known_in_stacks_and_with_modes() {
        assert!(has_label("web (enforce)", "web"));
        assert!(has_label("a//&web//&b (mixed)", "web"));
        assert!(has_label("b//&a (enforce)", "a//&b"));
        assert!(has_label("u:r:t:s0", "u:r:t:s0"));
        for other in ["unconfined", "webs (enforce)", "", "a (enforce)"] {
            assert!(!has_label(other, "web"), "{other}");
        }
        assert!(!has_label("a (enforce)", "a//&b"));
    }

    #[test]
    fn a_process_elsewhere_is_seen() {
        let dirs = [
            "/sys/fs/cgroup/memory/d/x",
            "/sys/fs/cgroup/cpu,cpuacct/d/x",
        ]
        .map(Path::new);
        assert!(inside(
            "4:memory:/d/x\n3:cpu,cpuacct:/d/x\n2:net_cls:/\n0::/\n",
            &dirs,
            false
        ));
        for elsewhere in [
            "4:memory:/\n3:cpu,cpuacct:/d/x\n",
            "4:memory:/d/x\n3:cpu,cpuacct:/d/y\n",
            "4:memory:/d/xx\n",
            "0::/\n",
            "",
            "rubbish",
        ] {
            assert!(!inside(elsewhere, &dirs, false), "{elsewhere:?}");
        }
        let v2 = [Path::new("/sys/fs/cgroup/d/x")];
        assert!(inside("0::/d/x\n", &v2, true));
        assert!(!inside("0::/\n", &v2, true));
    }
}
