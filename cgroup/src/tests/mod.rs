//! Against this host's kernel, as root, with real cgroups and processes.

mod v1;
mod v2;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use casemate_sys::process::{self, Fork};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};
use rustix::fs::{CWD, Mode, OFlags};

use crate::{Attach, Cgroup, Hierarchy};

const SOON: Duration = Duration::from_secs(3);

/// The unified hierarchy alone, as on a host without version 1.
fn unified() -> Hierarchy {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().find(|l| l.contains(" - cgroup2 ")).unwrap();
    Hierarchy::unified_only(Path::new(line.split(' ').nth(4).unwrap()))
}

/// A host with version 1, which these tests are about.
fn version_1() -> Hierarchy {
    let host = Hierarchy::detect().unwrap();
    assert!(!host.is_v2(), "this test needs a host with cgroup v1");
    host
}

fn name(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("/casemate-test-{}-{n}-{what}", std::process::id())
}

pub(crate) fn resources(json: &str) -> LinuxResources {
    #[derive(serde::Deserialize)]
    struct Spec {
        resources: LinuxResources,
    }
    let text = format!("{{\"resources\":{json}}}");
    serde_json::from_str::<Spec>(&text).unwrap().resources
}

pub(crate) fn rules(json: &str) -> LinuxResources {
    let mut r = LinuxResources::default();
    let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
    r.set_devices(Some(rules));
    r
}

fn read(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file))
        .unwrap()
        .trim()
        .to_owned()
}

/// Leaves nothing behind, also when a test fails.
struct Made(Cgroup);

impl Made {
    fn new(h: &Hierarchy, what: &str) -> Made {
        Made(Cgroup::create(h, &name(what)).unwrap())
    }
}

impl std::ops::Deref for Made {
    type Target = Cgroup;
    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = self.0.kill(libc::SIGKILL, &[]);
        let _ = self.0.remove(SOON);
    }
}

/// A child that is killed and reaped at the end.
struct Child {
    pid: u32,
    fd: OwnedFd,
}

impl Child {
    fn status(&self) -> u32 {
        process::wait(&self.fd).unwrap().status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = process::signal(&self.fd, libc::SIGKILL);
        let _ = process::wait(&self.fd);
    }
}

/// Runs `body` in a child that entered the cgroup the way the product does.
/// The parent has threads, so `body` may only make system calls.
fn run(cgroup: &Cgroup, unified_too: bool, body: fn() -> i32) -> Child {
    let (tasks, dir) = match cgroup.attach().unwrap() {
        Attach::V1(tasks) => {
            let dir = cgroup.unified_dir().unwrap().filter(|_| unified_too);
            (tasks, dir)
        }
        Attach::V2(dir) => (Vec::new(), Some(dir)),
    };
    let (wait, inside) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    match process::fork_into(0, dir.as_ref().map(|d| d.as_fd())).unwrap() {
        Fork::Parent(pid, fd) => {
            let child = Child { pid, fd };
            drop(inside);
            let mut byte = [0];
            assert_eq!(rustix::io::read(&wait, &mut byte), Ok(1), "not attached");
            child
        }
        Fork::Child => {
            for task in &tasks {
                if rustix::io::write(task, b"0").is_err() {
                    process::exit_now(99);
                }
            }
            let _ = rustix::io::write(&inside, b"1");
            process::exit_now(body())
        }
    }
}

fn pause(ms: i64) {
    let _ = rustix::thread::nanosleep(&rustix::thread::Timespec {
        tv_sec: ms / 1000,
        tv_nsec: ms % 1000 * 1_000_000,
    });
}

fn sleeper() -> i32 {
    loop {
        pause(1000);
    }
}

/// Forks without end; `pids.max` bounds it.
fn fork_bomb() -> i32 {
    loop {
        let _ = process::fork();
    }
}

/// Opens both devices and says in bits which could be opened (null 1, zero 2),
/// and which way the others failed (4: not EPERM).
fn open_devices() -> i32 {
    let mut code = 0;
    for (path, bit) in [(c"/dev/null", 1), (c"/dev/zero", 2)] {
        match rustix::fs::openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => code |= bit,
            Err(rustix::io::Errno::PERM) => {}
            Err(_) => code |= 4,
        }
    }
    code
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn exists(dirs: &[PathBuf]) -> Vec<&PathBuf> {
    dirs.iter().filter(|d| d.exists()).collect()
}

const DENY_ALL_BUT_NULL: &str = r#"[
    {"allow": false, "access": "rwm"},
    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
]"#;
const DENY_ALL_BUT_ZERO: &str = r#"[
    {"allow": false, "access": "rwm"},
    {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"}
]"#;
const ALLOW_ALL: &str = r#"[{"allow": true, "access": "rwm"}]"#;

fn devices_follow_the_rules(h: &Hierarchy) {
    let cgroup = Made::new(h, "devices");
    assert_eq!(run(&cgroup, false, open_devices).status(), 3);
    cgroup.apply(&rules(DENY_ALL_BUT_NULL)).unwrap();
    assert_eq!(run(&cgroup, false, open_devices).status(), 1);
    // An update replaces the rules.
    cgroup.apply(&rules(DENY_ALL_BUT_ZERO)).unwrap();
    assert_eq!(run(&cgroup, false, open_devices).status(), 2);
    cgroup.apply(&rules(ALLOW_ALL)).unwrap();
    assert_eq!(run(&cgroup, false, open_devices).status(), 3);
    // The last rule that covers it decides.
    let last = r#"[
        {"allow": true, "access": "rwm"},
        {"allow": false, "type": "c", "major": 1, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}
    ]"#;
    let taken = cgroup.apply(&rules(last));
    if h.is_v2() {
        taken.unwrap();
        assert_eq!(run(&cgroup, false, open_devices).status(), 1);
    } else {
        let error = taken.unwrap_err().to_string();
        assert!(
            error.contains("wider earlier rule \"c 1:* rwm\""),
            "{error}"
        );
    }
    // One access denied is the whole open(2) denied.
    let read_only = r#"[
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
        {"allow": false, "type": "c", "major": -1, "minor": 5, "access": "w"}
    ]"#;
    cgroup.apply(&rules(read_only)).unwrap();
    assert_eq!(run(&cgroup, false, open_devices).status(), 1);
}

fn freezing_stops_and_thawing_continues(h: &Hierarchy) {
    let cgroup = Made::new(h, "freeze");
    let child = run(&cgroup, false, sleeper);
    assert!(!cgroup.is_frozen().unwrap());
    cgroup.freeze().unwrap();
    assert!(cgroup.is_frozen().unwrap());
    cgroup.kill(libc::SIGTERM, &[]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    // Version 1 holds even those that are to die; version 2 lets them.
    if !h.is_v2() {
        assert_eq!(cgroup.pids().unwrap(), [child.pid]);
    }
    cgroup.thaw().unwrap();
    assert_eq!(child.status(), 128 + libc::SIGTERM as u32);
    assert!(!cgroup.is_frozen().unwrap());
}

fn a_frozen_cgroup_can_be_killed(h: &Hierarchy) {
    let cgroup = Made::new(h, "frozen-kill");
    let child = run(&cgroup, false, sleeper);
    cgroup.freeze().unwrap();
    cgroup.kill(libc::SIGKILL, &[]).unwrap();
    assert_eq!(child.status(), 128 + libc::SIGKILL as u32);
    cgroup.remove(SOON).unwrap();
}

fn killing_spares_the_exceptions(h: &Hierarchy) {
    let cgroup = Made::new(h, "except");
    let spared = run(&cgroup, false, sleeper);
    let others = [
        run(&cgroup, false, sleeper),
        run(&cgroup, false, sleeper),
        run(&cgroup, false, sleeper),
    ];
    cgroup.kill(libc::SIGKILL, &[spared.pid]).unwrap();
    for other in others {
        assert_eq!(other.status(), 128 + libc::SIGKILL as u32);
    }
    assert_eq!(cgroup.pids().unwrap(), [spared.pid]);
    assert!(!cgroup.is_frozen().unwrap());
    assert!(cgroup.kill(4711, &[]).is_err(), "no such signal");

    // Busy as long as it lives; then gone, and gone again.
    let error = cgroup.remove(Duration::from_millis(30)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("still busy after"), "{text}");
    assert!(text.contains(&spared.pid.to_string()), "{text}");
    cgroup.kill(libc::SIGKILL, &[]).unwrap();
    drop(spared);
    cgroup.remove(SOON).unwrap();
    cgroup.remove(SOON).unwrap();
    cgroup.kill(libc::SIGKILL, &[]).unwrap();
    cgroup.kill(libc::SIGTERM, &[]).unwrap();
    assert!(cgroup.pids().unwrap().is_empty());
    assert!(cgroup.stats().unwrap_err().is_gone());
}

fn a_leaf_of_somebody_else_is_left_alone(h: &Hierarchy) {
    let path = name("shared");
    let first = Made(Cgroup::create(h, &format!("{path}/a")).unwrap());
    // The second one finds the parent and makes only its leaf.
    let promised = h.dirs(&format!("{path}/b")).unwrap();
    let second = Made(Cgroup::create(h, &format!("{path}/b")).unwrap());
    assert_eq!(second.dirs(), promised);
    assert_eq!(second.dirs().len() * 2, first.dirs().len());

    let error = Cgroup::create(h, &format!("{path}/a")).unwrap_err();
    assert!(error.to_string().contains("it exists already"), "{error}");
    assert!(h.dirs(&format!("{path}/a")).is_err());
    assert_eq!(exists(first.dirs()).len(), first.dirs().len());

    // The maker of the parent goes first: the parent is in use and stays.
    first.remove(SOON).unwrap();
    assert_eq!(exists(second.dirs()).len(), second.dirs().len());
    assert!(!exists(first.dirs()).is_empty());
    second.remove(SOON).unwrap();
    first.remove(SOON).unwrap();
    assert!(exists(first.dirs()).is_empty());
}

#[test]
fn a_journal_is_enough_to_clean_up() {
    for h in [version_1(), unified()] {
        let path = format!("{}/x/y", name("journal"));
        let promised = h.dirs(&path).unwrap();
        let cgroup = Made(Cgroup::create(&h, &path).unwrap());
        assert_eq!(cgroup.dirs(), promised);
        // A workload with cgroups of its own.
        for dir in promised.iter().filter(|d| d.ends_with("y")) {
            std::fs::create_dir_all(dir.join("own/own")).unwrap();
        }
        let child = run(&cgroup, false, sleeper);

        let outside = tempdir();
        let mut journal = promised.clone();
        journal.push(outside.clone());
        journal.push("/sys/fs/cgroup".into());
        let again = Cgroup::open(&journal);
        assert_eq!(again.pids().unwrap(), [child.pid]);
        again.kill(libc::SIGKILL, &[]).unwrap();
        assert_eq!(child.status(), 128 + libc::SIGKILL as u32);
        again.remove(SOON).unwrap();
        assert!(exists(&promised).is_empty());
        assert!(outside.exists());
        std::fs::remove_dir(outside).unwrap();
        Cgroup::open(&journal).remove(SOON).unwrap();
    }
}

fn tempdir() -> PathBuf {
    let dir = std::env::temp_dir().join(name("outside").trim_start_matches('/'));
    std::fs::create_dir(&dir).unwrap();
    dir
}
