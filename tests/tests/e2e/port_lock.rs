//! The lock on TCP's ports: Landlock's, of each container, beside the guard. Here it
//! stands alone: the guard's rules are taken away from outside.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::path::Path;

use casemate_sys::landlock;
use casemate_sys::namespace::{self, kind};
use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, lines};
use casemate_tests::pod::{Pids, Pod, init, say};
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::spec::annotate;
use casemate_tests::{ensure, ensure_eq};
use serde_json::json;

use crate::common::{LONG, casemate_only};
use crate::hostile_node::configure;
use crate::locks::on_host;

crate::trials![
    port_lock_holds_without_the_guard,
    port_lock_holds_the_older_way,
    port_lock_of_a_pod_is_its_containers,
    port_lock_is_off_unless_loopback_is_named,
    port_lock_has_no_way_past_it,
];

const EGRESS: &str = "192.0.2.0/24:8001/tcp, 192.0.2.0/24:9000/udp, loopback:8002";
const INGRESS: &str = "192.0.2.0/24:8011-8012, loopback:8013";
/// Where somebody listens, 9000 and 8003 for nobody on the list.
const SERVERS: [u16; 4] = [8001, 8002, 8003, 9000];

/// What is tried, and the error number it is to end with when the lock is on.
const ATTEMPTS: [(&str, i32); 14] = [
    // The lock knows no addresses.
    ("connect:127.0.0.1:8001", 0),
    ("connect:127.0.0.1:8002", 0),
    ("connect:127.0.0.1:8003", EACCES),
    ("connect:127.0.0.1:9000", EACCES),
    ("connect:[::1]:8002", 0),
    ("connect:[::1]:8003", EACCES),
    // Without connect(2), which is where Landlock looks.
    ("fastopen:127.0.0.1:8003", EOPNOTSUPP),
    ("bind:0.0.0.0:8011", 0),
    ("bind:0.0.0.0:8012", 0),
    ("bind:127.0.0.1:8013", 0),
    ("bind:127.0.0.1:8014", EACCES),
    ("bind:[::]:8014", EACCES),
    // A port of the kernel's choice, as clients have it.
    ("bind:0.0.0.0:0", 0),
    ("bind:[::]:0", 0),
];
const EACCES: i32 = 13;
const EOPNOTSUPP: i32 = 95;
const EPROTONOSUPPORT: i32 = 93;

/// Needs Linux 6.7.
fn landlock_has_ports() -> Outcome {
    casemate_only()?;
    match landlock::abi() {
        abi if abi < landlock::net::SINCE => skip("Landlock has no rules for ports here"),
        _ => Ok(()),
    }
}

/// Listens on loopback in the network namespace of a process.
fn listeners(pid: u32) -> Result<Vec<TcpListener>, Stop> {
    let fd = File::open(format!("/proc/{pid}/ns/net"))?;
    let made = std::thread::spawn(move || -> std::io::Result<Vec<TcpListener>> {
        namespace::enter(&fd, kind::NET)?;
        let v4 = SERVERS.map(|port| TcpListener::bind(("127.0.0.1", port)));
        let v6 = SERVERS.map(|port| TcpListener::bind(("::1", port)));
        v4.into_iter().chain(v6).collect()
    });
    match made.join() {
        Ok(made) => Ok(made?),
        Err(_) => fail("a thread panicked"),
    }
}

/// How each attempt ends in a container, by an exec.
fn attempts(task: &Task, exec: &str) -> Result<BTreeMap<String, i32>, Stop> {
    let mut args = vec!["/bin/probe", "ports"];
    args.extend(ATTEMPTS.iter().map(|(what, _)| *what));
    answers(&say(task, exec, &args)?)
}

fn answers(text: &str) -> Result<BTreeMap<String, i32>, Stop> {
    let read = |line: &str| {
        let (what, answer) = line.rsplit_once(' ')?;
        let answer = match (what.split(':').next(), answer.parse().ok()?) {
            // Landlock itself refuses it from some kernel on, before ours does.
            (Some("fastopen"), EACCES) => EOPNOTSUPP,
            (_, answer) => answer,
        };
        Some((what.to_owned(), answer))
    };
    let all: BTreeMap<_, _> = text.lines().filter_map(read).collect();
    ensure_eq!(all.len(), ATTEMPTS.len(), "answers in {text:?}");
    Ok(all)
}

fn locked() -> BTreeMap<String, i32> {
    let all = ATTEMPTS.iter();
    all.map(|(what, answer)| ((*what).to_owned(), *answer))
        .collect()
}

fn with_lists(task: &mut Task, egress: &str, ingress: &str) {
    annotate(&mut task.spec, "casemate.io/egress", egress);
    annotate(&mut task.spec, "casemate.io/ingress", ingress);
    // Its network changes under it.
    task.posture = false;
}

/// Puts an empty table in the place of the guard's, as the host's root.
fn unguard(pid: u32) -> Outcome {
    on_host(&["enter", "net", &pid.to_string(), "unguard"])?;
    Ok(())
}

/// The container's init, told to begin by a file, makes the attempts as well.
fn init_and_exec(name: &str, config: &str) -> Outcome {
    landlock_has_ports()?;
    let words: Vec<&str> = ATTEMPTS.iter().map(|(what, _)| *what).collect();
    let script = format!(
        "until [ -e /tmp/go ]; do sleep 0.05; done; /bin/probe ports {}; \
         echo done; exec /bin/probe sleep",
        words.join(" ")
    );
    let mut task = Task::new(name, &["/bin/sh", "-c", &script])?;
    with_lists(&mut task, EGRESS, INGRESS);
    configure(&mut task, config)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let pid = init(&task)?;
    let _listeners = listeners(pid)?;
    unguard(pid)?;
    ensure_eq!(attempts(&task, "e")?, locked(), "an exec");
    say(&task, "go", &["/bin/sh", "-c", "mkdir -p /tmp; : >/tmp/go"])?;
    task.stdout.until("done", LONG)?;
    let said = task.stdout.so_far();
    let said = String::from_utf8_lossy(&said);
    ensure_eq!(answers(said.trim_end_matches("done\n"))?, locked(), "init");
    let told = casemate(&["network", &task.id])?.ok()?.out();
    for part in [
        "port lock: TCP connects to 8001-8002\n",
        "port lock: TCP listens on 8011-8013\n",
    ] {
        ensure!(told.contains(part), "no {part:?} in {told}");
    }
    Ok(task.finish()?)
}

fn port_lock_holds_without_the_guard() -> Outcome {
    init_and_exec("portlock", "")
}

/// Before Linux 6.17 init's domain is its own.
fn port_lock_holds_the_older_way() -> Outcome {
    init_and_exec("portolder", "[kernel]\nolder_ways = true\n")
}

fn port_lock_of_a_pod_is_its_containers() -> Outcome {
    landlock_has_ports()?;
    let mut pod = Pod::with("portpod", |pause| with_lists(pause, EGRESS, INGRESS))?;
    let _listeners = listeners(pod.pid)?;
    unguard(pod.pid)?;
    pod.pause.posture = false;
    for (name, pids) in [("a", Pids::Own), ("b", Pids::Pod)] {
        let mut member = pod.run(name, &["/bin/probe", "sleep"], pids)?;
        member.posture = false;
        ensure_eq!(attempts(&member, "e")?, locked(), "container {name}");
        pod.remove(member)?;
    }
    Ok(pod.finish()?)
}

fn port_lock_is_off_unless_loopback_is_named() -> Outcome {
    landlock_has_ports()?;
    let free: BTreeMap<String, i32> = locked().into_keys().map(|what| (what, 0)).collect();
    for (egress, ingress, connects) in [
        (
            "192.0.2.0/24:8001/tcp",
            "192.0.2.0/24:8011",
            "the list says nothing of loopback",
        ),
        (
            "192.0.2.0/24:8001/tcp, loopback:*",
            "none",
            "the list has loopback:*",
        ),
    ] {
        let mut task = Task::new("portfree", &["/bin/probe", "sleep"])?;
        with_lists(&mut task, egress, ingress);
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        let _listeners = listeners(init(&task)?)?;
        // The guard is there, and has loopback pass.
        ensure_eq!(attempts(&task, "e")?, free, "{egress}");
        let told = lines(&["network", "--json", &task.id])?;
        let lock = &told[0]["port_lock"];
        ensure_eq!(lock["connect"], json!({ "off": connects }), "egress");
        task.finish()?;
    }
    // One direction's list locks no other.
    let mut task = Task::new("porthalf", &["/bin/probe", "sleep"])?;
    annotate(&mut task.spec, "casemate.io/egress", "loopback:8002");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let _listeners = listeners(init(&task)?)?;
    let all = attempts(&task, "e")?;
    ensure_eq!(all["connect:127.0.0.1:8001"], EACCES, "8001");
    ensure_eq!(all["connect:127.0.0.1:8002"], 0, "8002");
    ensure_eq!(all["bind:[::]:8014"], 0, "listening");
    Ok(task.finish()?)
}

fn mptcp_switch() -> &'static Path {
    Path::new("/proc/sys/net/mptcp/enabled")
}

/// Kinds of TCP that Landlock doesn't look at: TCP with data in its first packet goes
/// where there is no lock and not where there is one, MPTCP in no profile.
fn port_lock_has_no_way_past_it() -> Outcome {
    landlock_has_ports()?;
    let past = |name: &str, egress: &str| -> Result<String, Stop> {
        let mut task = Task::new(name, &["/bin/probe", "sleep"])?;
        annotate(&mut task.spec, "casemate.io/egress", egress);
        configure(&mut task, "profile = \"compat\"\n")?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        let _listeners = listeners(init(&task)?)?;
        let ways = ["fastopen:127.0.0.1:8003", "mptcp:127.0.0.1:8003"];
        let mut text = say(&task, "e", &[&["/bin/probe", "ports"], &ways[..]].concat())?;
        if mptcp_switch().exists() {
            let path = mptcp_switch().to_string_lossy();
            text += &format!("switch {}", say(&task, "m", &["/bin/cat", &path])?);
        }
        task.finish()?;
        Ok(text)
    };
    let free = past("portways", "loopback:*")?;
    ensure!(free.contains("fastopen:127.0.0.1:8003 0\n"), "{free}");
    let held = past("portways", "loopback:8002")?;
    let refused = |errno| held.contains(&format!("fastopen:127.0.0.1:8003 {errno}\n"));
    ensure!(refused(EOPNOTSUPP) || refused(EACCES), "{held}");
    let refused = format!("mptcp:127.0.0.1:8003 {EPROTONOSUPPORT}\n");
    ensure!(free.contains(&refused), "{free}");
    ensure!(held.contains(&refused), "{held}");
    // Nor would the kernel know it in a namespace with a lock.
    let off = held.ends_with("switch 0\n");
    ensure!(off || !mptcp_switch().exists(), "{held}");
    Ok(())
}
