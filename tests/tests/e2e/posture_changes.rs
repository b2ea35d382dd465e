//! What each part of `casemate posture` sees: something is changed from outside, by
//! the host's root, or promised that isn't so, and a line names it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use casemate_netguard::Rules;
use casemate_posture::{Depth, Promise, compare};
use casemate_sys::namespace::{self, kind};
use casemate_tests::bundle::Task;
use casemate_tests::operator::{deviations, promise};
use casemate_tests::pod::{self, init, insiders};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};

use crate::common::casemate_only;
use crate::locks::sleeper;
use crate::posture::{as_promised, cgroup_file, end, in_mounts, names};

crate::trials![
    posture_a_guard_that_was_changed,
    posture_a_path_that_was_made_writable,
    posture_a_mount_that_nobody_promised,
    posture_a_mount_that_became_shared,
    posture_a_mask_that_shows_something,
    posture_a_process_in_another_cgroup,
    posture_a_device_that_was_allowed,
    posture_a_descriptor_from_outside,
    posture_names_what_was_promised_and_is_not_so,
];

/// Runs in the network namespace of the task's init.
fn in_network(task: &Task, act: impl FnOnce() -> Outcome + Send + 'static) -> Outcome {
    let file = fs::File::open(format!("/proc/{}/ns/net", init(task)?))?;
    let done = std::thread::spawn(move || {
        namespace::enter(&file, kind::NET)?;
        act()
    });
    done.join()
        .map_err(|_| Stop::Fail("panicked in the pod's network".to_owned()))?
}

fn install(task: &Task, rules: Rules) -> Outcome {
    in_network(task, move || {
        casemate_netguard::install(&rules)
            .map(|_| ())
            .map_err(|e| Stop::Fail(e.to_string()))
    })
}

fn posture_a_guard_that_was_changed() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("guard")?;
    as_promised(&task)?;
    task.posture = false;
    // Another address than was promised.
    let other = casemate_netguard::Target {
        name: "192.0.2.7".to_owned(),
        address: [192, 0, 2, 7].into(),
        prefix: 32,
        ports: None,
        protocols: Vec::new(),
    };
    install(
        &task,
        Rules {
            denied: vec![other],
            ..Rules::default()
        },
    )?;
    names(&task, &["network guard: promised "])?;
    // A table without them.
    install(&task, Rules::default())?;
    names(&task, &["network guard: promised "])?;
    Ok(task.finish()?)
}

fn posture_a_path_that_was_made_writable() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("writable")?;
    task.posture = false;
    in_mounts(&task, &["mount", "-o", "remount,bind,rw", "/proc/sys"])?;
    names(&task, &["/proc/sys: promised read-only"])?;
    in_mounts(&task, &["mount", "-o", "remount,bind,exec,nosuid", "/proc"])?;
    names(&task, &["mount /proc: promised noexec"])?;
    Ok(task.finish()?)
}

fn posture_a_mount_that_nobody_promised() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("strange")?;
    task.posture = false;
    in_mounts(&task, &["mount", "-t", "tmpfs", "none", "/dev/shm"])?;
    in_mounts(&task, &["mount", "-t", "tmpfs", "none", "/tmp"])?;
    names(
        &task,
        &[
            "mount /dev/shm: promised 1 in this place, found 2",
            "mount /tmp: promised 0 in this place, found 1",
        ],
    )?;
    Ok(task.finish()?)
}

fn posture_a_mount_that_became_shared() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("shared")?;
    task.posture = false;
    in_mounts(&task, &["mount", "--make-shared", "/dev"])?;
    names(&task, &["mount /dev: propagation: promised private"])?;
    Ok(task.finish()?)
}

fn posture_a_mask_that_shows_something() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("maskfull")?;
    as_promised(&task)?;
    task.posture = false;
    let masked = promise(task.rpc()?)?.containers.remove(0).masked;
    let dir = masked.iter().find(|path| *path == "/sys/firmware");
    ensure!(dir.is_some(), "no directory is masked: {masked:?}");
    in_mounts(&task, &["mount", "-t", "tmpfs", "none", "/sys/firmware"])?;
    let hidden = "/sys/firmware: promised hidden by";
    names(
        &task,
        &[&format!(
            "{hidden} the null device or an empty tmpfs, found tmpfs"
        )],
    )?;
    in_mounts(&task, &["touch", "/sys/firmware/x"])?;
    in_mounts(&task, &["mount", "-o", "remount,bind,ro", "/sys/firmware"])?;
    names(
        &task,
        &[&format!(
            "{hidden} an empty tmpfs, found a tmpfs with something"
        )],
    )?;
    Ok(task.finish()?)
}

/// A cgroup beside that of the file, for as long as it is held.
struct Beside(PathBuf);

impl Beside {
    fn new(file: &Path) -> Result<Self, Stop> {
        let own = file.parent().unwrap_or(file);
        // Not named after the task: of that nothing may be left.
        let beside = own.with_file_name(format!("elsewhere-{}", std::process::id()));
        fs::create_dir(&beside)?;
        Ok(Self(beside))
    }

    fn take(&self, pid: u32) -> Outcome {
        Ok(fs::write(self.0.join("cgroup.procs"), pid.to_string())?)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn posture_a_process_in_another_cgroup() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("moved")?;
    task.posture = false;
    let (pid, _out) = pod::exec(&task, "more", &["/bin/probe", "sleep"])?;
    as_promised(&task)?;
    let (agent, _) = insiders(&task)?;
    let elsewhere = Beside::new(&cgroup_file(&task, "pids.max")?)?;
    elsewhere.take(pid)?;
    names(&task, &[&format!("process {pid}: cgroup")])?;
    elsewhere.take(agent)?;
    names(&task, &[&format!("agent ({agent}): cgroup")])?;
    // Gone, with what is in there, before the cgroup can go.
    task.finish()?;
    drop(elsewhere);
    Ok(())
}

fn posture_a_device_that_was_allowed() -> Outcome {
    casemate_only()?;
    let mut task = sleeper("device")?;
    // Version 2 has a program in its place.
    let Ok(list) = cgroup_file(&task, "devices.list") else {
        return casemate_tests::skip::skip("cgroup v2 has no devices.list");
    };
    task.posture = false;
    fs::write(list.with_file_name("devices.allow"), "c 10:232 rw")?;
    names(&task, &["limit devices.list", "c 10:232 rw"])?;
    Ok(task.finish()?)
}

/// A process with all of the container's own, but a directory of the host's.
fn posture_a_descriptor_from_outside() -> Outcome {
    casemate_only()?;
    let task = sleeper("fd")?;
    let pid = init(&task)?.to_string();
    let script = format!("exec 7</etc; exec nsenter --target {pid} --mount /bin/probe sleep");
    let child = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::null())
        .spawn()?;
    let comm = format!("/proc/{}/comm", child.id());
    casemate_tests::run::until("nsenter to execute", casemate_tests::shim::SHORT, || {
        fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "probe")
    })?;
    let named = names(
        &task,
        &[&format!(
            "process {}: descriptor 7: promised of a mount of its own, found /etc",
            child.id()
        )],
    );
    end(child);
    named?;
    as_promised(&task)?;
    Ok(task.finish()?)
}

/// A promise that somebody else is meant by, or that says more.
fn posture_names_what_was_promised_and_is_not_so() -> Outcome {
    casemate_only()?;
    let task = sleeper("forged")?;
    let honest = promise(task.rpc()?)?;
    ensure_eq!(deviations(&task, Depth::Whole)?, [], "deviations");
    // In the place of the forker: who has no descriptor that shows a domain.
    let pid = init(&task)?;
    type Change<'a> = &'a dyn Fn(&mut Promise);
    let below = |target: &str| casemate_posture::Mount {
        target: target.to_owned(),
        ..Default::default()
    };
    let cases: [(&str, Change<'_>); 27] = [
        ("shim (", &|p| p.shim.capabilities |= 1 << 12),
        ("CapPrm", &|p| p.agent.capabilities |= 1 << 12),
        ("CapBnd", &|p| p.containers[0].capabilities &= !1),
        ("Uid", &|p| p.agent.uid += 1),
        ("uid_map", &|p| p.root = p.root.map(|root| root + 1)),
        ("NoNewPrivs", &|p| p.agent.no_new_privs = true),
        ("hash of filter 0", &|p| p.shim.filters = vec!["x".into()]),
        ("filters", &|p| p.agent.filters.push("x".into())),
        ("hash of filter 2", &|p| {
            p.containers[0].last_filter = Some("x".into());
        }),
        ("core file", &|p| p.shim.no_core = true),
        ("descriptor", &|p| p.agent.files = Some(Vec::new())),
        ("descriptor", &|p| p.shim.files = Some(Vec::new())),
        ("user namespace", &|p| p.users = Some(1)),
        ("net namespace", &|p| p.network.namespace = Some(1)),
        ("network guard", &|p| p.network.guard = Some(Vec::new())),
        ("type", &|p| p.containers[0].mounts[0].fstype = "nfs".into()),
        ("the node's", &|p| p.shim.pid = p.agent.pid),
        ("Landlock domain", &|p| p.containers[0].forker = pid),
        ("nothing there", &|p| {
            p.containers[0].mounts.push(below("/no"))
        }),
        ("what is below", &|p| {
            p.containers[0].mounts.push(below("/bin"))
        }),
        ("no mount over it", &|p| {
            p.containers[0].masked.push("/bin".into())
        }),
        ("or an empty tmpfs", &|p| {
            p.containers[0].masked.push("/vol".into())
        }),
        ("/dev: promised read-only", &|p| {
            p.containers[0].readonly.push("/dev".into());
        }),
        ("limit no.such", &|p| {
            let limits = &mut p.containers[0].limits.0;
            let known = limits.keys().next().cloned().unwrap_or_default();
            let dir = Path::new(&known).parent().unwrap_or(Path::new("/"));
            limits.insert(dir.join("no.such").display().to_string(), "1".into());
        }),
        ("promised other, found", &|p| {
            for rule in p.network.guard.iter_mut().flatten() {
                rule.content = "other".into();
            }
        }),
        ("network guard: promised another", &|p| {
            for rule in p.network.guard.iter_mut().flatten() {
                rule.name = "another".into();
            }
        }),
        ("cgroup", &|p| {
            p.agent.cgroups.push("/sys/fs/cgroup/memory/no/such".into())
        }),
    ];
    let mut unnamed = Vec::new();
    for (part, change) in cases {
        let mut forged = honest.clone();
        change(&mut forged);
        let found = compare(&forged, Depth::Whole).deviations;
        if !found.iter().any(|d| d.to_string().contains(part)) {
            unnamed.push(format!("{part}: {found:?}"));
        }
    }
    ensure!(unnamed.is_empty(), "not named: {unnamed:#?}");
    // Landlock is what not all kernels show.
    let shown = casemate_sys::landlock::abi() >= 5;
    ensure_eq!(
        compare(&honest, Depth::Glance).unseen.is_empty(),
        shown,
        "all is seen"
    );
    Ok(task.finish()?)
}
