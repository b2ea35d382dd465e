//! Root filesystems of pods whose ids the kubelet chose, as containerd prepares
//! them: remapped, or a copy that belongs to the pod; and the owner of pipes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq};
use protobuf::well_known_types::any::Any;

use crate::common::{casemate_only, expect_text};
use crate::userns::{mapped, range, remap, running, words};

crate::trials![
    c037_io_owner_of_a_mapped_pod,
    c121_remapped_overlay,
    c121_shifted_copy,
    c121_other_mappings_are_refused,
];

/// A task alone, mapped, in a namespace of its own making.
fn alone(name: &str, first: u32, script: &str) -> Result<Task, Stop> {
    let mut task = Task::new(name, &["/bin/sh", "-c", script])?;
    mapped(&mut task, first, Path::new(""))?;
    Ok(task)
}

/// Runs it; what it wrote.
fn outcome(mut task: Task) -> Result<String, Stop> {
    let (deleted, out) = task.run_to_end()?;
    let errors = String::from_utf8_lossy(&task.stderr.so_far()).into_owned();
    ensure_eq!(deleted.exit_status, 0, "exit: {out} {errors}");
    task.finish()?;
    Ok(out)
}

/// What a root with mapped files must let the container do, and how it looks.
const FILES: &str = "stat -c '%u:%g %n' / /etc /etc/passwd; echo x > /new; \
    chown 1000:2000 /etc/passwd; mkdir /dir; rm /bin/probe; mv /etc/group /dir/; \
    chown 5:6 /dir; stat -c '%u:%g %n' /new /dir /etc/passwd; \
    test ! -e /bin/probe && echo end";
const SEEN: [&str; 13] = [
    "0:0",
    "/",
    "0:0",
    "/etc",
    "0:0",
    "/etc/passwd",
    "0:0",
    "/new",
    "5:6",
    "/dir",
    "1000:2000",
    "/etc/passwd",
    "end",
];

fn c121_remapped_overlay() -> Outcome {
    casemate_only()?;
    let first = range();
    let mut task = alone("c121", first, FILES)?;
    remap(&mut task, first)?;
    let upper = task.side.join("upper");
    let kept = World::get()?.dir().join(format!("kept{first}"));
    fs::rename(&upper, &kept)?;
    for option in &mut task.rootfs[0].options {
        *option = option.replace(&upper.display().to_string(), &kept.display().to_string());
    }
    let base = World::get()?.base()?;
    let before = fs::metadata(base.join("etc/passwd"))?;
    ensure_eq!(words(&outcome(task)?), SEEN, "what the container sees");
    // containerd's way: what the container wrote has host ids on disk, and the
    // image's layers are as they were.
    for (name, want) in [
        ("new", (first, first)),
        ("dir", (first + 5, first + 6)),
        ("etc/passwd", (first + 1000, first + 2000)),
    ] {
        let meta = fs::metadata(kept.join(name))?;
        ensure_eq!((meta.uid(), meta.gid()), want, "owner of {name} on disk");
    }
    let after = fs::metadata(base.join("etc/passwd"))?;
    ensure_eq!(
        (after.uid(), after.ctime(), after.ctime_nsec()),
        (before.uid(), before.ctime(), before.ctime_nsec()),
        "the image's layer"
    );
    fs::remove_dir_all(kept)?;
    let left = casemate_tests::leaks::mounts_with(&format!("{first}"));
    ensure!(left.is_empty(), "mounts left: {left:?}");
    Ok(())
}

/// A copy of the base image that belongs to the pod, as containerd makes it
/// where it can't remap.
fn shifted(to: &Path, first: u32) -> Outcome {
    let base = World::get()?.base()?;
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(base).arg(to);
    casemate_tests::run::run(&mut copy, &[], Duration::from_secs(30))?.ok()?;
    let mut all = vec![to.to_owned()];
    while let Some(path) = all.pop() {
        let meta = fs::symlink_metadata(&path)?;
        std::os::unix::fs::lchown(&path, Some(first + meta.uid()), Some(first + meta.gid()))?;
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                all.push(entry?.path());
            }
        }
    }
    Ok(())
}

fn c121_shifted_copy() -> Outcome {
    casemate_only()?;
    let first = range();
    // An overlay on the copy, then the copy itself, as one bind.
    for bind in [false, true] {
        let mut task = alone("c121copy", first, FILES)?;
        let copy = task.side.join("copy");
        shifted(&copy, first)?;
        if bind {
            task.rootfs[0].type_ = "bind".into();
            task.rootfs[0].source = copy.display().to_string();
            task.rootfs[0].options = vec!["rbind".into(), "rw".into()];
        } else {
            let upper = task.side.join("upper");
            std::os::unix::fs::chown(&upper, Some(first), Some(first))?;
            let base = World::get()?.base()?.display().to_string();
            for option in &mut task.rootfs[0].options {
                *option = option.replace(&base, &copy.display().to_string());
            }
        }
        ensure_eq!(words(&outcome(task)?), SEEN, "as a bind: {bind}");
    }
    Ok(())
}

fn c121_other_mappings_are_refused() -> Outcome {
    casemate_only()?;
    let first = range();
    let own = [
        format!("uidmap=0:{first}:65536"),
        format!("gidmap=0:{first}:65536"),
    ];
    for (options, of_pod) in [
        (&own[..1], true),
        (&own[1..], true),
        (&["uidmap=0:0:65536".to_owned(), own[1].clone()][..], true),
        // The pod's ids are casemate's choice: nobody could know them.
        (&own[..], false),
    ] {
        let mut task = Task::new("c121no", &["/bin/probe", "sleep"])?;
        if of_pod {
            mapped(&mut task, first, Path::new(""))?;
        }
        task.rootfs[0].options.extend(options.iter().cloned());
        task.boot()?;
        expect_text("another mapping", task.create(), "uidmap=")?;
        task.finish()?;
    }
    Ok(())
}

fn c037_io_owner_of_a_mapped_pod() -> Outcome {
    casemate_only()?;
    let first = range();
    let script = "echo out > /dev/stdout; echo err > /dev/stderr; exec sleep 600";
    let mut task = alone("c037map", first, script)?;
    remap(&mut task, first)?;
    // io_uid and io_gid, fields 4 and 5 of containerd.runc.v1.Options: host ids.
    let mut value = Vec::new();
    for field in [4u8, 5] {
        value.push(field << 3);
        let mut rest = first;
        while rest >= 0x80 {
            value.push(rest as u8 & 0x7f | 0x80);
            rest >>= 7;
        }
        value.push(rest as u8);
    }
    task.options = Some(Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value,
        ..Default::default()
    });
    let (task, pid) = running(task)?;
    task.stdout.until("out", SHORT)?;
    task.stderr.until("err", SHORT)?;
    for fd in [1, 2] {
        let meta = fs::metadata(format!("/proc/{pid}/fd/{fd}"))?;
        ensure_eq!(
            (meta.uid(), meta.gid()),
            (first, first),
            "owner of descriptor {fd}"
        );
    }
    Ok(task.finish()?)
}
