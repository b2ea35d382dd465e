//! Hostile documents, images and nodes: the client is told one clear line that
//! names the field or the object; nothing is left behind, nothing of the host
//! has changed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::error::Failure;
use casemate_tests::run::until;
use casemate_tests::shim::{Answer, Client, SHORT};
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::set_mode;
use casemate_tests::{ensure, ensure_eq, procs};
use containerd_shim_protos::api::CreateTaskResponse;
use rustix::fs::{CWD, FileType, Mode};
use serde_json::{Value, json};

use crate::common::casemate_only;

crate::trials![
    hostile_malformed_documents,
    hostile_names_in_seccomp,
    hostile_values_name_their_field,
    hostile_links_where_the_sandbox_mounts,
    hostile_links_stay_inside_the_root,
    hostile_passwd,
    hostile_source_that_vanishes,
];

/// The text without what the test bed and ttrpc put around it.
pub fn one_line(text: &str) -> Result<String, Stop> {
    let text = text.trim();
    ensure!(!text.is_empty(), "the client is told nothing");
    ensure_eq!(text.lines().count(), 1, "lines of {text:?}");
    ensure!(!text.contains(" | "), "more than one line: {text:?}");
    ensure!(!text.contains("panicked"), "a panic: {text:?}");
    ensure!(text.len() < 1500, "{} bytes: {text:.300?}…", text.len());
    Ok(text.to_owned())
}

/// Nothing of a task whose `start` failed is on the host, once `delete` ran as
/// containerd runs it.
pub fn clean_after_failed_start(task: &Task) -> Outcome {
    task.shim.delete()?;
    let socket = PathBuf::from(
        task.expected_address(&task.id)
            .trim_start_matches("unix://"),
    );
    ensure!(!socket.exists(), "socket {} is left", socket.display());
    Ok(task.expect_clean(Duration::from_secs(3))?)
}

/// Start, Create or Start of the task fails; the line that the client is told.
pub fn told(mut task: Task) -> Result<String, Stop> {
    let text = match task.boot() {
        Err(Failure::Command { output, .. }) => {
            clean_after_failed_start(&task)?;
            output
        }
        Err(other) => return Err(other.into()),
        Ok(_) => {
            let made = match task.create() {
                Ok(_) => task.rpc()?.start(&task.id).map(|_| ()),
                Err(error) => Err(error),
            };
            let Err(error) = made else {
                return fail("Create and Start succeeded");
            };
            task.finish()?;
            error.to_string()
        }
    };
    one_line(&text)
}

pub fn expect(task: Task, parts: &[&str]) -> Outcome {
    let text = told(task)?;
    for part in parts {
        ensure!(text.contains(part), "{text:?} does not name {part:?}");
    }
    Ok(())
}

fn hostile_malformed_documents() -> Outcome {
    casemate_only()?;
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/tests/seeds");
    let mut seen = 0;
    for entry in fs::read_dir(&seeds)? {
        let path = entry?.path();
        let task = Task::new("seed", &["/bin/true"])?;
        fs::copy(&path, task.bundle().join("config.json"))?;
        let name = path.file_name().unwrap_or_default().display().to_string();
        let begun = Instant::now();
        let said = refused_document(&task).map_err(|stop| named(&name, stop))?;
        ensure!(
            begun.elapsed() < Duration::from_secs(2),
            "{name}: {:?}",
            begun.elapsed()
        );
        ensure!(
            !said.contains("No such file"),
            "{name}: not about the document: {said:?}"
        );
        seen += 1;
    }
    ensure!(seen >= 50, "only {seen} documents in {}", seeds.display());
    Ok(())
}

/// Start or Create fails with the `config.json` that is there.
fn refused_document(task: &Task) -> Result<String, Stop> {
    let output = task.shim.run("start")?;
    let said = if output.code() == 0 {
        let answer = Answer::parse(&output.stdout)?;
        let client = Client::connect(&answer.address, answer.version)?;
        let pid = client.shim(&task.id)?.shim_pid;
        let created: casemate_tests::Result<CreateTaskResponse> =
            client.call("Create", &task.create_request(), SHORT);
        client.shutdown(&task.id)?;
        let ended = until("the shim to end", Duration::from_secs(3), || {
            procs::identity(pid).is_none()
        });
        if ended.is_err() {
            procs::signal(pid, rustix::process::Signal::KILL);
        }
        ended?;
        match created {
            Ok(_) => return fail("Create succeeded"),
            Err(error) => error.to_string(),
        }
    } else {
        output.out() + &output.err()
    };
    clean_after_failed_start(task)?;
    one_line(&said)
}

pub fn named(name: &str, stop: Stop) -> Stop {
    match stop {
        Stop::Fail(text) => Stop::Fail(format!("{name}: {text}")),
        other => other,
    }
}

fn hostile_names_in_seccomp() -> Outcome {
    casemate_only()?;
    let rule = |op: &str| {
        json!({"names": ["read"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 0, "value": 1, "op": op}]})
    };
    for (filter, part) in [
        (json!({"defaultAction": "SCMP_ACT_WINK"}), "SCMP_ACT_WINK"),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_PDP11"]}),
            "SCMP_ARCH_PDP11",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("SCMP_CMP_ALMOST")]}),
            "SCMP_CMP_ALMOST",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}
            ]}),
            "index",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_SOON"]}),
            "SECCOMP_FILTER_FLAG_SOON",
        ),
    ] {
        let mut task = Task::new("seccomp", &["/bin/true"])?;
        task.spec["linux"]["seccomp"] = filter;
        expect(task, &["seccomp", part])?;
    }
    Ok(())
}

pub fn add_mount(task: &mut Task, mount: Value) {
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(mount);
    }
}

fn hostile_values_name_their_field() -> Outcome {
    casemate_only()?;
    type Spoil = fn(&mut Task);
    let cases: [(Spoil, &[&str]); 9] = [
        (
            |t| {
                add_mount(
                    t,
                    json!({"destination": "/mnt", "type": "nfs4", "source": "server:/"}),
                )
            },
            &["/mnt", "nfs4"],
        ),
        (
            |t| {
                add_mount(
                    t,
                    json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["frobnicate=yes"]}),
                )
            },
            &["/mnt", "frobnicate"],
        ),
        (
            |t| {
                add_mount(
                    t,
                    json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["size=plenty"]}),
                )
            },
            &["/mnt", "size"],
        ),
        (
            |t| t.spec["process"]["user"]["uid"] = json!(70000),
            &["70000", "uid"],
        ),
        (
            |t| t.spec["process"]["user"]["gid"] = json!(70000),
            &["70000", "gid"],
        ),
        (
            |t| t.spec["process"]["user"]["additionalGids"] = json!([70000]),
            &["70000", "additionalGids"],
        ),
        (
            |t| t.spec["process"]["cwd"] = json!("srv/www"),
            &["process.cwd", "srv/www"],
        ),
        (
            |t| t.spec["process"]["args"] = json!(["/bin/missing"]),
            &["/bin/missing"],
        ),
        (
            |t| t.spec["root"]["path"] = json!("/nonexistent/root"),
            &["/nonexistent/root"],
        ),
    ];
    for (n, (spoil, parts)) in cases.into_iter().enumerate() {
        let mut task = Task::new("value", &["/bin/true"])?;
        if n == 8 {
            task.rootfs.clear();
        }
        spoil(&mut task);
        expect(task, parts).map_err(|stop| named(&format!("case {n}"), stop))?;
    }
    Ok(())
}

fn hostile_links_where_the_sandbox_mounts() -> Outcome {
    casemate_only()?;
    for (name, to) in [
        ("proc", "/etc"),
        ("dev", "/etc"),
        ("sys", "etc"),
        ("proc", "/proc/self/root/tmp"),
        ("sys", "../../../../../../../../etc"),
    ] {
        let task = Task::new("link", &["/bin/true"])?;
        symlink(to, task.side.join("upper").join(name))?;
        expect(task, &[&format!("/{name}"), "symbolic link"])?;
    }
    Ok(())
}

fn hostile_links_stay_inside_the_root() -> Outcome {
    casemate_only()?;
    // A witness on the host, at a path that exists outside and not inside.
    let outside = tempfile::tempdir_in("/tmp")?;
    set_mode(outside.path(), 0o777)?;
    let witness = outside.path().join("file");
    fs::write(&witness, "untouched")?;
    let hosts = fs::read("/etc/hosts").unwrap_or_default();
    let absolute = outside.path().display().to_string();
    let climbing = format!("../../../../../../../..{absolute}");
    for (n, link) in [absolute.clone(), climbing].into_iter().enumerate() {
        let mut task = Task::new(
            "inside",
            &[
                "/bin/sh",
                "-c",
                "cat /data/file; echo changed > /data/file; echo changed > /data/new",
            ],
        )?;
        let volume = task.side.join("volume");
        fs::write(&volume, "volume")?;
        set_mode(&volume, 0o666)?;
        symlink(&link, task.side.join("upper/data"))?;
        add_mount(
            &mut task,
            json!({"destination": "/data/file", "type": "bind",
            "source": volume, "options": ["bind", "rw"]}),
        );
        let (deleted, out) = task.run_to_end()?;
        ensure_eq!(
            (deleted.exit_status, out.as_str()),
            (0, "volume"),
            "link {n}"
        );
        ensure_eq!(
            fs::read_to_string(&witness)?,
            "untouched",
            "the host's file through {link}"
        );
        ensure!(
            !outside.path().join("new").exists(),
            "a file was made on the host"
        );
        ensure_eq!(fs::read_to_string(&volume)?.trim(), "changed", "the volume");
        let inside = task
            .side
            .join("upper")
            .join(absolute.trim_start_matches('/'));
        ensure!(
            inside.join("new").exists(),
            "not resolved inside the root: {}",
            inside.display()
        );
        task.finish()?;
    }
    // Links into /proc are followed by nobody.
    for link in ["/proc/1/root/etc", "/proc/self/cwd", "/proc/self/fd/3"] {
        let mut task = Task::new("magic", &["/bin/true"])?;
        symlink(link, task.side.join("upper/data"))?;
        add_mount(
            &mut task,
            json!({"destination": "/data/x", "type": "tmpfs", "source": "tmpfs"}),
        );
        expect(task, &["/data/x"])?;
    }
    ensure_eq!(
        fs::read("/etc/hosts").unwrap_or_default(),
        hosts,
        "the host's /etc/hosts"
    );
    Ok(())
}

fn hostile_passwd() -> Outcome {
    casemate_only()?;
    type Make = fn(&Path) -> std::io::Result<()>;
    let cases: [(&str, Make, &str); 7] = [
        ("sparse", |p| fs::File::create(p)?.set_len(100 << 20), "/"),
        (
            "binary",
            |p| {
                fs::write(
                    p,
                    (0..200_000u32)
                        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
                        .collect::<Vec<_>>(),
                )
            },
            "/",
        ),
        (
            "fifo",
            |p| {
                Ok(rustix::fs::mknodat(
                    CWD,
                    p,
                    FileType::Fifo,
                    Mode::from(0o644),
                    0,
                )?)
            },
            "/",
        ),
        ("directory", |p| fs::create_dir(p), "/"),
        (
            "link to the host",
            |p| symlink("/proc/1/root/etc/passwd", p),
            "/",
        ),
        ("loop", |p| symlink("passwd", p), "/"),
        (
            "early",
            |p| fs::write(p, "root:x:0:0::/early:/bin/sh\n".repeat(100_000)),
            "/early",
        ),
    ];
    for (name, make, home) in cases {
        let mut task = Task::new("passwd", &["/bin/sh", "-c", "echo home=$HOME"])?;
        let etc = task.side.join("upper/etc");
        fs::create_dir_all(&etc)?;
        make(&etc.join("passwd"))?;
        let begun = Instant::now();
        let (deleted, out) = task
            .run_to_end()
            .map_err(|e| Stop::Fail(format!("{name}: {e}")))?;
        ensure!(
            begun.elapsed() < Duration::from_secs(5),
            "{name}: {:?}",
            begun.elapsed()
        );
        ensure_eq!(
            (deleted.exit_status, out.trim()),
            (0, &*format!("home={home}")),
            "{name}"
        );
        task.finish()?;
    }
    Ok(())
}

fn hostile_source_that_vanishes() -> Outcome {
    let mut task = Task::new("vanish", &["/bin/true"])?;
    let volume = task.side.join("vanishing");
    fs::create_dir(&volume)?;
    add_mount(
        &mut task,
        json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind"]}),
    );
    task.boot()?;
    fs::remove_dir(&volume)?;
    let Err(error) = task.create() else {
        return fail("Create succeeded without the source of a mount");
    };
    let text = one_line(&error.to_string())?;
    ensure!(
        text.contains("vanishing"),
        "{text:?} does not name the source"
    );
    ensure!(text.contains("/data"), "{text:?} does not name the mount");
    Ok(task.finish()?)
}
