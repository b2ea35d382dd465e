//! Volumes, as the kubelet lays them out.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, world};
use k8s_cri::v1::*;
use rustix::fs::{Gid, Uid, chown};
use rustix::mount::{MountFlags, UnmountFlags};

use super::Cri;
use super::client::directory;
use super::config::{self, container, mount};

crate::cri_tests![
    empty_dir_on_disk,
    empty_dir_in_memory,
    host_path,
    read_only_volume,
    config_map_that_changes,
    projected_token,
    sub_path,
    fs_group,
    shared_memory_of_the_pod,
];

/// Tests of what CRI has since 2.0.
pub const SINCE_2: &[(&str, super::Test)] = &[
    ("c123_recursive_read_only", c123_recursive_read_only),
    ("handler_features", handler_features),
];

/// A tmpfs on the host, as memory-backed volumes are.
pub struct Memory(pub PathBuf);

impl Memory {
    pub fn new(dir: PathBuf) -> Result<Self, Stop> {
        fs::create_dir_all(&dir)?;
        rustix::mount::mount(
            "tmpfs",
            &dir,
            "tmpfs",
            MountFlags::empty(),
            c"size=1m,mode=0755",
        )?;
        Ok(Self(dir))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn own(path: &Path, uid: u32, gid: u32) -> Outcome {
    chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok(())
}

fn empty_dir_on_disk(cri: &Cri) -> Outcome {
    let dir = directory(cri, "empty")?;
    world::set_mode(&dir, 0o777)?;
    let pod = cri.pod("empty-dir")?;
    let volume = |c: &mut ContainerConfig| c.mounts.push(mount(&dir, "/data"));
    let as_app = |c: &mut ContainerConfig| {
        volume(c);
        config::security(c).run_as_user = Some(Int64Value { value: 1000 });
        config::security(c).run_as_group = Some(Int64Value { value: 1000 });
    };
    pod.sh("one", "mkdir /data/d && echo kept > /data/d/file", as_app)?;
    let meta = fs::metadata(dir.join("d/file"))?;
    ensure_eq!((meta.uid(), meta.gid()), (1000, 1000), "owner on the host");
    let out = pod.sh("two", "cat /data/d/file; stat -c %u /data/d/file", volume)?;
    ensure_eq!(out, "kept\n1000\n", "in the next container");
    pod.remove()
}

fn empty_dir_in_memory(cri: &Cri) -> Outcome {
    let memory = Memory::new(directory(cri, "memory")?.join("volume"))?;
    let pod = cri.pod("memory")?;
    let volume = |c: &mut ContainerConfig| c.mounts.push(mount(&memory.0, "/data"));
    let script = "echo kept > /data/file; grep ' /data ' /proc/self/mounts | cut -d' ' -f3";
    ensure_eq!(pod.sh("one", script, volume)?, "tmpfs\n", "type");
    // The size is the volume's: the kubelet's sizeLimit.
    let ran = {
        let script = "dd if=/dev/zero of=/data/big bs=1M count=4";
        let mut config = container("big", &["/bin/sh", "-c", script]);
        volume(&mut config);
        pod.to_end(config)?
    };
    ensure!(ran.code != 0 && ran.err.contains("No space"), "{ran:?}");
    let meta = fs::metadata(memory.0.join("file"))?;
    ensure_eq!((meta.uid(), meta.gid()), (0, 0), "owner on the host");
    pod.remove()
}

fn host_path(cri: &Cri) -> Outcome {
    let dir = directory(cri, "host")?;
    fs::write(dir.join("file"), "of the host\n")?;
    fs::create_dir(dir.join("private"))?;
    world::set_mode(&dir.join("private"), 0o700)?;
    let pod = cri.pod("host-path")?;
    let out = pod.sh(
        "dir",
        "cat /v/file; ls -A /v/private; echo new > /v/new",
        |c| {
            c.mounts.push(mount(&dir, "/v"));
        },
    )?;
    ensure_eq!(out, "of the host\n", "the directory");
    ensure_eq!(fs::read_to_string(dir.join("new"))?, "new\n", "on the host");
    // One file alone, at a place that the image hasn't.
    let out = pod.sh("file", "cat /a/b/c; echo more >> /a/b/c", |c| {
        c.mounts.push(mount(&dir.join("file"), "/a/b/c"));
    })?;
    ensure_eq!(out, "of the host\n", "the file");
    let now = fs::read_to_string(dir.join("file"))?;
    ensure_eq!(now, "of the host\nmore\n", "the file on the host");
    pod.remove()
}

fn read_only_volume(cri: &Cri) -> Outcome {
    let dir = directory(cri, "ro")?;
    world::set_mode(&dir, 0o777)?;
    let pod = cri.pod("read-only")?;
    let mut config = container("app", &["/bin/sh", "-c", "echo x > /v/file"]);
    config.mounts.push(Mount {
        readonly: true,
        ..mount(&dir, "/v")
    });
    let ran = pod.to_end(config)?;
    ensure!(
        ran.code != 0 && ran.err.contains("Read-only file system"),
        "{ran:?}"
    );
    ensure!(!dir.join("file").exists(), "the file was made");
    pod.remove()
}

fn c123_recursive_read_only(cri: &Cri) -> Outcome {
    let dir = directory(cri, "rro")?;
    let below = Memory::new(dir.join("below"))?;
    world::set_mode(&below.0, 0o777)?;
    let pod = cri.pod_of(introspected(cri), config::pod(cri, "recursive"))?;
    let volume = |recursive: bool| {
        let mount = Mount {
            readonly: true,
            recursive_read_only: recursive,
            ..mount(&dir, "/v")
        };
        move |c: &mut ContainerConfig| c.mounts.push(mount)
    };
    // Without it, what is mounted below stays writable.
    pod.sh("plain", "echo x > /v/below/plain", volume(false))?;
    let script = "(echo x > /v/below/file) 2>&1 || echo refused; cat /v/below/plain";
    let out = pod.sh("recursive", script, volume(true))?;
    ensure!(out.ends_with("refused\nx\n"), "below: {out}");
    ensure!(out.contains("Read-only file system"), "below: {out}");
    pod.remove()
}

/// The runtime class whose features the daemon knows: 2.1 asks only runtimes
/// of runc's type, and a recursive mount for any other ends it.
pub fn introspected(cri: &Cri) -> &'static str {
    match cri.generation {
        Generation::V2_1 => "casemate-by-path",
        _ => "casemate",
    }
}

/// What the daemon took from `-info`.
fn handler_features(cri: &Cri) -> Outcome {
    let request = StatusRequest { verbose: false };
    let status = cri.call("Status", async |mut c| c.status(request).await)?;
    let found = status
        .runtime_handlers
        .iter()
        .find(|h| h.name == introspected(cri))
        .and_then(|h| h.features);
    let Some(features) = found else {
        return casemate_tests::skip::fail(format!("handlers {:?}", status.runtime_handlers));
    };
    ensure!(features.recursive_read_only_mounts, "{features:?}");
    ensure!(features.user_namespaces, "{features:?}");
    Ok(())
}

/// What the kubelet's atomic writer does: a new directory, then one rename.
fn publish(dir: &Path, version: &str, content: &str) -> Outcome {
    let own = format!("..{version}");
    fs::create_dir(dir.join(&own))?;
    fs::write(dir.join(&own).join("key"), content)?;
    symlink(&own, dir.join("..data_tmp"))?;
    fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    Ok(())
}

fn config_map_that_changes(cri: &Cri) -> Outcome {
    let memory = Memory::new(directory(cri, "map")?.join("volume"))?;
    publish(&memory.0, "2026_01", "old\n")?;
    symlink("..data/key", memory.0.join("key"))?;
    let pod = cri.pod("config-map")?;
    let mut config = container("app", &["/bin/probe", "sleep"]);
    config.mounts.push(Mount {
        readonly: true,
        ..mount(&memory.0, "/etc/config")
    });
    let id = pod.run(config)?;
    ensure_eq!(
        pod.exec_sh(&id, "cat /etc/config/key")?,
        "old\n",
        "at first"
    );
    publish(&memory.0, "2026_02", "new\n")?;
    fs::remove_dir_all(memory.0.join("..2026_01"))?;
    ensure_eq!(
        pod.exec_sh(&id, "cat /etc/config/key")?,
        "new\n",
        "after a change"
    );
    let out = pod.exec(&id, &["/bin/sh", "-c", "echo x > /etc/config/key"])?;
    ensure!(out.code != 0, "written to: {out:?}");
    pod.remove()
}

fn projected_token(cri: &Cri) -> Outcome {
    let memory = Memory::new(directory(cri, "token")?.join("volume"))?;
    let token = memory.0.join("token");
    fs::write(&token, "secret\n")?;
    own(&token, 1000, 0)?;
    world::set_mode(&token, 0o600)?;
    let pod = cri.pod("token")?;
    let place = "/var/run/secrets/kubernetes.io/serviceaccount";
    let volume = |user: i64| {
        let memory = memory.0.clone();
        move |c: &mut ContainerConfig| {
            c.mounts.push(Mount {
                readonly: true,
                ..mount(&memory, place)
            });
            config::security(c).run_as_user = Some(Int64Value { value: user });
        }
    };
    let script = format!("cat {place}/token");
    ensure_eq!(pod.sh("owner", &script, volume(1000))?, "secret\n", "token");
    let mut config = container("other", &["/bin/sh", "-c", &script]);
    volume(1001)(&mut config);
    let ran = pod.to_end(config)?;
    ensure!(ran.code != 0 && ran.out.is_empty(), "another user: {ran:?}");
    pod.remove()
}

fn sub_path(cri: &Cri) -> Outcome {
    let dir = directory(cri, "sub")?;
    fs::create_dir_all(dir.join("volume/inner"))?;
    fs::write(dir.join("volume/outer-file"), "outer\n")?;
    fs::write(dir.join("volume/inner/file"), "inner\n")?;
    // The kubelet binds the sub path to a place of its own and names that.
    let bound = dir.join("volume-subpaths/0");
    fs::create_dir_all(&bound)?;
    rustix::mount::mount_bind(dir.join("volume/inner"), &bound)?;
    let file = dir.join("volume-subpaths/1");
    fs::write(&file, "")?;
    let file_bound = rustix::mount::mount_bind(dir.join("volume/outer-file"), &file);
    let checked = (|| {
        file_bound?;
        let pod = cri.pod("sub-path")?;
        let out = pod.sh("app", "ls -A /v; cat /v/file /etc/one", |c| {
            c.mounts.push(mount(&bound, "/v"));
            c.mounts.push(mount(&file, "/etc/one"));
        })?;
        ensure_eq!(out, "file\ninner\nouter\n", "sub paths");
        pod.remove()
    })();
    let _ = rustix::mount::unmount(&bound, UnmountFlags::DETACH);
    let _ = rustix::mount::unmount(&file, UnmountFlags::DETACH);
    checked
}

fn fs_group(cri: &Cri) -> Outcome {
    let dir = directory(cri, "group")?;
    fs::write(dir.join("secret"), "for the group\n")?;
    own(&dir.join("secret"), 0, 2000)?;
    world::set_mode(&dir.join("secret"), 0o440)?;
    own(&dir, 0, 2000)?;
    world::set_mode(&dir, 0o2775)?;
    let pod = cri.pod("fs-group")?;
    let volume = |group: Option<i64>| {
        let dir = dir.clone();
        move |c: &mut ContainerConfig| {
            c.mounts.push(mount(&dir, "/v"));
            let security = config::security(c);
            security.run_as_user = Some(Int64Value { value: 1500 });
            security.run_as_group = Some(Int64Value { value: 1500 });
            security.supplemental_groups = group.into_iter().collect();
        }
    };
    let script = "cat /v/secret; echo x > /v/new; mkdir /v/sub; stat -c '%u %g' /v/new";
    let out = pod.sh("member", script, volume(Some(2000)))?;
    ensure_eq!(out, "for the group\n1500 2000\n", "inside");
    let new = fs::metadata(dir.join("new"))?;
    ensure_eq!((new.uid(), new.gid()), (1500, 2000), "owner on the host");
    let sub = fs::metadata(dir.join("sub"))?;
    ensure_eq!(sub.gid(), 2000, "group of a new directory");
    ensure!(
        sub.permissions().mode() & 0o2000 != 0,
        "setgid of a new directory"
    );
    let mut config = container("stranger", &["/bin/cat", "/v/secret"]);
    volume(None)(&mut config);
    let ran = pod.to_end(config)?;
    ensure!(ran.code != 0 && ran.out.is_empty(), "a stranger: {ran:?}");
    pod.remove()
}

fn shared_memory_of_the_pod(cri: &Cri) -> Outcome {
    let pod = cri.pod("shm")?;
    let writer = pod.sleeper("writer")?;
    let reader = pod.sleeper("reader")?;
    pod.exec_sh(&writer, "echo through-memory > /dev/shm/segment")?;
    let mut out = String::new();
    until("the segment", Duration::from_secs(5), || {
        out = pod
            .exec_sh(&reader, "cat /dev/shm/segment")
            .unwrap_or_default();
        !out.is_empty()
    })?;
    ensure_eq!(out, "through-memory\n", "read by the other container");
    pod.remove()
}
