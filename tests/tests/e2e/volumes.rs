//! Volumes on every kind of file system that can be mounted here: mapped, or what
//! the table says of it (docs/volumes.md).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::world::set_mode;
use casemate_tests::{World, ensure, ensure_eq, procs};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use serde_json::json;

use crate::common::{casemate_only, expect_text};
use crate::hostile_node::configure;
use crate::userns::{lines, mapped, range, remap, words};

crate::trials![
    c122_mapping_is_applied,
    c122_mapping_that_cant_be_is_refused,
    c123_recursive_read_only,
    volumes_ext4_and_tmpfs_are_mapped,
    volumes_overlay_is_decided_by_the_configuration,
    volumes_kernel_state_is_never_shown,
    volumes_memory_is_copied_where_it_must_be,
    volumes_special_files,
    volumes_mounts_below_are_mapped_each,
];

/// Mounts of the host, unmounted at the end.
pub struct Mounts(Vec<PathBuf>);

impl Mounts {
    pub fn new() -> Mounts {
        Mounts(Vec::new())
    }

    pub fn bind(&mut self, from: &Path, to: &Path) -> Outcome {
        mount_bind(from, to)?;
        self.0.push(to.to_owned());
        Ok(())
    }

    pub fn add(&mut self, fstype: &str, to: &Path, data: &str) -> Outcome {
        let data = std::ffi::CString::new(data)?;
        mount("test", to, fstype, MountFlags::empty(), data.as_c_str())?;
        self.0.push(to.to_owned());
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
    }
}

/// A directory of the task's, not named after it, as its mounts are the host's and
/// stay when it ends; everybody may enter.
pub fn dir(task: &Task, name: &str) -> Result<PathBuf, Stop> {
    let world = World::get()?;
    let own = task.id.trim_start_matches(world.mark()).replace('-', "");
    let path = world.dir().join("v").join(own).join(name);
    fs::create_dir_all(&path)?;
    set_mode(&path, 0o755)?;
    Ok(path)
}

/// A bind of `source` at `destination`.
pub fn volume(task: &mut Task, source: &Path, destination: &str, options: &[&str]) {
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": destination, "type": "bind", "source": source, "options": options
        }));
    }
}

fn put(path: &Path, text: &str, mode: u32, owner: u32) -> Outcome {
    fs::write(path, text)?;
    std::os::unix::fs::chown(path, Some(owner), Some(owner))?;
    Ok(set_mode(path, mode)?)
}

pub fn shell(name: &str, script: &str) -> Result<Task, Stop> {
    Ok(Task::new(name, &["/bin/sh", "-c", script])?)
}

/// Runs it to the end; what it wrote, and the shim's log.
fn ran(mut task: Task) -> Result<(String, String), Stop> {
    let (deleted, out) = task.run_to_end()?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    ensure_eq!(deleted.exit_status, 0, "exit: {out} {errors}");
    let log = String::from_utf8_lossy(&task.log.so_far()).into_owned();
    task.finish()?;
    Ok((out, log))
}

/// Fails unless Create is refused with all of `parts` in its text.
fn refused(mut task: Task, parts: &[&str]) -> Outcome {
    task.boot()?;
    match task.create() {
        Ok(_) => return Err(Stop::Fail(format!("created, want {parts:?}"))),
        Err(error) => {
            let text = error.to_string();
            for part in parts {
                ensure!(text.contains(part), "{text:?} lacks {part:?}");
            }
            ensure_eq!(text.trim().lines().count(), 1, "lines of {text:?}");
        }
    }
    Ok(task.finish()?)
}

fn tmpfs_maps() -> bool {
    procs::kernel() >= (6, 3)
}

const LOOK: &str = "stat -c '%u:%g' /vol /vol/root /vol/user; cat /vol/user; \
    echo new > /vol/new && chown 1000:1000 /vol/new; stat -c '%u:%g' /vol/new";

fn files(volume: &Path) -> Outcome {
    put(&volume.join("root"), "r\n", 0o600, 0)?;
    put(&volume.join("user"), "u\n", 0o640, 1000)
}

fn volumes_ext4_and_tmpfs_are_mapped() -> Outcome {
    casemate_only()?;
    for memory in [false, true] {
        if memory && !tmpfs_maps() {
            continue;
        }
        let mut task = shell("volmap", LOOK)?;
        let at = dir(&task, "volume")?;
        let mut mounts = Mounts::new();
        if memory {
            mounts.add("tmpfs", &at, "mode=0755")?;
        }
        files(&at)?;
        // A file alone, as subPath makes it.
        let file = at.join("root");
        volume(&mut task, &at, "/vol", &["rbind", "rprivate", "rw"]);
        volume(&mut task, &file, "/etc/one", &["rbind", "rprivate", "ro"]);
        let (out, log) = ran(task)?;
        ensure_eq!(
            words(&out),
            ["0:0", "0:0", "1000:1000", "u", "1000:1000"],
            "in memory: {memory}"
        );
        ensure!(!log.contains("can't be mapped"), "{log}");
        let new = fs::metadata(at.join("new"))?;
        ensure_eq!((new.uid(), new.gid()), (1000, 1000), "on disk");
    }
    Ok(())
}

/// A task with an overlay of the host, or ramfs, as its volume.
fn unmappable(name: &str, script: &str, fstype: &str) -> Result<(Task, Mounts, PathBuf), Stop> {
    let task = shell(name, script)?;
    let at = dir(&task, "volume")?;
    let mut mounts = Mounts::new();
    let data = if fstype == "overlay" {
        let [lower, upper, work] = ["lower", "above", "workdir"].map(|n| dir(&task, n));
        format!(
            "lowerdir={},upperdir={},workdir={}",
            lower?.display(),
            upper?.display(),
            work?.display()
        )
    } else {
        "mode=0755".to_owned()
    };
    mounts.add(fstype, &at, &data)?;
    Ok((task, mounts, at))
}

fn volumes_overlay_is_decided_by_the_configuration() -> Outcome {
    casemate_only()?;
    let script = "stat -c '%u:%g' /vol/open; cat /vol/open; cat /vol/closed 2>/dev/null || \
                  echo no; echo x > /vol/new && echo written; echo end";
    let make = |policy: &str, writable: bool| -> Result<(Task, Mounts, PathBuf), Stop> {
        let (mut task, mounts, at) = unmappable("volovl", script, "overlay")?;
        put(&at.join("open"), "o\n", 0o644, 0)?;
        put(&at.join("closed"), "c\n", 0o600, 0)?;
        set_mode(&at, 0o777)?;
        if !policy.is_empty() {
            let text = format!("[volumes]\nwithout_idmap = \"{policy}\"\n");
            configure(&mut task, &text)?;
        }
        let mode = if writable { "rw" } else { "ro" };
        volume(&mut task, &at, "/vol", &["rbind", "rprivate", mode]);
        Ok((task, mounts, at))
    };
    let unmapped = ["65534:65534", "o", "no", "end"];
    for policy in ["", "read-only", "pass-through"] {
        let (task, _mounts, _) = make(policy, false)?;
        let (out, log) = ran(task)?;
        ensure_eq!(words(&out), unmapped, "read-only, by {policy:?}");
        ensure!(
            log.contains("ids of overlay can't be mapped"),
            "no warning: {log}"
        );
    }
    let way_out = ["overlay", "/vol", "volumes.without_idmap"];
    for (policy, writable) in [
        ("", true),
        ("read-only", true),
        ("refuse", true),
        ("refuse", false),
    ] {
        let (task, _mounts, _) = make(policy, writable)?;
        refused(task, &way_out)?;
    }
    let (task, _mounts, at) = make("pass-through", true)?;
    let (out, log) = ran(task)?;
    ensure_eq!(
        words(&out),
        ["65534:65534", "o", "no", "written", "end"],
        "passed through"
    );
    ensure!(log.contains("can't be mapped"), "no warning: {log}");
    // What the documentation warns of.
    ensure!(fs::metadata(at.join("new"))?.uid() > 65536, "id on disk");
    Ok(())
}

fn volumes_kernel_state_is_never_shown() -> Outcome {
    casemate_only()?;
    for from in ["/proc", "/sys", "/dev/pts", "/proc/self/ns/net"] {
        for policy in ["read-only", "pass-through"] {
            let mut task = shell("volkern", "echo end")?;
            let at = if from.ends_with("net") {
                let file = dir(&task, "ns")?.join("net");
                fs::write(&file, "")?;
                file
            } else {
                dir(&task, "volume")?
            };
            let mut mounts = Mounts::new();
            mounts.bind(Path::new(from), &at)?;
            configure(
                &mut task,
                &format!("[volumes]\nwithout_idmap = \"{policy}\"\n"),
            )?;
            volume(&mut task, &at, "/vol", &["rbind", "rprivate", "ro"]);
            refused(task, &["/vol", "host's kernel"])?;
        }
    }
    Ok(())
}

fn volumes_memory_is_copied_where_it_must_be() -> Outcome {
    casemate_only()?;
    // On kernels before 6.3 tmpfs is the same case.
    let kinds: &[&str] = if tmpfs_maps() {
        &["ramfs"]
    } else {
        &["ramfs", "tmpfs"]
    };
    let script = "until test -e /go/now; do sleep 0.1; done; \
                  stat -c '%u:%g %a' /vol/..data/token /one; cat /vol/token /one; \
                  echo x 2>/dev/null > /vol/token || echo end";
    for kind in kinds {
        for (mode, seen) in [
            // Everybody may read it: the volume itself, so changes arrive.
            (
                0o644,
                [
                    "65534:65534",
                    "644",
                    "65534:65534",
                    "644",
                    "later",
                    "later",
                    "end",
                ],
            ),
            // A copy, with the pod's ids, of the moment.
            (
                0o400,
                [
                    "1000:1000",
                    "400",
                    "1000:1000",
                    "400",
                    "first",
                    "first",
                    "end",
                ],
            ),
        ] {
            let (mut task, _mounts, at) = unmappable("volcopy", script, kind)?;
            fs::create_dir(at.join("..1"))?;
            set_mode(&at.join("..1"), 0o755)?;
            let token = at.join("..1/token");
            put(&token, "first\n", mode, 1000)?;
            std::os::unix::fs::symlink("..1", at.join("..data"))?;
            std::os::unix::fs::symlink("..data/token", at.join("token"))?;
            let go = dir(&task, "go")?;
            volume(&mut task, &at, "/vol", &["rbind", "rprivate", "ro"]);
            volume(&mut task, &token, "/one", &["rbind", "rprivate", "ro"]);
            volume(&mut task, &go, "/go", &["rbind", "rprivate", "ro"]);
            task.boot()?;
            task.create()?;
            task.rpc()?.start(&task.id)?;
            put(&token, "later\n", mode, 1000)?;
            fs::write(go.join("now"), "")?;
            task.rpc()?.wait(&task.id, SHORT)?;
            let out = task.stdout.text(SHORT)?;
            let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
            ensure_eq!(words(&out), seen, "{kind}, mode {mode:o}: {errors}");
            let log = String::from_utf8_lossy(&task.log.so_far()).into_owned();
            ensure_eq!(log.contains("gets a copy"), mode == 0o400, "warning: {log}");
            task.finish()?;
        }
        // Bounded: in bytes, in number, and in what is in it.
        for what in ["large", "many", "special"] {
            let (mut task, _mounts, at) = unmappable("volbig", "echo end", kind)?;
            put(&at.join("secret"), "s", 0o400, 0)?;
            match what {
                "large" => put(&at.join("large"), &"x".repeat(5 << 20), 0o644, 0)?,
                "many" => {
                    for n in 0..1100 {
                        fs::write(at.join(n.to_string()), "")?;
                    }
                }
                _ => casemate_tests::stdio::make_fifo(&at.join("fifo"))?,
            }
            volume(&mut task, &at, "/vol", &["rbind", "rprivate", "ro"]);
            refused(task, &[kind, "/vol", "can't be copied"])?;
        }
        // Writable memory goes with the pod: passed through.
        let (mut task, _mounts, at) = unmappable("volshm", "echo x > /vol/x; cat /vol/x", kind)?;
        set_mode(&at, 0o1777)?;
        volume(&mut task, &at, "/vol", &["rbind", "rprivate", "rw"]);
        ensure_eq!(words(&ran(task)?.0), ["x"], "writable {kind}");
    }
    Ok(())
}

fn volumes_special_files() -> Outcome {
    casemate_only()?;
    let script = "probe dial /run/s; cat /run/f; cat /run/d 2>/dev/null || echo nodev";
    let mut task = shell("volspec", script)?;
    let at = dir(&task, "volume")?;
    configure(&mut task, &format!("[host_paths]\nallow = [{at:?}]\n"))?;
    let listener = UnixListener::bind(at.join("s"))?;
    // For root alone: mapped, so the container's root is who may.
    set_mode(&at.join("s"), 0o600)?;
    casemate_tests::stdio::make_fifo(&at.join("f"))?;
    let device = at.join("d");
    mknodat(
        CWD,
        &device,
        FileType::CharacterDevice,
        Mode::from(0o666),
        makedev(1, 5),
    )?;
    set_mode(&device, 0o666)?;
    for name in ["s", "f", "d"] {
        volume(
            &mut task,
            &at.join(name),
            &format!("/run/{name}"),
            &["rbind", "rprivate", "rw"],
        );
    }
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let (connection, _) = listener.accept()?;
    drop(connection);
    casemate_tests::stdio::write_all(&at.join("f"), b"through\n")?;
    task.rpc()?.wait(&task.id, SHORT)?;
    let out = task.stdout.text(SHORT)?;
    ensure_eq!(words(&out), ["closed", "through", "nodev"], "{out}");
    Ok(task.finish()?)
}

fn c122_mapping_is_applied() -> Outcome {
    casemate_only()?;
    let first = range();
    for (own, option) in [
        (true, ""),
        (true, "ridmap"),
        (false, "idmap"),
        (false, "ridmap"),
    ] {
        let mut task = shell("c122", LOOK)?;
        if own {
            mapped(&mut task, first, Path::new(""))?;
            remap(&mut task, first)?;
        }
        let at = dir(&task, "volume")?;
        files(&at)?;
        let mut options = vec!["rbind", "rprivate", "rw"];
        options.extend((!option.is_empty()).then_some(option));
        volume(&mut task, &at, "/vol", &options);
        if own
            && let Some(mount) = task.spec["mounts"]
                .as_array_mut()
                .and_then(|m| m.last_mut())
        {
            mount["uidMappings"] = lines(first);
            mount["gidMappings"] = lines(first);
        }
        let (out, _) = ran(task)?;
        ensure_eq!(
            words(&out),
            ["0:0", "0:0", "1000:1000", "u", "1000:1000"],
            "mapping {own}, option {option:?}"
        );
    }
    Ok(())
}

fn c122_mapping_that_cant_be_is_refused() -> Outcome {
    casemate_only()?;
    let first = range();
    // The kernel can't: whatever the configuration says, and however harmless.
    let (mut task, _mounts, at) = unmappable("c122no", "echo end", "ramfs")?;
    mapped(&mut task, first, Path::new(""))?;
    remap(&mut task, first)?;
    configure(&mut task, "[volumes]\nwithout_idmap = \"pass-through\"\n")?;
    volume(&mut task, &at, "/vol", &["rbind", "rprivate", "ro"]);
    if let Some(mount) = task.spec["mounts"]
        .as_array_mut()
        .and_then(|m| m.last_mut())
    {
        mount["uidMappings"] = lines(first);
        mount["gidMappings"] = lines(first);
    }
    refused(task, &["ramfs", "/vol", "uidMappings"])?;
    // One below, where all of them were asked for.
    let mut task = shell("c122below", "echo end")?;
    let at = dir(&task, "volume")?;
    let below = dir(&task, "volume/below")?;
    let mut mounts = Mounts::new();
    mounts.add("ramfs", &below, "")?;
    volume(&mut task, &at, "/vol", &["rbind", "rprivate", "ridmap"]);
    refused(task, &["ramfs", "/below", "/vol"])?;
    // Another pod's mapping.
    let mut task = shell("c122other", "echo end")?;
    mapped(&mut task, first, Path::new(""))?;
    remap(&mut task, first)?;
    let at = dir(&task, "volume")?;
    volume(&mut task, &at, "/vol", &["rbind"]);
    if let Some(mount) = task.spec["mounts"]
        .as_array_mut()
        .and_then(|m| m.last_mut())
    {
        mount["uidMappings"] = lines(first + 65536);
        mount["gidMappings"] = lines(first + 65536);
    }
    task.boot()?;
    expect_text("another mapping", task.create(), "uidMappings")?;
    Ok(task.finish()?)
}

fn c123_recursive_read_only() -> Outcome {
    casemate_only()?;
    let script = "echo x 2>/dev/null > /vol/x && echo top; \
                  echo x 2>/dev/null > /vol/below/x && echo below; echo end";
    // Mounts below that are mapped together with it, and one that can't be.
    for (fstype, option, seen) in [
        ("tmpfs", "rw", &["top", "below", "end"][..]),
        ("tmpfs", "ro", &["below", "end"][..]),
        ("tmpfs", "rro", &["end"][..]),
        ("ramfs", "ro", &["below", "end"][..]),
        ("ramfs", "rro", &["end"][..]),
    ] {
        let mut task = shell("c123", script)?;
        let at = dir(&task, "volume")?;
        let below = dir(&task, "volume/below")?;
        let mut mounts = Mounts::new();
        mounts.add(fstype, &below, "mode=0777")?;
        set_mode(&below, 0o777)?;
        volume(&mut task, &at, "/vol", &["rbind", "rprivate", option]);
        let (out, _) = ran(task)?;
        ensure_eq!(words(&out), seen, "{option} above {fstype}");
    }
    Ok(())
}

fn volumes_mounts_below_are_mapped_each() -> Outcome {
    casemate_only()?;
    let script = "cd /vol; stat -c '%n %u' root 't m/root' ovl/root 't m/deep/root'; \
                  ls -A kern 2>/dev/null | wc -l; test -e net/x || echo none; \
                  for d in . 't m' ovl 't m/deep'; do echo x > \"$d/new\" && echo in $d; done; \
                  echo end";
    let (mut task, mut mounts, ovl) = unmappable("volbelow", script, "overlay")?;
    let at = dir(&task, "tree")?;
    let [tm, kern, under] = ["tree/t m", "tree/kern", "tree/ovl"].map(|n| dir(&task, n));
    let (tm, kern, under) = (tm?, kern?, under?);
    mounts.add("tmpfs", &tm, "mode=0755")?;
    mounts.bind(Path::new("/proc"), &kern)?;
    mounts.bind(&ovl, &under)?;
    fs::create_dir(tm.join("deep"))?;
    mounts.add("tmpfs", &tm.join("deep"), "mode=0755")?;
    for place in [&at, &tm, &under, &tm.join("deep")] {
        put(&place.join("root"), "", 0o644, 0)?;
        set_mode(place, 0o777)?;
    }
    volume(&mut task, &at, "/vol", &["rbind", "rprivate", "rw"]);
    let (out, log) = ran(task)?;
    let tmpfs = if tmpfs_maps() { "0" } else { "65534" };
    let want = format!(
        "root 0 t m/root {tmpfs} ovl/root 65534 t m/deep/root {tmpfs} 0 none in . in t m \
         in t m/deep end"
    );
    ensure_eq!(words(&out), words(&want), "{log}");
    for part in ["ids of overlay at /ovl", "proc at /kern is left out"] {
        ensure!(log.contains(part), "{log:?} lacks {part:?}");
    }
    // And the host's own are as they were.
    for path in [&tm, &kern, &under, &tm.join("deep")] {
        let text = fs::read_to_string("/proc/self/mountinfo")?;
        let shown = path.display().to_string().replace(' ', "\\040");
        ensure!(text.contains(&shown), "{shown} is no longer mounted");
    }
    Ok(())
}
