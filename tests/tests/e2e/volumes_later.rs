//! Mounts that the host makes, and undoes, below a volume while its container
//! lives; and the options that `-info` promises.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::pod::init;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use crate::bootstrap::mount_options;
use crate::common::{casemate_only, expect_text};
use crate::locks::{ALL, all_refused, on_host};
use crate::userns::words;
use crate::volumes::{Mounts, dir, shell, volume};

crate::trials![
    c005_info_mount_options_are_applied,
    c124_private_volume,
    c124_slave_volume_receives,
    c124_slave_volume_of_mounts_that_differ,
    c124_shared_volume_is_refused,
];

/// A task with a directory that is a mount of the host's, shared if wanted.
fn with_mount(name: &str, shared: bool) -> Result<(Task, Mounts, PathBuf), Stop> {
    let task = shell(name, "echo start; exec sleep 600")?;
    let at = dir(&task, "volume")?;
    dir(&task, "volume/before")?;
    dir(&task, "volume/later")?;
    let mut mounts = Mounts::new();
    mounts.bind(&at, &at)?;
    let kind = if shared {
        MountPropagationFlags::SHARED
    } else {
        MountPropagationFlags::PRIVATE
    };
    mount_change(&at, kind)?;
    mounts.add("tmpfs", &at.join("before"), "mode=0755")?;
    fs::write(at.join("before/file"), "before")?;
    Ok((task, mounts, at))
}

fn start(task: &mut Task) -> Result<PathBuf, Stop> {
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(PathBuf::from(format!("/proc/{}/root/vol", init(task)?)))
}

fn is_mounted(path: &Path) -> bool {
    fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|text| text.contains(&format!(" {} ", path.display())))
}

fn c124_private_volume() -> Outcome {
    casemate_only()?;
    for shared in [false, true] {
        let (mut task, mut mounts, at) = with_mount("c124p", shared)?;
        volume(&mut task, &at, "/vol", &["rbind", "rprivate", "rw"]);
        let inside = start(&mut task)?;
        ensure_eq!(
            fs::read_to_string(inside.join("before/file"))?,
            "before",
            "what was mounted before"
        );
        mounts.add("tmpfs", &at.join("later"), "mode=0755")?;
        fs::write(at.join("later/file"), "later")?;
        ensure!(
            !inside.join("later/file").exists(),
            "a later mount arrived, shared: {shared}"
        );
        // Nothing of the host's is undone with the container.
        task.finish()?;
        for name in ["", "before", "later"] {
            let path = at.join(name);
            ensure!(
                is_mounted(Path::new(path.display().to_string().trim_end_matches('/'))),
                "{name:?} was unmounted on the host, shared: {shared}"
            );
        }
    }
    Ok(())
}

fn c124_slave_volume_receives() -> Outcome {
    casemate_only()?;
    let (mut task, mut mounts, at) = with_mount("c124s", true)?;
    volume(&mut task, &at, "/vol", &["rbind", "rslave", "rw"]);
    let inside = start(&mut task)?;
    ensure_eq!(
        fs::read_to_string(inside.join("before/file"))?,
        "before",
        "what was mounted before"
    );
    mounts.add("tmpfs", &at.join("later"), "mode=0755")?;
    fs::write(at.join("later/file"), "later")?;
    let arrived = fs::read_to_string(inside.join("later/file")).unwrap_or_default();
    ensure_eq!(arrived, "later", "what was mounted later");
    // And one below that.
    fs::create_dir(at.join("later/deep"))?;
    mounts.add("tmpfs", &at.join("later/deep"), "mode=0755")?;
    fs::write(at.join("later/deep/file"), "deep")?;
    ensure_eq!(
        fs::read_to_string(inside.join("later/deep/file")).unwrap_or_default(),
        "deep",
        "what was mounted on what was mounted later"
    );
    // Held as all mounts are, against every capability of the container.
    let pid = init(&task)?.to_string();
    let enter = |rest: &[&str]| on_host(&[&["enter", ALL, &pid], rest].concat());
    let places = ["/vol", "/vol/before", "/vol/later", "/vol/later/deep"];
    all_refused(
        "unmounting",
        &enter(&[&["unmount"][..], &places].concat())?,
        places.len(),
        &["EPERM", "EINVAL"],
    )?;
    all_refused(
        "clearing flags",
        &enter(&["flags", "/vol", "/vol/later"])?,
        6,
        &["EPERM", "EINVAL"],
    )?;
    // The host can take it away again, at once, and it goes inside too.
    unmount(at.join("later/deep"), UnmountFlags::empty())?;
    unmount(at.join("later"), UnmountFlags::empty())?;
    until("the mount to go inside", Duration::from_secs(1), || {
        !inside.join("later/file").exists()
    })?;
    unmount(at.join("before"), UnmountFlags::empty())?;
    ensure!(
        !inside.join("before/file").exists(),
        "what was mounted before stays inside"
    );
    mounts.add("tmpfs", &at.join("later"), "mode=0755")?;
    task.finish()?;
    ensure!(is_mounted(&at), "the volume was unmounted on the host");
    ensure!(
        is_mounted(&at.join("later")),
        "a mount below was unmounted on the host"
    );
    Ok(())
}

fn c124_slave_volume_of_mounts_that_differ() -> Outcome {
    casemate_only()?;
    // One below can't be mapped, so that each is treated by itself.
    let (mut task, mut mounts, at) = with_mount("c124d", true)?;
    dir(&task, "volume/ram")?;
    mounts.add("ramfs", &at.join("ram"), "")?;
    volume(&mut task, &at, "/vol", &["rbind", "rslave", "ro"]);
    let inside = start(&mut task)?;
    fs::write(at.join("ram/file"), "ram")?;
    ensure_eq!(
        fs::read_to_string(inside.join("ram/file")).unwrap_or_default(),
        "ram",
        "what can't be mapped"
    );
    mounts.add("tmpfs", &at.join("later"), "mode=0755")?;
    fs::write(at.join("later/file"), "later")?;
    ensure_eq!(
        fs::read_to_string(inside.join("later/file")).unwrap_or_default(),
        "later",
        "what was mounted later"
    );
    task.finish()?;
    for name in ["before", "ram", "later"] {
        ensure!(
            is_mounted(&at.join(name)),
            "{name} was unmounted on the host"
        );
    }
    Ok(())
}

fn c124_shared_volume_is_refused() -> Outcome {
    casemate_only()?;
    for option in ["shared", "rshared"] {
        let (mut task, _mounts, at) = with_mount("c124r", true)?;
        volume(&mut task, &at, "/vol", &["rbind", option]);
        task.boot()?;
        expect_text(option, task.create(), "HostToContainer")?;
        task.finish()?;
    }
    // Nothing could ever arrive from a private one.
    let (mut task, _mounts, at) = with_mount("c124n", false)?;
    volume(&mut task, &at, "/vol", &["rbind", "rslave"]);
    task.boot()?;
    expect_text("a private mount", task.create(), "make-rshared")?;
    Ok(task.finish()?)
}

/// Options that show in /proc/self/mountinfo, and how.
const SHOWN: [(&str, &str); 9] = [
    ("ro", "ro"),
    ("rro", "ro"),
    ("nosuid", "nosuid"),
    ("nodev", "nodev"),
    ("noexec", "noexec"),
    ("noatime", "noatime"),
    ("relatime", "relatime"),
    ("nodiratime", "nodiratime"),
    ("nosymfollow", "nosymfollow"),
];

fn c005_info_mount_options_are_applied() -> Outcome {
    casemate_only()?;
    let options = mount_options()?;
    for (option, _) in SHOWN {
        ensure!(
            options.iter().any(|o| o == option),
            "{option} isn't promised"
        );
    }
    let mut task = shell("c005", "cat /proc/self/mountinfo")?;
    let at = dir(&task, "volume")?;
    let mut mounts = Mounts::new();
    mounts.bind(&at, &at)?;
    mount_change(&at, MountPropagationFlags::SHARED)?;
    for option in &options {
        volume(&mut task, &at, &format!("/o/{option}"), &["rbind", option]);
    }
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit");
    for option in &options {
        let place = format!("/o/{option}");
        let line = out
            .lines()
            .map(words)
            .find(|fields| fields.get(4) == Some(&place.as_str()));
        let flags = line
            .and_then(|fields| fields.get(5).copied())
            .ok_or_else(|| Stop::Fail(format!("no mount at {place}: {out}")))?;
        let all: Vec<&str> = flags.split(',').collect();
        if let Some((_, shown)) = SHOWN.iter().find(|(o, _)| o == option) {
            ensure!(all.contains(shown), "{option} shows as {flags}");
        }
        if option == "strictatime" {
            ensure!(
                !all.contains(&"relatime") && !all.contains(&"noatime"),
                "{option} shows as {flags}"
            );
        }
    }
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(SHORT)?;
    Ok(())
}
