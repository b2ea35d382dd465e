//! The mounts of a container, made on the host and staged for the agent.

use std::borrow::Cow;

use casemate_cgroup::Cgroup;
use casemate_protocol::plan::{LaunchPlan, MountSource};
use casemate_spec::{Config, MountSpec, Tightened, secrets};
use casemate_sys::mount::attr;

use super::{ContainerRequest, Sandbox, SandboxError};
use crate::host::sources::Sources;
use crate::host::{Step, cgroup_view, dev, rootfs, volume};
use crate::plan::{self, Staged};

/// Makes the mounts and puts them where the agent finds them.
pub fn stage(
    pod: &Sandbox,
    request: &ContainerRequest,
    spec: &Tightened,
    cgroup: &Cgroup,
    (directory, mut sources): (&str, Sources),
) -> Result<LaunchPlan, SandboxError> {
    let v2 = pod.hierarchy.is_v2();
    let mut launch = plan::container(spec, &pod.config, directory, pod.landlock, v2)?;
    let mut flags = attr::NODEV;
    if spec.process.no_new_privs {
        flags |= attr::NOSUID;
    }
    let root_path = request.bundle.join(&spec.root_path);
    let root = rootfs::make(
        &request.rootfs,
        &root_path,
        &rootfs::Owner {
            userns: &pod.userns,
            root_id: pod.range.container_root(),
            chosen: pod.users.is_some(),
            label: spec.mount_label.as_deref(),
        },
        flags,
        (&pod.staging, pod.config.kernel.older_ways),
    )?;
    let mut entries = vec![("rootfs".to_owned(), root)];
    let mut controllers = Vec::new();
    let terms = volume::Terms {
        userns: &pod.userns,
        root_id: pod.range.container_root(),
        policy: pod.config.volumes.without_idmap,
        staging: &pod.staging,
    };
    // Mounts below volumes, by the volume's place among the entries.
    let mut below = Vec::new();
    for (name, what) in &launch.staged {
        let tree = match what {
            Staged::Dev(options, attributes, devices) => {
                dev::make(pod.range.container_root(), options, *attributes, devices)?
            }
            Staged::Sysfs => pod.network.sysfs(pod.config.kernel.older_ways)?,
            Staged::CgroupV1 => {
                controllers = cgroup_view::each(cgroup)?;
                cgroup_view::base(&controllers).step("make", "/sys/fs/cgroup")?
            }
            Staged::Bind(number, mount) => {
                let mount = hardened(mount, &pod.config);
                let volume = volume::open(&mount, &sources.take(*number)?, &terms)?;
                below.push((entries.len(), volume.below));
                let is_directory = volume.directory;
                for entry in &mut launch.plan.mounts {
                    if let MountSource::Staged {
                        name: n, directory, ..
                    } = &mut entry.source
                        && n == name
                    {
                        *directory = is_directory;
                    }
                }
                volume.top
            }
        };
        entries.push((name.clone(), tree));
    }
    if let Some(shared) = &pod.shared {
        shared.add(spec, &pod.staging, &mut launch.plan, &mut entries)?;
    }
    pod.staging
        .attach(directory, &entries)
        .step("stage mounts of", &request.id)?;
    for (place, mounts) in &below {
        if let Some((_, tree)) = entries.get(*place) {
            pod.staging
                .attach_in(tree, mounts)
                .step("stage mounts below volumes of", &request.id)?;
        }
    }
    if !controllers.is_empty() {
        pod.staging
            .attach_below(&format!("{directory}/cgroup"), &controllers)
            .step("stage cgroups of", &request.id)?;
    }
    Ok(launch.plan)
}

/// A sub path of a volume with secrets is treated as the volume: its own path
/// doesn't say what it is of, but what else the kubelet has for the pod does.
fn hardened<'a>(mount: &'a MountSpec, config: &Config) -> Cow<'a, MountSpec> {
    let volumes = secrets::volumes_of_sub_path(&mount.source);
    let found = volumes
        .into_iter()
        .find(|(volume, _)| rustix::fs::lstat(volume.as_str()).is_ok());
    match found {
        None => Cow::Borrowed(mount),
        Some((_, holds)) => {
            let mut mount = mount.clone();
            secrets::harden(&mut mount, holds, &config.secrets);
            Cow::Owned(mount)
        }
    }
}
