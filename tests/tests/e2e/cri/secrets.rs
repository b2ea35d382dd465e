//! Volumes with secrets, at paths of the kubelet's form; tokens; core dumps.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use casemate_tests::run::run;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, world};
use k8s_cri::v1::ContainerConfig;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::Cri;
use super::client::{Pod, directory};
use super::config::{self, container, mount};
use super::volumes::Memory;
use crate::common::casemate_only;

crate::cri_tests![
    secret_volumes_are_locked,
    secret_tokens_are_withheld,
    secret_memory_is_not_dumped,
];

const TOKENS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const SCRIPT: &str = "#!/bin/sh\necho ran\n";

/// A volume in memory as the kubelet has it, with a program in it.
fn volume(pod: &Path, kind: &str, name: &str) -> Result<Memory, Stop> {
    let path = pod.join("volumes").join(kind).join(name);
    let memory = Memory::new(path.clone())?;
    fs::create_dir(path.join("inner"))?;
    for file in ["run", "inner/run"] {
        fs::write(path.join(file), SCRIPT)?;
        world::set_mode(&path.join(file), 0o755)?;
    }
    Ok(memory)
}

/// A bind that goes when dropped.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: PathBuf) -> Result<Bound, Stop> {
        fs::create_dir_all(&to)?;
        mount_bind(from, &to)?;
        Ok(Bound(to))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Flags of the mount at a place, as the container's own list has them.
fn flags(pod: &Pod<'_>, id: &str, place: &str) -> Result<Vec<String>, Stop> {
    let list = pod.exec_sh(id, "cat /proc/self/mountinfo")?;
    let fields = list
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|f| f.get(4) == Some(&place));
    match fields.as_ref().and_then(|f| f.get(5)) {
        Some(flags) => Ok(flags.split(',').map(str::to_owned).collect()),
        None => fail(format!("{place} isn't mounted: {list}")),
    }
}

fn secret_volumes_are_locked(cri: &Cri) -> Outcome {
    casemate_only()?;
    let kubelet = directory(cri, "kubelet")?.join("pods/0c1");
    let _volumes = [
        volume(&kubelet, "kubernetes.io~secret", "key")?,
        volume(&kubelet, "kubernetes.io~projected", "all")?,
        volume(&kubelet, "kubernetes.io~configmap", "conf")?,
        volume(&kubelet, "kubernetes.io~empty-dir", "data")?,
    ];
    let of = |kind: &str| kubelet.join("volumes").join(kind);
    let secret = of("kubernetes.io~secret/key");
    // A mount below a volume, and a sub path of one.
    let _below = Memory::new(secret.join("below"))?;
    let sub = Bound::new(
        &secret.join("inner"),
        kubelet.join("volume-subpaths/key/app/0"),
    )?;
    let pod = cri.pod("secrets")?;
    let mut config = container("app", &["/bin/probe", "sleep"]);
    for (source, place) in [
        (&secret, "/secret"),
        (&of("kubernetes.io~projected/all"), "/projected"),
        (&of("kubernetes.io~configmap/conf"), "/conf"),
        (&of("kubernetes.io~empty-dir/data"), "/data"),
        (&sub.0, "/sub"),
    ] {
        config.mounts.push(mount(source, place));
    }
    let id = pod.run(config)?;
    for (place, wanted, runs) in [
        ("/secret", &["ro", "nosuid", "nodev", "noexec"][..], false),
        ("/secret/below", &["ro", "nosuid", "nodev", "noexec"], false),
        ("/projected", &["ro", "nosuid", "nodev", "noexec"], false),
        ("/sub", &["ro", "nosuid", "nodev", "noexec"], false),
        // Programs come in these.
        ("/conf", &["ro", "nosuid", "nodev"], true),
        ("/data", &["rw", "nosuid", "nodev"], true),
    ] {
        let has = flags(&pod, &id, place)?;
        for flag in wanted {
            ensure!(has.iter().any(|f| f == flag), "{place}: {flag} in {has:?}");
        }
        if place == "/secret/below" {
            continue;
        }
        let ran = pod.exec(&id, &["/bin/sh", "-c", &format!("{place}/run")])?;
        ensure_eq!(ran.code == 0, runs, "a program in {place}: {ran:?}");
        let ran = pod.exec(&id, &["/bin/touch", &format!("{place}/new")])?;
        ensure_eq!(
            ran.code == 0,
            place == "/data",
            "a file in {place}: {ran:?}"
        );
    }
    // With all capabilities of the containers' user namespace, from the host.
    let pid = pod.pid(&id)?.to_string();
    let places = ["/secret", "/secret/below", "/projected", "/sub", "/conf"];
    let mut enter = Command::new(world::probe()?);
    enter
        .args(["enter", "mnt,user", &pid, "flags"])
        .args(places);
    let text = run(&mut enter, &[], Duration::from_secs(10))?.ok()?.out();
    ensure_eq!(text.lines().count(), places.len() * 3, "answers: {text}");
    for line in text.lines() {
        ensure!(line.ends_with(" EPERM"), "{line}");
    }
    pod.remove()
}

fn with_token(memory: &Memory) -> impl Fn(&mut ContainerConfig) {
    let source = memory.0.clone();
    move |c| c.mounts.push(mount(&source, TOKENS))
}

fn secret_tokens_are_withheld(cri: &Cri) -> Outcome {
    casemate_only()?;
    let kubelet = directory(cri, "tokens")?.join("pods/0c2");
    let memory = volume(&kubelet, "kubernetes.io~projected", "kube-api-access-x2v9k")?;
    fs::write(memory.0.join("token"), "secret\n")?;
    world::set_mode(&memory.0.join("token"), 0o644)?;
    let script = format!("ls -A {TOKENS}; cat {TOKENS}/token 2>/dev/null; touch {TOKENS}/x 2>&1");
    let look = |pod: &Pod<'_>| -> Result<String, Stop> {
        let mut config = container("app", &["/bin/sh", "-c", &script]);
        with_token(&memory)(&mut config);
        Ok(pod.to_end(config)?.out)
    };
    let pod = cri.pod("token-given")?;
    let out = look(&pod)?;
    ensure!(out.contains("secret\n"), "as it is by default: {out}");
    pod.remove()?;
    let mut config = config::pod(cri, "token-withheld");
    let key = "casemate.io/service-account-token".to_owned();
    config.annotations.insert(key, "withhold".to_owned());
    let pod = cri.pod_with(config)?;
    let out = look(&pod)?;
    let (empty, touched) = out.split_once("touch").unwrap_or((&out, ""));
    ensure_eq!(empty, "", "the directory: {out}");
    ensure!(touched.contains("Read-only"), "written to: {out}");
    pod.remove()
}

/// Soft and hard limit of core dumps.
fn core(pid: u32) -> Result<String, Stop> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find(|l| l.starts_with("Max core file size"));
    let limit = line.unwrap_or_default().split_whitespace().skip(4);
    Ok(limit.take(2).collect::<Vec<_>>().join(" "))
}

fn parent(pid: u32) -> Result<u32, Stop> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("PPid:\t"));
    match line.and_then(|n| n.trim().parse().ok()) {
        Some(pid) => Ok(pid),
        None => fail(format!("parent of {pid}: {status}")),
    }
}

/// 1 is the kernel's word for neither a file nor a handler on the host.
fn secret_memory_is_not_dumped(cri: &Cri) -> Outcome {
    casemate_only()?;
    let pod = cri.pod("no-core")?;
    let id = pod.sleeper("app")?;
    let init = pod.pid(&id)?;
    let forker = parent(init)?;
    let agent = parent(forker)?;
    for (who, pid) in [("init", init), ("forker", forker), ("agent", agent)] {
        ensure_eq!(core(pid)?, "1 1", "{who}'s limit of core dumps");
    }
    // Programs that set it are told that all went well, and it stays: with 0 the
    // kernel would call the node's handler.
    let out = pod.exec_sh(
        &id,
        "set -e; ulimit -c unlimited; ulimit -c 0; cd /; \
         while read -r line; do case $line in \"Max core\"*) echo $line;; esac; done \
         </proc/self/limits; \
         mkdir /dumps; cd /dumps; sh -c 'kill -SEGV $$' 2>/dev/null || ls",
    )?;
    ensure_eq!(
        out,
        "Max core file size 1 1 bytes\n",
        "the limit, and after a crash"
    );
    pod.remove()
}
