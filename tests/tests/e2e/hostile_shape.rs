//! Documents that are well formed and hostile by their shape: sizes, numbers
//! of things, mounts on each other.

use std::fs;

use casemate_tests::bundle::Task;
use casemate_tests::skip::Outcome;
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq};
use serde_json::{Value, json};

use crate::common::casemate_only;
use crate::hostile::{add_mount, expect, named};

crate::trials![
    hostile_document_too_large,
    hostile_environment_too_large,
    hostile_many_mounts_and_masks,
    hostile_mounts_on_each_other,
    hostile_mounts_of_the_node,
    hostile_masks_through_links,
    hostile_process_fields,
];

fn hostile_document_too_large() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("large", &["/bin/true"])?;
    task.spec["annotations"] = json!({"x": "y".repeat(11 << 20)});
    expect(task, &["OCI configuration", "10485760"])
}

fn hostile_environment_too_large() -> Outcome {
    casemate_only()?;
    // One string is at most 128 KiB, all at most a quarter of the stack limit.
    let long = vec![format!("A={}", "x".repeat(200 << 10))];
    let many = |n: usize| -> Vec<String> {
        (0..n)
            .map(|n| format!("V{n}={}", "x".repeat(100_000)))
            .collect()
    };
    for (env, part) in [
        (long, "list too long"),
        (many(70), "list too long"),
        (many(100), "process.env"),
    ] {
        let mut task = Task::new("env", &["/bin/true"])?;
        task.spec["process"]["env"] = json!(env);
        expect(task, &[part])?;
    }
    Ok(())
}

fn hostile_many_mounts_and_masks() -> Outcome {
    casemate_only()?;
    let mut task = Task::new(
        "many",
        &["/bin/sh", "-c", "wc -l < /proc/self/mounts; cat /v/299/f"],
    )?;
    let volume = task.side.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("f"), "content")?;
    set_mode(&volume, 0o755)?;
    for n in 0..300 {
        add_mount(
            &mut task,
            json!({"destination": format!("/v/{n}"), "type": "bind", "source": volume, "options": ["bind", "ro"]}),
        );
    }
    let missing: Vec<String> = (0..2000).map(|n| format!("/missing/{n}")).collect();
    task.spec["linux"]["maskedPaths"] = json!(missing);
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "exit: {out}");
    let lines: usize = out
        .lines()
        .next()
        .and_then(|l| l.trim().parse().ok())
        .unwrap_or(0);
    ensure!(lines >= 300, "{lines} mounts");
    ensure!(out.ends_with("content"), "the last volume: {out:?}");
    Ok(task.finish()?)
}

/// A mount of a volume that can't be made; parts of what is said.
type Refused = (&'static str, Value, &'static [&'static str]);

fn hostile_mounts_on_each_other() -> Outcome {
    casemate_only()?;
    let volume = tempfile::tempdir_in("/tmp")?;
    set_mode(volume.path(), 0o755)?;
    let file = volume.path().join("file");
    fs::write(&file, "content")?;
    let bind = |source: &std::path::Path, to: &str| json!({"destination": to, "type": "bind", "source": source, "options": ["bind", "ro"]});
    let long = format!("/{}", "x".repeat(300));
    let cases: Vec<Refused> = vec![
        (
            "a file on a directory",
            bind(&file, "/tmp"),
            &["/tmp", "directory"],
        ),
        (
            "a directory on a file",
            bind(volume.path(), "/etc/passwd"),
            &["/etc/passwd", "directory"],
        ),
        (
            "below a file",
            bind(&file, "/etc/passwd/x"),
            &["/etc/passwd"],
        ),
        (
            "in proc",
            bind(&file, "/proc/self/exe"),
            &["/proc/self/exe"],
        ),
        ("a name too long", bind(&file, &long), &["name too long"]),
        ("over the root", bind(volume.path(), "/"), &["root itself"]),
    ];
    for (name, mount, parts) in cases {
        let mut task = Task::new("shape", &["/bin/true"])?;
        add_mount(&mut task, mount);
        expect(task, parts).map_err(|stop| named(name, stop))?;
    }
    // A target that is missing below a read-only volume can't be made.
    let mut task = Task::new("shape", &["/bin/true"])?;
    add_mount(&mut task, bind(volume.path(), "/vol"));
    add_mount(
        &mut task,
        json!({"destination": "/vol/new", "type": "tmpfs", "source": "tmpfs"}),
    );
    expect(task, &["/vol/new", "Read-only"])?;
    ensure!(
        !volume.path().join("new").exists(),
        "made in the volume of the host"
    );
    // Later mounts lie on earlier ones.
    let mut task = Task::new("shape", &["/bin/sh", "-c", "ls /vol; cat /vol/file"])?;
    add_mount(
        &mut task,
        json!({"destination": "/vol", "type": "tmpfs", "source": "tmpfs"}),
    );
    add_mount(&mut task, bind(&file, "/vol/file"));
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(
        (deleted.exit_status, out.as_str()),
        (0, "file\ncontent"),
        "a file in a tmpfs"
    );
    Ok(task.finish()?)
}

fn hostile_mounts_of_the_node() -> Outcome {
    casemate_only()?;
    // The node's own proc, sysfs and cgroups are no volumes.
    for source in ["/proc", "/sys", "/sys/fs/cgroup", "/proc/1/ns/mnt"] {
        let mut task = Task::new("node", &["/bin/true"])?;
        add_mount(
            &mut task,
            json!({"destination": "/host", "type": "bind", "source": source, "options": ["rbind"]}),
        );
        expect(task, &[source]).map_err(|stop| named(source, stop))?;
    }
    Ok(())
}

fn hostile_masks_through_links() -> Outcome {
    casemate_only()?;
    let outside = tempfile::tempdir_in("/tmp")?;
    let secret = outside.path().join("secret");
    fs::write(&secret, "host")?;
    let script = "cat /masked/secret; echo x > /held/file || echo held";
    let mut task = Task::new("masks", &["/bin/sh", "-c", script])?;
    let upper = task.side.join("upper");
    let real = upper.join(outside.path().strip_prefix("/").unwrap_or(outside.path()));
    fs::create_dir_all(&real)?;
    fs::write(real.join("secret"), "image")?;
    fs::write(real.join("file"), "image")?;
    for link in ["masked", "held"] {
        std::os::unix::fs::symlink(outside.path(), upper.join(link))?;
    }
    task.spec["linux"]["maskedPaths"] = json!(["/masked/secret", "/loop", "/etc/passwd/x"]);
    task.spec["linux"]["readonlyPaths"] = json!(["/held/file"]);
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(
        (deleted.exit_status, out.trim()),
        (0, "held"),
        "masked and held paths"
    );
    ensure_eq!(fs::read_to_string(&secret)?, "host", "the host's file");
    Ok(task.finish()?)
}

fn hostile_process_fields() -> Outcome {
    casemate_only()?;
    type Spoil = fn(&mut Value);
    let cases: [(&str, Spoil, &[&str]); 5] = [
        (
            "a NUL in env",
            |s| s["process"]["env"] = json!(["A=b\u{0}c"]),
            &["process.env"],
        ),
        (
            "no right to run",
            |s| s["process"]["args"] = json!(["/etc/passwd"]),
            &["/etc/passwd", "ermission denied"],
        ),
        (
            "a directory",
            |s| s["process"]["args"] = json!(["/etc"]),
            &["/etc", "ermission denied"],
        ),
        (
            "a sysctl of the node",
            |s| s["linux"]["sysctl"] = json!({"kernel.core_pattern": "|/bin/sh"}),
            &["kernel.core_pattern"],
        ),
        (
            "hooks",
            |s| s["hooks"] = json!({"createRuntime": [{"path": "/bin/sh"}]}),
            &["hooks"],
        ),
    ];
    for (name, spoil, parts) in cases {
        let mut task = Task::new("field", &["/bin/true"])?;
        spoil(&mut task.spec);
        expect(task, parts).map_err(|stop| named(name, stop))?;
    }
    // Neither is a file that isn't a program.
    let mut task = Task::new("field", &["/text"])?;
    fs::write(task.side.join("upper/text"), "no program")?;
    set_mode(&task.side.join("upper/text"), 0o755)?;
    task.boot()?;
    task.create()?;
    let Err(error) = task.rpc()?.start(&task.id) else {
        return casemate_tests::skip::fail("a text file was executed");
    };
    ensure!(
        error.to_string().contains("/text"),
        "{error} does not name the file"
    );

    Ok(task.finish()?)
}
