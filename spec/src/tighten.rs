//! From a specification to what will be started, or a refusal.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceType, LinuxPersonalityDomain, LinuxResources, Spec,
};
use serde_json::Value;

use crate::annotations::{Annotations, Effective, NodeProfile};
use crate::caps::{self, Caps};
use crate::clock::{self, ClockOffset};
use crate::config::{self, Beyond, Config, Sandbox};
use crate::devices::{self, DeviceSpec, NodeDevice};
use crate::error::{Refusal, one_line};
use crate::hooks::{self, HookSpecs};
use crate::host_paths::Owner;
use crate::images;
use crate::journal::{Decision, Journal};
use crate::label::{self, Lsm};
use crate::load::{Loaded, PodIdentity};
use crate::mount::{self, MountSpec, PropagationKind};
use crate::network_rules;
use crate::paths::{plain, plain_absolute};
use crate::process::{self, ProcessSpec};
use crate::resources;
use crate::rules::{
    CAPABILITY, CGROUP_PATH, HOST_IPC, HOST_MOUNT, HOST_NETWORK, HOST_PID, NAMESPACE_LIST, PATH,
    PERSONALITY, PRIVILEGED, PROCESS, ROOTFS_PROPAGATION, Rule, UNSUPPORTED,
};
use crate::schedule;
use crate::secrets;
use crate::sysctls;
use crate::tightenings::{self, Tightening};
use crate::users::{self, PodUsers};

/// Facts of the moment that the specification doesn't hold.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The container's id: the default of `linux.cgroupsPath`.
    pub id: &'a str,
    /// The node can confine by the AppArmor profile asked for.
    pub apparmor: Lsm<'a>,
    /// The node can confine by the SELinux labels asked for.
    pub selinux: Lsm<'a>,
    /// The node's devices at the paths of `devices.allow`.
    pub devices: &'a [NodeDevice],
    /// For a container of a pod: what the pod's own annotations say.
    pub pod: Option<&'a Annotations>,
    /// Profiles that the node has beside the shipped ones.
    pub profiles: &'a [NodeProfile],
}

/// Where a namespace comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// Of its own.
    New,
    /// The one at this path, as the host sees it.
    Path(String),
    /// The host's: of the network alone, where the configuration allows it.
    Host,
}

/// Namespaces of the container. Mount, user and cgroup are always its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// See network_namespaces(7).
    pub network: Namespace,
    /// See pid_namespaces(7).
    pub pid: Namespace,
    /// See ipc_namespaces(7).
    pub ipc: Namespace,
    /// See uts_namespaces(7).
    pub uts: Namespace,
}

/// Everything the launch planner needs.
#[derive(Debug, Clone)]
pub struct Tightened {
    /// `ociVersion`.
    pub oci_version: String,
    /// Whose container this is.
    pub pod: PodIdentity,
    /// By what its own directories on the node are known.
    pub owner: Owner,
    /// The first process.
    pub process: ProcessSpec,
    /// `hostname`.
    pub hostname: Option<String>,
    /// `domainname`.
    pub domainname: Option<String>,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Host ids, where they aren't casemate's choice.
    pub users: Option<PodUsers>,
    /// Mounts in order.
    pub mounts: Vec<MountSpec>,
    /// Absolute paths to hide.
    pub masked_paths: Vec<String>,
    /// Absolute paths to make read-only.
    pub readonly_paths: Vec<String>,
    /// `root.readonly`.
    pub readonly_rootfs: bool,
    /// `root.path`: absolute, or relative to the bundle.
    pub root_path: String,
    /// `linux.rootfsPropagation`; never shared.
    pub rootfs_propagation: Option<PropagationKind>,
    /// Limits.
    pub resources: Option<LinuxResources>,
    /// A path, or `slice:prefix:name` for the systemd driver.
    pub cgroups_path: String,
    /// Names with dots, as written.
    pub sysctl: BTreeMap<String, String>,
    /// Devices beside the default ones.
    pub devices: Vec<DeviceSpec>,
    /// Offsets of the clocks, where a time namespace is asked for.
    pub clocks: Option<Vec<ClockOffset>>,
    /// Programs to run at turns of the container's life.
    pub hooks: HookSpecs,
    /// `linux.mountLabel`: of the file systems that are made for the container.
    pub mount_label: Option<String>,
    /// `linux.seccomp`, as written.
    pub seccomp: Option<Value>,
    /// `annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Those that are ours, with the pod's.
    pub asked: Annotations,
    /// What the configuration and they come to.
    pub effective: Effective,
    /// All capabilities that the document names, granted or not.
    pub asked_capabilities: u64,
    /// What was changed or dropped, one line each.
    pub warnings: Vec<String>,
    /// What became of each field that the specification sets.
    pub decisions: Vec<Decision>,
}

/// Paths that are hidden in every container, whatever the specification says:
/// the kernel's own state of the node.
const MASKED: [&str; 12] = [
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
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Paths that are read-only in every container.
const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Applies the policy.
///
/// # Errors
/// The first rule that refuses it.
pub fn tighten(
    loaded: Loaded,
    config: &Config,
    context: &Context<'_>,
) -> Result<Tightened, Refusal> {
    let owner = Owner::of(&loaded);
    let Loaded {
        spec,
        seccomp,
        annotations,
        warnings,
        fields,
        pod,
    } = loaded;
    // Not `Linux::default()`: oci-spec's has namespaces.
    let Some(linux) = spec.linux() else {
        return Err(Refusal::new(&NAMESPACE_LIST, "linux", "missing"));
    };

    // What a person most likely did comes first, as that is what they read.
    refuse_privileged(&spec, linux)?;
    let namespaces = namespaces(linux, &config.sandbox)?;
    images::check(&pod, &config.images)?;
    let mut asked = Annotations::read(&annotations)?;
    if let Some(pod) = context.pod {
        asked = asked.within(pod)?;
    }
    let effective = asked.under(config, context.profiles)?;
    network_rules::lists(
        asked.egress.as_deref(),
        asked.ingress.as_deref(),
        namespaces.network == Namespace::Host,
    )?;
    let mut journal = Journal::new(&fields, warnings)?;
    let users = users::check(linux, &config.ids)?;
    if !(spec.version().is_empty() || spec.version().starts_with("1.")) {
        return Err(Refusal::new(
            &UNSUPPORTED,
            "ociVersion",
            format!("{} is not 1.x", spec.version()),
        ));
    }
    if seccomp.is_some() {
        journal.tighten(
            tightenings::SECCOMP,
            "intersected with the sandbox's own profile",
        );
    }
    if !names(linux, LinuxNamespaceType::Uts) {
        journal.tighten(
            tightenings::UTS,
            "a uts namespace is made though none is asked for",
        );
    }

    let Some(process) = spec.process() else {
        return Err(Refusal::new(
            &PROCESS,
            "process",
            "missing, so there is nothing to run",
        ));
    };
    let force = effective.profile.forces_no_new_privs();
    let schedule = schedule::check(process, effective.profile)?;
    let asked_capabilities = process
        .capabilities()
        .as_ref()
        .map(|sets| Caps::from(sets).union())
        .unwrap_or_default();
    refuse_capabilities(asked_capabilities, effective.capabilities, config)?;
    let mut process = process::check(process, effective.capabilities, force, &mut journal)?;
    secrets::no_core_dumps(&mut process, &config.secrets, &mut journal);
    let process = ProcessSpec {
        schedule,
        ..process
    };
    let mount_label = label::check(&process, linux, context)?;
    personality(linux)?;

    let mut mounts = Vec::new();
    for (i, mount) in spec.mounts().iter().flatten().enumerate() {
        let (mut mount, notes) = mount::check(mount, i, force, users.as_ref())?;
        for note in notes {
            journal.tighten(tightenings::MOUNT_OPTIONS, &note);
        }
        let withheld = secrets::apply(&mut mount, &config.secrets, asked.withhold_token);
        if let Some(note) = withheld {
            journal.tighten(tightenings::TOKEN, &note);
        }
        mounts.push(mount);
    }
    let Some(root) = spec.root() else {
        return Err(Refusal::new(&PATH, "root", "missing"));
    };
    let written = root.path().to_string_lossy();
    let root_path = match plain(&written) {
        Ok(rest) if written.starts_with('/') => format!("/{rest}"),
        Ok(rest) => rest,
        Err(why) => {
            return Err(Refusal::new(
                &PATH,
                "root.path",
                format!("{} {why}", one_line(&written)),
            ));
        }
    };

    let masked_paths = path_list(
        [tightenings::MASKED_ANYWAY, tightenings::MASKED],
        linux.masked_paths().as_deref(),
        &MASKED,
        &mut journal,
    )?;
    let readonly_paths = path_list(
        [tightenings::READ_ONLY_ANYWAY, tightenings::READ_ONLY],
        linux.readonly_paths().as_deref(),
        &READONLY,
        &mut journal,
    )?;
    let devices = linux.devices().clone().unwrap_or_default();
    let devices = devices::check(&devices, context.devices)?;
    let resources = linux.resources().clone().unwrap_or_default();
    let resources = Some(resources::check(resources, &devices, &mut journal)?);
    let hooks = hooks::check(&spec, &pod, &config.hooks)?;

    Ok(Tightened {
        oci_version: spec.version().clone(),
        hostname: host_name("hostname", spec.hostname().as_deref())?,
        domainname: host_name("domainname", spec.domainname().as_deref())?,
        sysctl: sysctls::check(linux, &namespaces, &config.sysctls)?,
        rootfs_propagation: rootfs_propagation(linux)?,
        clocks: clock::offsets(linux)?,
        hooks,
        cgroups_path: cgroups_path(linux, context.id)?,
        readonly_rootfs: root.readonly().unwrap_or(false),
        pod,
        owner,
        process,
        namespaces,
        users,
        mounts,
        masked_paths,
        readonly_paths,
        root_path,
        resources,
        devices,
        mount_label,
        seccomp,
        annotations,
        asked,
        effective,
        asked_capabilities,
        warnings: journal.warnings,
        decisions: journal.decisions,
    })
}

/// All capabilities together with bare paths or all devices is what
/// `privileged: true` writes; one of them alone has its own rule.
fn refuse_privileged(spec: &Spec, linux: &Linux) -> Result<(), Refusal> {
    /// Capabilities of the oldest kernel that has what the sandbox needs.
    const NEARLY_ALL: u32 = 38;
    let bounding = spec
        .process()
        .as_ref()
        .and_then(|p| p.capabilities().as_ref())
        .map(|c| Caps::from(c).bounding & caps::ALL)
        .unwrap_or_default();
    let bare = linux.masked_paths().as_ref().is_none_or(Vec::is_empty);
    let devices = linux
        .resources()
        .as_ref()
        .is_some_and(resources::allows_all_devices);
    if bounding.count_ones() >= NEARLY_ALL && (bare || devices) {
        return Err(Refusal::new(&PRIVILEGED, "securityContext.privileged", ""));
    }
    Ok(())
}

/// What container engines grant to everybody is dropped where the policy hasn't
/// it, as nobody may have asked for it; and so is what `kubectl debug` asks for by its
/// default profile, since tracing is refused in here either way. More than that somebody
/// has asked for.
fn refuse_capabilities(asked: u64, granted: u64, config: &Config) -> Result<(), Refusal> {
    let config = &config.capabilities;
    let unasked = config::engine_capabilities() | caps::SYS_PTRACE;
    let more = asked & caps::ALL & !(unasked | config.allow | granted);
    if more == 0 || config.beyond == Beyond::Drop {
        return Ok(());
    }
    let detail = caps::names(more).join(", ");
    Err(Refusal::new(&CAPABILITY, "process.capabilities", detail))
}

fn names(linux: &Linux, typ: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|n| n.typ() == typ)
}

fn namespaces(linux: &Linux, allow: &Sandbox) -> Result<Namespaces, Refusal> {
    let no =
        |rule: &'static Rule, detail: &str| Err(Refusal::new(rule, "linux.namespaces", detail));
    let list: &[LinuxNamespace] = linux.namespaces().as_deref().unwrap_or_default();
    let find = |typ: LinuxNamespaceType, host: Option<&'static Rule>, allowed: bool| {
        let mut all = list.iter().filter(|n| n.typ() == typ);
        let Some(first) = all.next() else {
            return match host {
                Some(rule) if !allowed => no(rule, ""),
                Some(_) => Ok(Namespace::Host),
                None => Ok(Namespace::New),
            };
        };
        if all.next().is_some() {
            return no(&NAMESPACE_LIST, &format!("{typ} is there twice"));
        }
        match first.path().as_ref().map(|p| p.to_string_lossy()) {
            None => Ok(Namespace::New),
            Some(path) if path.is_empty() => Ok(Namespace::New),
            Some(path) => match plain_absolute(&path) {
                Ok(path) => Ok(Namespace::Path(path)),
                Err(why) => no(
                    &NAMESPACE_LIST,
                    &format!("{typ} at {} is {why}", one_line(&path)),
                ),
            },
        }
    };
    let namespaces = Namespaces {
        network: find(
            LinuxNamespaceType::Network,
            Some(&HOST_NETWORK),
            allow.allow_host_network,
        )?,
        // Never the host's: no sandbox would be left around them.
        pid: find(LinuxNamespaceType::Pid, Some(&HOST_PID), false)?,
        ipc: find(LinuxNamespaceType::Ipc, Some(&HOST_IPC), false)?,
        // Left out together with the network by hostNetwork; the host's name
        // is not worth a hole, so the container gets its own.
        uts: find(LinuxNamespaceType::Uts, None, true)?,
    };
    match find(LinuxNamespaceType::Mount, Some(&HOST_MOUNT), false)? {
        Namespace::New => {}
        _ => return Err(Refusal::new(&HOST_MOUNT, "linux.namespaces", "")),
    }
    match find(LinuxNamespaceType::Cgroup, None, true)? {
        Namespace::New => {}
        _ => return Err(Refusal::new(&CGROUP_PATH, "linux.namespaces", "")),
    }
    Ok(namespaces)
}

fn personality(linux: &Linux) -> Result<(), Refusal> {
    let Some(personality) = linux.personality() else {
        return Ok(());
    };
    if personality.domain() != LinuxPersonalityDomain::PerLinux {
        return Err(Refusal::new(
            &PERSONALITY,
            "linux.personality.domain",
            "LINUX32",
        ));
    }
    match personality.flags().iter().flatten().next() {
        Some(flag) => Err(Refusal::new(&PERSONALITY, "linux.personality.flags", flag)),
        None => Ok(()),
    }
}

fn path_list(
    [anyway, added]: [&Tightening; 2],
    written: Option<&[String]>,
    always: &[&str],
    journal: &mut Journal,
) -> Result<Vec<String>, Refusal> {
    let field = added.field;
    let mut paths: Vec<String> = Vec::new();
    for (i, path) in written.unwrap_or_default().iter().enumerate() {
        match plain_absolute(path) {
            Ok(p) if p == "/" => {
                return Err(Refusal::new(
                    &PATH,
                    format!("{field}[{i}]"),
                    "/ is the whole container",
                ));
            }
            Ok(p) if paths.contains(&p) => {}
            Ok(p) => paths.push(p),
            Err(why) => {
                return Err(Refusal::new(
                    &PATH,
                    format!("{field}[{i}]"),
                    format!("{} is {why}", one_line(path)),
                ));
            }
        }
    }
    let missing: Vec<&str> = always
        .iter()
        .copied()
        .filter(|a| !paths.iter().any(|p| p == a))
        .collect();
    if paths.is_empty() {
        journal.tighten(
            anyway,
            "empty in the specification; the usual paths are covered all the same",
        );
    } else if !missing.is_empty() {
        journal.tighten(added, &format!("added {}", missing.join(", ")));
    }
    paths.extend(missing.into_iter().map(str::to_owned));
    Ok(paths)
}

/// sethostname(2) and setdomainname(2) take at most 64 bytes.
fn host_name(field: &str, name: Option<&str>) -> Result<Option<String>, Refusal> {
    match name {
        None | Some("") => Ok(None),
        Some(n) if n.len() > 64 || n.contains(char::is_control) => {
            let detail = format!(
                "{} is longer than 64 bytes or has control characters",
                one_line(n)
            );
            Err(Refusal::new(&PROCESS, field, detail))
        }
        Some(n) => Ok(Some(n.to_owned())),
    }
}

fn rootfs_propagation(linux: &Linux) -> Result<Option<PropagationKind>, Refusal> {
    match linux.rootfs_propagation().as_deref() {
        None | Some("") => Ok(None),
        Some("private" | "rprivate") => Ok(Some(PropagationKind::Private)),
        Some("slave" | "rslave") => Ok(Some(PropagationKind::Slave)),
        Some(other) => Err(Refusal::new(
            &ROOTFS_PROPAGATION,
            "linux.rootfsPropagation",
            other,
        )),
    }
}

/// A path below the root of the hierarchy, or `slice:prefix:name`, which
/// containerd writes for the systemd driver.
fn cgroups_path(linux: &Linux, id: &str) -> Result<String, Refusal> {
    let no = |detail: String| Err(Refusal::new(&PATH, "linux.cgroupsPath", detail));
    let part = |p: &str| !p.is_empty() && p != "." && p != ".." && !p.contains(['/', '\0', '\n']);
    let written = linux
        .cgroups_path()
        .as_ref()
        .map(|p| p.to_string_lossy().into_owned())
        .unwrap_or_default();
    if written.is_empty() {
        return if part(id) {
            Ok(format!("/casemate/{id}"))
        } else {
            no(format!(
                "missing, and the id \"{}\" can't stand for it",
                one_line(id)
            ))
        };
    }
    if !written.starts_with('/') && written.contains(':') {
        let parts: Vec<&str> = written.split(':').collect();
        // The prefix may be empty; the slice too, which means the default.
        let good = matches!(parts[..], [slice, prefix, name]
            if part(name) && (slice.is_empty() || part(slice)) && (prefix.is_empty() || part(prefix)));
        return if good {
            Ok(written)
        } else {
            no(format!("{} is not slice:prefix:name", one_line(&written)))
        };
    }
    match plain(&written) {
        Ok(rest) if rest.is_empty() => no("/ is the whole node".into()),
        Ok(rest) if rest.contains('\n') => no("has a line break in it".into()),
        Ok(rest) => Ok(format!("/{rest}")),
        Err(why) => no(format!("{} {why}", one_line(&written))),
    }
}
