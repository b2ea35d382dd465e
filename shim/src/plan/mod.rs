//! Tightened spec → launch plan. Pure: names in, numbers out.

use std::collections::BTreeMap;

use casemate_protocol::plan::{
    HookPlan, LaunchPlan, Limit, Mount, MountSource, PodPlan, ProcessPlan, TerminalSize,
};
use casemate_spec::{
    Atime, Config, DeviceSpec, HookSpec, MountAttrs, MountKind, MountSpec, ProcessSpec, Profile,
    Tightened,
};
use casemate_sys::mount::attr;

use crate::sandbox::SandboxError;

/// The mount option that gives all files one label.
pub const CONTEXT: &str = "context";

/// What the shim has to make for one entry of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Staged {
    /// /dev with these options, attributes and devices beside the default ones.
    Dev(Vec<(String, Option<String>)>, u64, Vec<DeviceSpec>),
    /// /sys of the pod's network.
    Sysfs,
    /// A bind of the host, with its number among the mounts.
    Bind(usize, MountSpec),
    /// The container's cgroups, v1.
    CgroupV1,
}

/// A plan, and what must be staged for it: (name, what).
pub struct Launch {
    /// For the agent.
    pub plan: LaunchPlan,
    /// For the host side.
    pub staged: Vec<(String, Staged)>,
}

/// A shipped profile, compiled.
pub fn program(name: &str) -> Result<Vec<u8>, SandboxError> {
    seccomp_profiles::shipped_program(name)
        .map(<[u8]>::to_vec)
        .ok_or_else(|| SandboxError::Failed(format!("profile \"{name}\" isn't in this binary")))
}

/// The pod's part.
pub fn pod(spec: &Tightened, pod_id: &str) -> Result<PodPlan, SandboxError> {
    let hostname: String = match &spec.hostname {
        Some(name) if !name.is_empty() => name.clone(),
        // Not the node's own, which a new UTS namespace starts with.
        _ => pod_id.chars().take(63).collect(),
    };
    Ok(PodPlan {
        hostname,
        domainname: spec.domainname.clone().unwrap_or_default(),
        sysctls: spec
            .sysctl
            .iter()
            .filter(|(name, _)| !name.starts_with("net."))
            .map(|(name, value)| (name.replace('.', "/"), value.clone()))
            .collect(),
        filter: program("agent")?,
    })
}

/// The container's part. `staging` names its directory there.
pub fn container(
    spec: &Tightened,
    config: &Config,
    staging: &str,
    landlock: bool,
    cgroup_v2: bool,
) -> Result<Launch, SandboxError> {
    let mut staged = Vec::new();
    let mut mounts = Vec::new();
    let mut has_dev = false;
    for (i, mount) in spec.mounts.iter().enumerate() {
        let attributes = attributes(&mount.flags.attrs);
        let mut stage = |name: String, what: Staged, directory: bool, recursive: bool| {
            staged.push((name.clone(), what));
            MountSource::Staged {
                name,
                directory,
                recursive,
            }
        };
        let source = match mount.kind {
            MountKind::Bind => {
                // Whether it is a directory is known when it is opened.
                stage(
                    format!("m{i}"),
                    Staged::Bind(i, mount.clone()),
                    true,
                    mount.flags.rbind,
                )
            }
            MountKind::Tmpfs if mount.destination == "/dev" => {
                has_dev = true;
                let data = labelled(mount.flags.data.clone(), spec);
                let what = Staged::Dev(data, attributes, spec.devices.clone());
                stage("dev".into(), what, true, false)
            }
            MountKind::Sysfs => stage("sys".into(), Staged::Sysfs, true, false),
            MountKind::Cgroup if !cgroup_v2 => stage("cgroup".into(), Staged::CgroupV1, true, true),
            MountKind::Cgroup => new("cgroup2", Vec::new()),
            MountKind::Proc => new("proc", Vec::new()),
            MountKind::Mqueue => new("mqueue", Vec::new()),
            MountKind::Tmpfs => new("tmpfs", labelled(tmpfs_options(&mount.flags.data), spec)),
            MountKind::Devpts => new("devpts", labelled(devpts_options(&mount.flags.data), spec)),
        };
        mounts.push(Mount {
            target: mount.destination.clone(),
            source,
            attributes,
            receives: mount.kind == MountKind::Bind && mount.receives(),
        });
    }
    if !has_dev {
        // Masks need the real null device, and no program expects to live
        // without /dev: runc's callers always send it, others get it too.
        staged.insert(
            0,
            (
                "dev".into(),
                Staged::Dev(
                    labelled(Vec::new(), spec),
                    attr::STRICTATIME,
                    spec.devices.clone(),
                ),
            ),
        );
        let source = MountSource::Staged {
            name: "dev".into(),
            directory: true,
            recursive: false,
        };
        mounts.insert(
            0,
            Mount {
                target: "/dev".into(),
                source,
                attributes: 0,
                receives: false,
            },
        );
    }
    let process = &spec.process;
    let plan = LaunchPlan {
        staging: staging.to_owned(),
        mounts,
        masked: spec.masked_paths.clone(),
        readonly: spec.readonly_paths.clone(),
        readonly_root: spec.readonly_rootfs,
        bounding: process.caps.bounding,
        filter: Vec::new(),
        landlock,
        older_kernel: config.kernel.older_ways,
        landlock_reads: spec.effective.profile == Profile::Strict,
        no_new_privs: process.no_new_privs,
        cwd: process.cwd.clone(),
        console: process.terminal.then_some(process.uid),
        time_namespace: spec.clocks.is_some(),
        wait_before_root: spec.hooks.wait_before_root(),
        hooks: spec.hooks.create_container.iter().map(hook).collect(),
        own_filters: false,
        joins_pids: false,
        shares_network: false,
        asks: Vec::new(),
        connect_ports: None,
        listen_ports: None,
        learns: Vec::new(),
        closes: Vec::new(),
    };
    Ok(Launch { plan, staged })
}

/// Whether a filter of its own needs a capability: without no_new_privs.
fn own_filter(process: &ProcessSpec) -> bool {
    !process.no_new_privs
}

fn hook(spec: &HookSpec) -> HookPlan {
    HookPlan {
        name: format!("{} ({})", spec.field, spec.path),
        args: spec.args.clone(),
        env: spec.env.clone(),
        timeout: spec.timeout,
    }
}

/// A hook inside of the container, before its `init` executes: as its user,
/// with its locks.
pub fn start_hook(hook: &HookSpec, init: &ProcessPlan) -> ProcessPlan {
    ProcessPlan {
        args: hook.args.clone(),
        env: hook.env.clone(),
        path: hook.path.clone(),
        cwd: "/".into(),
        terminal: None,
        ..init.clone()
    }
}

fn new(fstype: &str, options: Vec<(String, Option<String>)>) -> MountSource {
    MountSource::New {
        fstype: fstype.to_owned(),
        options,
    }
}

/// Ids in options are the container's; the mount is made in A, where they are
/// one higher.
fn shift(value: &str) -> String {
    value
        .parse::<u32>()
        .map_or_else(|_| value.to_owned(), |id| (id + 1).to_string())
}

fn tmpfs_options(data: &[(String, Option<String>)]) -> Vec<(String, Option<String>)> {
    data.iter()
        // Only the host's root may pin or prefer memory.
        .filter(|(key, _)| key != "noswap")
        .map(|(key, value)| match key.as_str() {
            "uid" | "gid" => (key.clone(), value.as_deref().map(shift)),
            _ => (key.clone(), value.clone()),
        })
        .collect()
}

/// With `linux.mountLabel`, for the types that SELinux lets be labelled in a
/// user namespace.
fn labelled(
    mut options: Vec<(String, Option<String>)>,
    spec: &Tightened,
) -> Vec<(String, Option<String>)> {
    let label = spec.mount_label.clone();
    options.extend(label.map(|label| (CONTEXT.to_owned(), Some(label))));
    options
}

fn devpts_options(data: &[(String, Option<String>)]) -> Vec<(String, Option<String>)> {
    let mut options: BTreeMap<String, Option<String>> = BTreeMap::new();
    options.insert("ptmxmode".into(), Some("0666".into()));
    options.insert("mode".into(), Some("0620".into()));
    for (key, value) in data {
        match key.as_str() {
            "newinstance" => {}
            "uid" | "gid" => {
                options.insert(key.clone(), value.as_deref().map(shift));
            }
            _ => {
                options.insert(key.clone(), value.clone());
            }
        }
    }
    options.into_iter().collect()
}

/// `MOUNT_ATTR_*` bits of a spec's flags.
pub fn attributes(attrs: &MountAttrs) -> u64 {
    let mut bits = 0;
    for (on, bit) in [
        (attrs.ro, attr::RDONLY),
        (attrs.nosuid, attr::NOSUID),
        (attrs.nodev, attr::NODEV),
        (attrs.noexec, attr::NOEXEC),
        (attrs.nosymfollow, attr::NOSYMFOLLOW),
        (attrs.nodiratime, attr::NODIRATIME),
    ] {
        if on {
            bits |= bit;
        }
    }
    bits | match attrs.atime {
        Some(Atime::Never) => attr::NOATIME,
        Some(Atime::Strict) => attr::STRICTATIME,
        Some(Atime::Relative) | None => 0,
    }
}

/// `MOUNT_ATTR_*` bits that must be cleared where [`attributes`] are set on a
/// mount that exists: its policy of access times is one of several
/// (mount_setattr(2)).
pub fn cleared_attributes(attrs: &MountAttrs) -> u64 {
    if attrs.atime.is_some() {
        attr::ATIME_MASK
    } else {
        0
    }
}

/// A process' part. `filter` is the spec's own, compiled.
pub fn process(spec: &ProcessSpec, filter: &(Vec<u8>, u32)) -> ProcessPlan {
    ProcessPlan {
        args: spec.args.clone(),
        env: spec.env.clone(),
        cwd: spec.cwd.clone(),
        uid: spec.uid,
        gid: spec.gid,
        groups: spec.additional_gids.clone(),
        umask: spec.umask,
        permitted: spec.caps.permitted,
        effective: spec.caps.effective,
        inheritable: spec.caps.inheritable,
        ambient: spec.caps.ambient,
        limits: spec
            .rlimits
            .iter()
            .map(|l| Limit {
                resource: l.resource,
                soft: l.soft,
                hard: l.hard,
            })
            .collect(),
        terminal: spec.terminal.then(|| {
            let (rows, columns) = spec.console_size.unwrap_or((0, 0));
            TerminalSize { rows, columns }
        }),
        filter: filter.0.clone(),
        filter_flags: filter.1,
        scheduler: spec.schedule.scheduler,
        io_priority: spec.schedule.io_priority,
        cpus: Vec::new(),
        path: String::new(),
        keep_for_filter: own_filter(spec) && !filter.0.is_empty(),
        drop_bounding: 0,
        no_new_privs: spec.no_new_privs,
        apparmor: spec.apparmor_profile.clone().unwrap_or_default(),
        selinux: spec.selinux_label.clone().unwrap_or_default(),
    }
}

fn without_tracer(filter: &mut seccomp_profiles::oci::OciSeccomp) {
    const TRACE: &str = "SCMP_ACT_TRACE";
    let answer = |action: &mut String, errno: &mut Option<u32>| {
        if action == TRACE {
            "SCMP_ACT_ERRNO".clone_into(action);
            *errno = Some(libc::ENOSYS.unsigned_abs());
        }
    };
    answer(&mut filter.default_action, &mut filter.default_errno_ret);
    for rule in &mut filter.syscalls {
        answer(&mut rule.action, &mut rule.errno_ret);
    }
}

/// The spec's own filter: byte code and flags; empty when there is none. With
/// `learn` there is a filter that asks beside it, whose questions go before what a
/// tracer is asked: so the error that is the answer without a tracer, which nobody
/// inside can be, is said as an error.
pub fn filter(
    raw: Option<&serde_json::Value>,
    learn: bool,
) -> Result<(Vec<u8>, u32), SandboxError> {
    let Some(raw) = raw else {
        return Ok((Vec::new(), 0));
    };
    let invalid = |e: String| SandboxError::Invalid(format!("linux.seccomp: {e}"));
    let mut parsed: seccomp_profiles::oci::OciSeccomp =
        serde_json::from_value(raw.clone()).map_err(|e| invalid(e.to_string()))?;
    if learn {
        without_tracer(&mut parsed);
    }
    let compiled = seccomp_profiles::oci::compile(&parsed).map_err(|e| invalid(e.to_string()))?;
    for warning in &compiled.warnings {
        log::warn!("linux.seccomp: {warning}");
    }
    if compiled.listener {
        return Err(invalid(
            "SCMP_ACT_NOTIFY needs a listener, which isn't supported; use SCMP_ACT_ERRNO".into(),
        ));
    }
    Ok((compiled.program.to_bytes(), compiled.flags))
}
