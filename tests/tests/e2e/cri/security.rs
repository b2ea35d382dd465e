//! Security contexts.

use std::fs;
use std::path::Path;

use casemate_tests::image::oci::sha256;
use casemate_tests::skip::{Outcome, fail};
use casemate_tests::{ensure, ensure_eq, procs, world};
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::*;

use super::Cri;
use super::client::directory;
use super::config::{container, mount, profile, resources, security};

crate::cri_tests![
    users_and_groups,
    read_only_root,
    c127_seccomp_runtime_default,
    seccomp_unconfined_is_still_filtered,
    seccomp_localhost,
    c129_no_new_privileges,
    c132_capabilities,
    c125_masked_paths,
    c126_cgroup_mount,
    c136_no_descriptor_leaks_in,
    c137_binaries_of_the_host,
];

fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn users_and_groups(cri: &Cri) -> Outcome {
    let pod = cri.pod("users")?;
    let script = "id -u; id -g; id -G";
    let out = pod.sh("numbers", script, |c| {
        let security = security(c);
        security.run_as_user = number(1234);
        security.run_as_group = number(2345);
        security.supplemental_groups = vec![3456, 4567];
    })?;
    ensure_eq!(out, "1234\n2345\n2345 3456 4567\n", "by number");
    let out = pod.sh("name", script, |c| {
        security(c).run_as_username = "app".to_owned();
    })?;
    // The image's /etc/group has `app` in `extra`.
    let lines: Vec<&str> = out.lines().collect();
    ensure_eq!(
        lines.get(..2),
        Some(&["1000", "1000"][..]),
        "by name: {out}"
    );
    ensure!(out.contains("2000"), "groups of the image: {out}");
    let out = pod.sh("root", script, |_| ())?;
    ensure!(out.starts_with("0\n0\n"), "root: {out}");
    let mut config = container("high", &["/bin/true"]);
    security(&mut config).run_as_user = number(70_000);
    let why = pod.refusal(config)?;
    ensure!(
        why.contains("70000") && why.contains("65536"),
        "an id out of range: {why}"
    );
    pod.remove()
}

fn read_only_root(cri: &Cri) -> Outcome {
    let dir = directory(cri, "tmp")?;
    let pod = cri.pod("read-only-root")?;
    let script = "touch /file 2>&1 || echo refused; echo ok > /tmp/file; cat /tmp/file";
    let out = pod.sh("app", script, |c| {
        security(c).readonly_rootfs = true;
        c.mounts.push(mount(&dir, "/tmp"));
    })?;
    ensure!(out.ends_with("refused\nok\n"), "{out}");
    ensure!(out.contains("Read-only file system"), "{out}");
    pod.remove()
}

/// The number of filters of a container's first process.
const FILTERS: &str = "grep -E '^Seccomp' /proc/1/status";

fn filters(text: &str) -> u32 {
    procs::field(text, "Seccomp_filters")
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

fn c127_seccomp_runtime_default(cri: &Cri) -> Outcome {
    let pod = cri.pod("seccomp-default")?;
    let with = pod.sh("with", FILTERS, |_| ())?;
    let without = pod.sh("without", FILTERS, |c| {
        security(c).seccomp = profile(ProfileType::Unconfined, Path::new(""));
    })?;
    ensure!(with.contains("Seccomp:\t2"), "mode: {with}");
    ensure_eq!(
        filters(&with),
        filters(&without) + 1,
        "{with} and {without}"
    );
    let script = "mount -t tmpfs none /tmp 2>&1; unshare -m true 2>&1; echo done";
    let out = pod.sh("calls", script, |_| ())?;
    // busybox has words of its own for EPERM.
    for word in [
        "mount: permission denied",
        "unshare(0x20000): Operation not permitted",
    ] {
        ensure!(out.contains(word), "mount and unshare: {out}");
    }
    pod.remove()
}

fn seccomp_unconfined_is_still_filtered(cri: &Cri) -> Outcome {
    let pod = cri.pod("seccomp-none")?;
    let script = format!("{FILTERS}; mount -t tmpfs none /tmp && echo mounted; echo done");
    let out = pod.sh("app", &script, |c| {
        security(c).seccomp = profile(ProfileType::Unconfined, Path::new(""));
    })?;
    ensure!(filters(&out) >= 2, "filters: {out}");
    ensure!(!out.contains("mounted"), "a mount: {out}");
    pod.remove()
}

fn seccomp_localhost(cri: &Cri) -> Outcome {
    let file = directory(cri, "profile")?.join("no-mkdir.json");
    let rules = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{
            "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28
        }]
    });
    fs::write(&file, rules.to_string())?;
    let pod = cri.pod("seccomp-file")?;
    let out = pod.sh("app", "mkdir /tmp/d 2>&1 || echo refused", |c| {
        security(c).seccomp = profile(ProfileType::Localhost, &file);
    })?;
    ensure!(
        out.contains("No space left on device"),
        "errno of the profile: {out}"
    );
    ensure!(out.ends_with("refused\n"), "{out}");
    ensure_eq!(
        pod.sh("plain", "mkdir /tmp/d; echo ok", |_| ())?,
        "ok\n",
        "beside it"
    );
    pod.remove()
}

fn c129_no_new_privileges(cri: &Cri) -> Outcome {
    let pod = cri.pod("privileges")?;
    for asked in [true, false] {
        let script = "grep NoNewPrivs /proc/self/status";
        let out = pod.sh(if asked { "with" } else { "without" }, script, |c| {
            security(c).no_new_privs = asked;
        })?;
        // The profiles `default` and `strict` set it whatever is asked for.
        ensure_eq!(out, "NoNewPrivs:\t1\n", "asked for: {asked}");
    }
    pod.remove()
}

fn c132_capabilities(cri: &Cri) -> Outcome {
    let pod = cri.pod("capabilities")?;
    let script = "grep Cap /proc/self/status";
    let sets = |name: &str, add: &[&str], drop: &[&str]| {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let wanted = Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            ..Default::default()
        };
        pod.sh(name, script, |c| security(c).capabilities = Some(wanted))
    };
    let none = sets("none", &[], &["ALL"])?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let value = procs::field(&none, set);
        ensure_eq!(value.as_deref(), Some("0000000000000000"), "{set}: {none}");
    }
    let one = sets("one", &["CHOWN"], &["ALL"])?;
    ensure_eq!(
        procs::field(&one, "CapEff").as_deref(),
        Some("0000000000000001"),
        "CHOWN alone: {one}"
    );
    // What policy doesn't grant is not granted, and who asks is told.
    let mut all = container("all", &["/bin/true"]);
    security(&mut all).capabilities = Some(Capability {
        add_capabilities: vec!["ALL".to_owned()],
        ..Default::default()
    });
    let why = pod.refusal(all)?;
    ensure!(
        why.contains("these capabilities are refused") && why.contains("CAP_NET_ADMIN"),
        "{why}"
    );
    pod.remove()
}

fn c125_masked_paths(cri: &Cri) -> Outcome {
    let pod = cri.pod("masks")?;
    let script = "grep -c ' /proc/keys ' /proc/self/mounts; ls -A /sys/firmware | wc -l; \
                  grep ' /proc/sys ' /proc/self/mounts | cut -d' ' -f4 | cut -c1-2";
    let out = pod.sh("masked", script, |_| ())?;
    ensure_eq!(out, "1\n0\nro\n", "with the kubelet's lists");
    // The sandbox's own lists hold even when none are asked for.
    let out = pod.sh("unmasked", script, |c| {
        security(c).masked_paths.clear();
        security(c).readonly_paths.clear();
    })?;
    ensure_eq!(out, "1\n0\nro\n", "with empty lists");
    pod.remove()
}

fn c126_cgroup_mount(cri: &Cri) -> Outcome {
    let pod = cri.pod("cgroup")?;
    let script = "mkdir /sys/fs/cgroup/own 2>&1 && echo made; \
                  cat /proc/self/cgroup; echo; grep ' cgroup2* ' /proc/self/mounts; echo; \
                  cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes \
                  2>/dev/null; true";
    let out = pod.sh("app", script, |c| {
        resources(c).memory_limit_in_bytes = 96 << 20;
    })?;
    let parts: Vec<&str> = out.split("\n\n").collect();
    let [own, mounts, limit] = parts.as_slice() else {
        return fail(format!("output {out}"));
    };
    ensure!(!own.contains("made"), "a cgroup was made: {own}");
    let paths = own.lines().filter(|l| l.matches(':').count() == 2);
    for line in paths.filter(|l| !l.contains("mkdir")) {
        ensure!(line.ends_with(":/"), "not at its root: {line}");
    }
    ensure!(!mounts.is_empty(), "no cgroup is mounted: {out}");
    for line in mounts.lines() {
        let options = line.split(' ').nth(3).unwrap_or_default();
        ensure!(options.split(',').any(|o| o == "ro"), "writable: {line}");
    }
    ensure_eq!(limit.trim(), (96u32 << 20).to_string(), "its own limit");
    pod.remove()
}

fn c136_no_descriptor_leaks_in(cri: &Cri) -> Outcome {
    let pod = cri.pod("descriptors")?;
    let ran = pod.to_end(container("app", &["/bin/probe", "fds"]))?;
    let id = pod.sleeper("sleeper")?;
    let exec = pod.exec(&id, &["/bin/probe", "fds"])?;
    for out in [&ran.out, &exec.out] {
        let open: Vec<&str> = out
            .lines()
            .filter_map(|l| l.split_whitespace().next())
            .collect();
        ensure_eq!(open, ["0", "1", "2"], "descriptors {out}");
    }
    pod.remove()
}

/// A script whose interpreter is whatever executes it, and writes to every
/// program that can be seen.
fn c137_binaries_of_the_host(cri: &Cri) -> Outcome {
    let binaries = ["casemate-agent", "containerd-shim-casemate-v2"];
    let read = || -> std::io::Result<Vec<String>> {
        let path = |name: &&str| fs::read(world::binaries().join(name));
        let all: std::io::Result<Vec<Vec<u8>>> = binaries.iter().map(path).collect();
        Ok(all?.iter().map(|bytes| sha256(bytes)).collect())
    };
    let before = read()?;
    let dir = directory(cri, "scripts")?;
    let script = dir.join("again");
    fs::write(&script, "#!/proc/self/exe\n")?;
    world::set_mode(&script, 0o755)?;
    let pod = cri.pod("binaries")?;
    let mut config = container("again", &["/v/again"]);
    config.mounts.push(mount(&dir, "/v"));
    // It may be refused or end by itself; it must not run as what it isn't.
    if let Ok(id) = pod.create(config)
        && pod.start(&id).is_ok()
    {
        ensure!(pod.ended(&id)?.exit_code != 0, "the script succeeded");
    }
    let script = "for p in /proc/[0-9]*/exe /proc/self/exe; do \
                  (echo broken > $p) 2>/dev/null && echo written $p; done; true";
    let id = pod.sleeper("sleeper")?;
    ensure_eq!(pod.exec_sh(&id, script)?, "", "programs written to");
    ensure_eq!(read()?, before, "the host's binaries");
    pod.remove()
}
