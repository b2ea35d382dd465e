//! User namespaces that the kubelet chooses (`hostUsers: false`), as containerd
//! 2.x asks for them (pinned, with the network in it) and as 1.7 does (made by
//! the runtime).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use casemate_sys::namespace;
use casemate_tests::bundle::Task;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::set_mode;
use casemate_tests::{World, ensure, ensure_eq, pod, procs};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::{Value, json};

use crate::common::{casemate_only, expect_text};
use crate::locks::on_host;

crate::trials![
    c119_pinned_user_namespace,
    c119_network_of_the_pinned_namespace_is_out_of_reach,
    c119_paths_are_verified,
    c119_ranges_are_one_pods,
    c120_user_namespace_made_by_the_runtime,
];

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A range that nobody else on this machine is likely to use now.
pub fn range() -> u32 {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    (10 + (std::process::id() * 61 + n) % 28_000) * 65536
}

/// A user namespace with a network namespace in it, pinned by bind mounts, as
/// containerd 2.x makes them.
pub struct Pinned {
    pub user: PathBuf,
    pub network: PathBuf,
}

/// A process in new namespaces, until it is killed.
fn unshared(first: u32, flags: &[&str]) -> Result<Child, Stop> {
    let child = Command::new("unshare")
        .args(flags)
        .args(["sleep", "600"])
        .stdin(Stdio::null())
        .spawn()?;
    let link = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
    let own = link(std::process::id());
    until("a new user namespace", SHORT, || {
        link(child.id()).is_some_and(|l| Some(l) != own)
    })?;
    for map in ["uid_map", "gid_map"] {
        fs::write(
            format!("/proc/{}/{map}", child.id()),
            format!("0 {first} 65536"),
        )?;
    }
    Ok(child)
}

impl Pinned {
    pub fn new(first: u32) -> Result<Pinned, Stop> {
        let mut child = unshared(first, &["--user", "--net"])?;
        let dir = World::get()?.dir().join(format!("pin{first}"));
        fs::create_dir_all(&dir)?;
        let pin = |kind: &str| -> Result<PathBuf, Stop> {
            let path = dir.join(kind);
            fs::write(&path, "")?;
            mount_bind(format!("/proc/{}/ns/{kind}", child.id()), &path)?;
            Ok(path)
        };
        let pinned = Pinned {
            user: pin("user")?,
            network: pin("net")?,
        };
        child.kill()?;
        child.wait()?;
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for path in [&self.user, &self.network] {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
    }
}

pub fn lines(first: u32) -> Value {
    json!([{"containerID": 0, "hostID": first, "size": 65536}])
}

fn namespaces(task: &mut Task) -> Result<&mut Vec<Value>, Stop> {
    task.spec["linux"]["namespaces"]
        .as_array_mut()
        .ok_or_else(|| Stop::Fail("no list of namespaces".into()))
}

/// Puts the task into a user namespace with this range; `path` empty: a new one.
pub fn mapped(task: &mut Task, first: u32, path: &Path) -> Outcome {
    let mut namespace = json!({"type": "user"});
    if path != Path::new("") {
        namespace["path"] = json!(path);
    }
    namespaces(task)?.push(namespace);
    task.spec["linux"]["uidMappings"] = lines(first);
    task.spec["linux"]["gidMappings"] = lines(first);
    Ok(())
}

/// The pause task of a pod with these pinned namespaces, running.
pub fn pinned_pod(name: &str, first: u32, pinned: &Pinned) -> Result<Task, Stop> {
    let mut pause = unbooted(name, first, pinned)?;
    pause.boot()?;
    pause.create()?;
    pause.rpc()?.start(&pause.id)?;
    Ok(pause)
}

fn unbooted(name: &str, first: u32, pinned: &Pinned) -> Result<Task, Stop> {
    let mut pause = pod::pause(name)?;
    namespaces(&mut pause)?.retain(|n| n["type"] != "network");
    namespaces(&mut pause)?.push(json!({"type": "network", "path": pinned.network}));
    mapped(&mut pause, first, &pinned.user)?;
    Ok(pause)
}

/// As overlayfs prepares it where it can remap: lower layers as they are, the
/// container's own given to the pod, the mapping among the options.
pub fn remap(task: &mut Task, first: u32) -> Outcome {
    let upper = task.side.join("upper");
    std::os::unix::fs::chown(&upper, Some(first), Some(first))?;
    for mount in &mut task.rootfs {
        mount.options.push(format!("uidmap=0:{first}:65536"));
        mount.options.push(format!("gidmap=0:{first}:65536"));
    }
    // containerd lets the pod's root pass through to the rootfs.
    set_mode(task.bundle(), 0o710)?;
    std::os::unix::fs::chown(task.bundle(), Some(0), Some(first))?;
    Ok(())
}

/// A container of the pod, mapped as CRI writes it, with a remapped rootfs.
pub fn container(pause: &Task, name: &str, first: u32, script: &str) -> Result<Task, Stop> {
    let mut task = pod::container(pause, name, &["/bin/sh", "-c", script])?;
    let pid = pause.rpc()?.state(&pause.id)?.pid;
    mapped(&mut task, first, Path::new(&format!("/proc/{pid}/ns/user")))?;
    remap(&mut task, first)?;
    Ok(task)
}

pub fn running(mut task: Task) -> Result<(Task, u32), Stop> {
    task.boot()?;
    let pid = task.create()?.pid;
    task.rpc()?.start(&task.id)?;
    Ok((task, pid))
}

pub fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn identity(path: impl AsRef<Path>) -> Result<(u64, u64), Stop> {
    let meta = fs::metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// What a pod with chosen ids must be, whoever made the namespace.
fn expect_mapped(pid: u32, first: u32) -> Outcome {
    for map in ["uid_map", "gid_map"] {
        let text = fs::read_to_string(format!("/proc/{pid}/{map}"))?;
        let want = ["0".to_owned(), first.to_string(), "65536".to_owned()];
        ensure_eq!(words(&text), want, "{map} of init, as the host sees it");
    }
    let ids = procs::status_field(pid, "Uid").unwrap_or_default();
    ensure_eq!(
        words(&ids).first().copied().unwrap_or_default(),
        first.to_string(),
        "host uid of the container's root"
    );
    Ok(())
}

fn c119_pinned_user_namespace() -> Outcome {
    casemate_only()?;
    let first = range();
    let pinned = Pinned::new(first)?;
    let pause = pinned_pod("c119", first, &pinned)?;
    let agent = pause.rpc()?.state(&pause.id)?.pid;
    ensure_eq!(
        identity(format!("/proc/{agent}/ns/net"))?,
        identity(&pinned.network)?,
        "network namespace behind the pause task's pid"
    );
    // Every mount that CRI adds has the pod's mapping.
    let volume = pause.side.join("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("hers"), "x")?;
    set_mode(&volume, 0o755)?;
    std::os::unix::fs::chown(volume.join("hers"), Some(1000), Some(1000))?;
    let script = "stat -c %u:%g /etc/passwd /vol /vol/hers; echo x > /new; echo x > /vol/new; \
                  ls /sys/class/net; id -u; echo end; exec sleep 600";
    let mut task = container(&pause, "c119app", first, script)?;
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/vol", "type": "bind", "source": volume,
            "options": ["rbind", "rprivate", "rw"],
            "uidMappings": lines(first), "gidMappings": lines(first)
        }));
    }
    let (task, pid) = running(task)?;
    expect_mapped(pid, first)?;
    task.stdout.until("end", SHORT)?;
    let out = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
    ensure_eq!(
        words(&out),
        ["0:0", "0:0", "1000:1000", "lo", "0", "end"],
        "what the container sees"
    );
    ensure_eq!(
        identity(format!("/proc/{pid}/ns/net"))?,
        identity(&pinned.network)?,
        "the container's network namespace"
    );
    ensure_eq!(fs::metadata(volume.join("new"))?.uid(), 0, "on the volume");
    // Processes that are exec'ed have the same ids.
    let exec = (task.id.as_str(), "more");
    let mut process = task.spec["process"].clone();
    process["args"] = json!(["/bin/probe", "sleep"]);
    task.rpc()?.exec(exec, &process, "", "")?;
    expect_mapped(task.rpc()?.start_exec(exec)?.pid, first)?;
    pod::end(task)?;
    Ok(pause.finish()?)
}

fn c119_network_of_the_pinned_namespace_is_out_of_reach() -> Outcome {
    casemate_only()?;
    let first = range();
    let pinned = Pinned::new(first)?;
    let pause = pinned_pod("c119net", first, &pinned)?;
    let agent = pause.rpc()?.state(&pause.id)?.pid;
    let (task, pid) = running(container(&pause, "c119netapp", first, "exec sleep 600")?)?;
    // All capabilities of the container's namespace, then of the agent's.
    for who in [pid, agent] {
        let refused = on_host(&["enter", "net,user", &who.to_string(), "loopback"]);
        match refused {
            Err(Stop::Fail(why)) if why.contains("not permitted") => {}
            other => return Err(Stop::Fail(format!("{who} changed the network: {other:?}"))),
        }
    }
    // The control: the host can.
    on_host(&["enter", "net", &pid.to_string(), "loopback"])?;
    // Its parameters are the host's to set, and they open ports and ping.
    let read = |name: &str| {
        on_host(&[
            "enter",
            "net",
            &pid.to_string(),
            "read",
            &format!("/proc/sys/net/ipv4/{name}"),
        ])
    };
    ensure_eq!(
        read("ip_unprivileged_port_start")?.trim(),
        "0",
        "ports that need no capability"
    );
    ensure_eq!(
        words(&read("ping_group_range")?),
        [first.to_string(), (first + 65535).to_string()],
        "groups that may ping"
    );
    pod::end(task)?;
    Ok(pause.finish()?)
}

fn c119_paths_are_verified() -> Outcome {
    casemate_only()?;
    let (first, other) = (range(), range());
    let (pinned, others) = (Pinned::new(first)?, Pinned::new(other)?);
    // A namespace that maps something else than the specification says.
    let mut wrong = unbooted("c119map", first, &pinned)?;
    for namespace in namespaces(&mut wrong)? {
        if namespace["type"] == "user" {
            namespace["path"] = json!(others.user);
        }
    }
    expect_no_pod("another mapping", wrong, "must agree")?;
    // The host's own, and something that is none.
    for path in ["/proc/self/ns/user", "/proc/self/ns/net", "/dev/null"] {
        let mut wrong = unbooted("c119bad", first, &pinned)?;
        for namespace in namespaces(&mut wrong)? {
            if namespace["type"] == "user" {
                namespace["path"] = json!(path);
            }
        }
        expect_no_pod(path, wrong, path)?;
    }
    // A network of which somebody else is root.
    let mut wrong = unbooted("c119net", first, &pinned)?;
    for namespace in namespaces(&mut wrong)? {
        if namespace["type"] == "network" {
            namespace["path"] = json!(others.network);
        }
    }
    expect_no_pod("another's network", wrong, "belongs to a user namespace")?;
    // A container that asks for other ids, or another namespace, than its pod.
    let pause = pinned_pod("c119pod", first, &pinned)?;
    for (ids, path, part) in [
        (other, PathBuf::new(), "share the pod's ids"),
        (first, others.user.clone(), "not the pod's own"),
        (
            first,
            PathBuf::from("/proc/self/ns/user"),
            "not the pod's own",
        ),
    ] {
        let mut task = pod::container(&pause, "c119app", &["/bin/probe", "sleep"])?;
        mapped(&mut task, ids, &path)?;
        remap(&mut task, ids)?;
        task.boot()?;
        expect_text("a container of other ids", task.create(), part)?;
        task.forget();
    }
    let mut none = pod::container(&pause, "c119none", &["/bin/probe", "sleep"])?;
    none.boot()?;
    expect_text("a container without ids", none.create(), "no host ids")?;
    none.forget();
    // The pinned one itself is as good as the pause's.
    let mut task = pod::container(&pause, "c119pin", &["/bin/probe", "sleep"])?;
    mapped(&mut task, first, &pinned.user)?;
    remap(&mut task, first)?;
    let (task, pid) = running(task)?;
    expect_mapped(pid, first)?;
    pod::end(task)?;
    Ok(pause.finish()?)
}

fn c119_ranges_are_one_pods() -> Outcome {
    casemate_only()?;
    let first = range();
    let pinned = Pinned::new(first)?;
    let pause = pinned_pod("c119one", first, &pinned)?;
    let second = unbooted("c119two", first, &pinned)?;
    expect_no_pod("a second pod", second, "another living pod's")?;
    let mut straddling = pod::pause("c119three")?;
    mapped(&mut straddling, first + 1000, Path::new(""))?;
    expect_no_pod("a pod beside it", straddling, "another living pod's")?;
    // Ids of the host, and ids that other pods may get.
    for (ids, part) in [(0, "host itself"), (0x7000_0000, "casemate hands out")] {
        let mut wrong = pod::pause("c119ids")?;
        mapped(&mut wrong, ids, Path::new(""))?;
        expect_no_pod("ids of others", wrong, part)?;
    }
    pause.finish()?;
    // Free again, at once.
    let again = pinned_pod("c119again", first, &pinned)?;
    Ok(again.finish()?)
}

fn c120_user_namespace_made_by_the_runtime() -> Outcome {
    casemate_only()?;
    let first = range();
    let mut pause = pod::pause("c120")?;
    mapped(&mut pause, first, Path::new(""))?;
    pause.boot()?;
    let pause_pid = pause.create()?.pid;
    // As CRI does between Create and Start: bind, then the network plugins.
    let created = format!("/proc/{pause_pid}/ns/net");
    ensure!(
        identity(&created)? != identity("/proc/self/ns/net")?,
        "the pod's network is the host's"
    );
    let bound = World::get()?.dir().join(format!("net{first}"));
    fs::write(&bound, "")?;
    mount_bind(&created, &bound)?;
    let checked = (|| -> Outcome {
        let network = identity(&bound)?;
        // Whoever is root of the owner can change it: only the host is.
        let owner = fs::File::from(namespace::owner(fs::File::open(&bound)?)?).metadata()?;
        ensure_eq!(
            (owner.dev(), owner.ino()),
            identity("/proc/self/ns/user")?,
            "owner of the network namespace"
        );
        on_host(&["enter", "net", &pause_pid.to_string(), "loopback"])?;
        pause.rpc()?.start(&pause.id)?;
        ensure_eq!(identity(&created)?, network, "network after Start");
        let map = fs::read_to_string(format!("/proc/{pause_pid}/uid_map"))?;
        ensure!(
            map.lines()
                .any(|l| words(l) == ["0", &first.to_string(), "65536"]),
            "the pod's own namespace maps {map}"
        );
        let script = "stat -c %u:%g /etc/passwd; ls /sys/class/net; echo end; exec sleep 600";
        let (task, pid) = running(container(&pause, "c120app", first, script)?)?;
        expect_mapped(pid, first)?;
        ensure_eq!(
            identity(format!("/proc/{pid}/ns/net"))?,
            network,
            "the container's network"
        );
        task.stdout.until("end", SHORT)?;
        let out = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
        ensure_eq!(words(&out), ["0:0", "lo", "end"], "what the container sees");
        for who in [pid, pause_pid] {
            ensure!(
                on_host(&["enter", "net,user", &who.to_string(), "loopback"]).is_err(),
                "{who} changed the network"
            );
        }
        Ok(pod::end(task)?)
    })();
    unmount(&bound, UnmountFlags::DETACH)?;
    checked?;
    Ok(pause.finish()?)
}

/// Fails unless the pod can't be made, for a reason that has `part` in it.
pub fn expect_no_pod(what: &str, mut pause: Task, part: &str) -> Outcome {
    pause.boot()?;
    expect_text(what, pause.create(), part)?;
    Ok(pause.finish()?)
}
