//! Policy at the door: which files of the node a pod is shown, what annotations
//! do, and execs.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::{casemate, records};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, fail};
use casemate_tests::{ensure, ensure_eq, spec};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::{Value, json};

use crate::common::{casemate_only, expect_text};
use crate::hostile::{add_mount, told};
use crate::hostile_node::configure;

crate::trials![
    policy_host_paths_are_judged_where_they_are,
    policy_host_paths_by_configuration,
    policy_host_paths_of_the_kubelet,
    policy_annotations_tighten,
    policy_capabilities_and_images,
    policy_exec_denied_and_contained,
    policy_exec_is_recorded,
    policy_doctor_finds_what_stops_pods,
];

fn bind(source: &Path) -> Value {
    json!({"destination": "/v", "type": "bind", "source": source, "options": ["rbind", "rw"]})
}

/// The line with which a bind of `source` is refused.
fn refused(source: &Path, config: &str) -> Result<String, casemate_tests::skip::Stop> {
    let mut task = Task::new("hostpath", &["/bin/true"])?;
    configure(&mut task, config)?;
    add_mount(&mut task, bind(source));
    told(task)
}

/// What `script` says of a bind of `source` at /v.
fn shown(source: &Path, config: &str, script: &str) -> Result<String, casemate_tests::skip::Stop> {
    let mut task = Task::new("hostpath", &["/bin/sh", "-c", script])?;
    configure(&mut task, config)?;
    add_mount(&mut task, bind(source));
    let (deleted, out) = task.run_to_end()?;
    ensure_eq!(deleted.exit_status, 0, "{script}: {out}");
    task.rpc()?.shutdown(&task.id)?;
    Ok(out)
}

fn policy_host_paths_are_judged_where_they_are() -> Outcome {
    casemate_only()?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    let at = |name: &str| scratch.path().join(name);
    symlink("/etc", at("etc"))?;
    fs::create_dir(at("dir"))?;
    symlink("../../../var", at("dir/up"))?;
    symlink("/run/casemate", at("run"))?;
    fs::create_dir(at("twice"))?;
    fs::create_dir(at("deep"))?;
    fs::create_dir(at("deep/part"))?;
    let part = fs::read_dir("/etc")?
        .flatten()
        .map(|e| e.path())
        // Certificates are nobody's secret.
        .find(|p| p.is_dir() && !p.is_symlink() && !p.ends_with("ca-certificates"));
    let Some(part) = part else {
        return fail("no directory in /etc");
    };
    mount_bind("/etc", at("twice"))?;
    let below = mount_bind(&part, at("deep/part"));
    let checked = (|| {
        below?;
        for (source, because) in [
            (at("etc"), "/etc"),
            (at("etc/ssl"), "/etc"),
            (at("dir/up"), "/var"),
            (at("run"), "/run"),
            (at("twice"), "/etc"),
            (at("deep"), "/etc"),
            (at("deep/part"), "/etc"),
            (Path::new("/var/lib").to_owned(), "/var/lib"),
            (Path::new("/root").to_owned(), "/root"),
            (Path::new("/dev/shm").to_owned(), "/dev"),
        ] {
            if !source.exists() {
                continue;
            }
            let said = refused(&source, "")?;
            for part in ["path of the node is refused", because, "host_paths.allow"] {
                ensure!(said.contains(part), "{}: {said}", source.display());
            }
        }
        Ok(())
    })();
    for mounted in ["twice", "deep/part"] {
        let _ = unmount(at(mounted), UnmountFlags::DETACH);
    }
    checked?;
    // A socket, alone; and what is nobody's business of the node.
    let _listener = UnixListener::bind(at("agent.sock"))?;
    let said = refused(&at("agent.sock"), "")?;
    ensure!(said.contains("a socket of the node is refused"), "{said}");
    fs::write(at("dir/file"), "plain\n")?;
    ensure_eq!(shown(&at("dir"), "", "cat /v/file")?, "plain\n", "plain");
    // What ordinary pods mount of /etc: to be read, whatever the mount says.
    for name in ["hosts", "localtime", "os-release", "ssl/certs"] {
        let source = Path::new("/etc").join(name);
        if !source.exists() {
            continue;
        }
        let script = "f=/v; if [ -d /v ]; then f=/v/x; fi; (echo x >>$f) 2>&1; ls -d /v";
        let said = shown(&source, "", script)?;
        let read_only = said.contains("Read-only file system");
        ensure!(read_only && said.ends_with("/v\n"), "{name}: {said}");
    }
    Ok(())
}

fn policy_host_paths_by_configuration() -> Outcome {
    casemate_only()?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    let at = |name: &str| scratch.path().join(name);
    for dir in ["secret", "ro", "other"] {
        fs::create_dir(at(dir))?;
        fs::write(at(dir).join("file"), format!("{dir}\n"))?;
    }
    symlink(at("secret"), at("link"))?;
    let _listener = UnixListener::bind(at("other/agent.sock"))?;
    let quoted = |name: &str| format!("{:?}", at(name));
    // A link in the list is what it leads to.
    let deny = format!("[host_paths]\ndeny = [{}]\n", quoted("link"));
    for source in [at("secret"), at("secret/file"), scratch.path().to_owned()] {
        let said = refused(&source, &deny)?;
        ensure!(said.contains("is refused as a volume"), "{said}");
    }
    ensure_eq!(
        shown(&at("other"), &deny, "cat /v/file")?,
        "other\n",
        "other"
    );
    let only = format!(
        "[host_paths]\nonly_allowed = true\nallow = [{}]\n",
        quoted("other")
    );
    let said = refused(&at("secret"), &only)?;
    ensure!(said.contains("isn't one of those allowed"), "{said}");
    let out = shown(&at("other/agent.sock"), &only, "[ -S /v ] && echo socket")?;
    ensure_eq!(out, "socket\n", "a socket by leave");
    let read_only = format!("[host_paths]\nread_only = [{}]\n", quoted("ro"));
    let script = "cat /v/file; (echo x > /v/file) 2>&1 || echo refused";
    let out = shown(&at("ro"), &read_only, script)?;
    ensure!(
        out.starts_with("ro\n") && out.contains("Read-only file system"),
        "{out}"
    );
    ensure_eq!(fs::read_to_string(at("ro/file"))?, "ro\n", "on the host");
    // By default, the node's programs.
    let script = "(echo x > /v/casemate-test) 2>&1 || echo refused";
    let out = shown(Path::new("/usr"), "", script)?;
    ensure!(out.contains("Read-only file system"), "/usr: {out}");
    Ok(())
}

fn policy_host_paths_of_the_kubelet() -> Outcome {
    casemate_only()?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    let at = |name: &str| scratch.path().join(name);
    for uid in ["mine", "theirs"] {
        let volume = at("data/pods").join(uid).join("volumes/secret");
        fs::create_dir_all(&volume)?;
        fs::write(volume.join("token"), format!("of {uid}\n"))?;
    }
    symlink(at("data"), at("kubelet"))?;
    let lure = at("data/pods/mine/volumes/lure");
    symlink("../../theirs/volumes/secret", &lure)?;
    let config = format!("[host_paths]\nkubelet = {:?}\n", at("kubelet"));
    let task = |source: &str| {
        let mut task = Task::new("kubelet", &["/bin/cat", "/v/token"])?;
        configure(&mut task, &config)?;
        spec::annotate(&mut task.spec, "io.kubernetes.cri.sandbox-uid", "mine");
        add_mount(&mut task, bind(&at(source)));
        Ok::<_, casemate_tests::skip::Stop>(task)
    };
    let mut own = task("kubelet/pods/mine/volumes/secret")?;
    let (deleted, out) = own.run_to_end()?;
    ensure_eq!((deleted.exit_status, &*out), (0, "of mine\n"), "own volume");
    own.rpc()?.shutdown(&own.id)?;
    for source in [
        "kubelet/pods/theirs/volumes/secret",
        "data/pods/theirs/volumes/secret",
        "kubelet/pods/mine/volumes/lure",
        "kubelet/pods/mine",
        "kubelet/pods",
        "kubelet",
    ] {
        let said = told(task(source)?)?;
        ensure!(
            said.contains("isn't this pod's") && said.contains("uid is mine"),
            "{source}: {said}"
        );
    }
    // Nor what has all of it inside.
    let said = told(task(".")?)?;
    ensure!(said.contains("is refused as a volume"), "{said}");
    Ok(())
}

fn policy_annotations_tighten() -> Outcome {
    casemate_only()?;
    let annotated = |key: &str, value: &str, config: &str, args: &[&str]| {
        let mut task = Task::new("annotated", args)?;
        configure(&mut task, config)?;
        spec::annotate(&mut task.spec, &format!("casemate.io/{key}"), value);
        Ok::<_, casemate_tests::skip::Stop>(task)
    };
    for (key, value, parts) in [
        (
            "porfile",
            "strict",
            &["casemate.io/porfile", "casemate.io/profile"][..],
        ),
        (
            "exec",
            "maybe",
            &["casemate.io/exec", "allow, record or deny"],
        ),
        ("profile", "compat", &["would loosen", "annotations.allow"]),
    ] {
        let said = told(annotated(key, value, "", &["/bin/true"])?)?;
        for part in parts {
            ensure!(said.contains(part), "{key}: {said}");
        }
    }
    let status = |key: &str, value: &str, config: &str| {
        let mut task = annotated(key, value, config, &["/bin/cat", "/proc/self/status"])?;
        let (_, out) = task.run_to_end()?;
        task.rpc()?.shutdown(&task.id)?;
        let line = |name: &str| {
            let found = out.lines().find_map(|l| l.strip_prefix(name));
            found.unwrap_or_default().trim().to_owned()
        };
        Ok::<_, casemate_tests::skip::Stop>((line("CapBnd:"), line("NoNewPrivs:")))
    };
    let (bounding, _) = status("capabilities", "CAP_KILL,CAP_CHOWN", "")?;
    ensure_eq!(bounding, "0000000000000021", "capabilities that narrow");
    // The profile that is asked for is the one that is installed: chroot is one
    // of the calls that strict has not.
    let chroot = |key: &str| {
        let mut task = annotated(key, "strict", "", &["/bin/chroot", "/", "/bin/true"])?;
        if key == "none" {
            task.spec["annotations"] = json!({});
        }
        let (deleted, _) = task.run_to_end()?;
        task.rpc()?.shutdown(&task.id)?;
        Ok::<_, casemate_tests::skip::Stop>(deleted.exit_status)
    };
    ensure_eq!(chroot("none")?, 0, "chroot under default");
    ensure!(chroot("profile")? != 0, "chroot under strict");
    // By leave, looser: compat honours noNewPrivileges = false.
    let leave = "[annotations]\nallow = [\"profile\"]\n";
    let mut task = annotated(
        "profile",
        "compat",
        leave,
        &["/bin/cat", "/proc/self/status"],
    )?;
    task.spec["process"]["noNewPrivileges"] = json!(false);
    let (_, out) = task.run_to_end()?;
    task.rpc()?.shutdown(&task.id)?;
    ensure!(out.contains("NoNewPrivs:\t0"), "{out}");
    Ok(())
}

fn policy_capabilities_and_images() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("capability", &["/bin/true"])?;
    task.spec["process"]["capabilities"]["bounding"] = json!(["CAP_KILL", "CAP_NET_ADMIN"]);
    let said = told(task)?;
    ensure!(
        said.contains("CAP_NET_ADMIN (process.capabilities)")
            && said.contains("capabilities.allow"),
        "{said}"
    );
    let image = |name: &str| {
        let mut task = Task::new("image", &["/bin/true"])?;
        configure(
            &mut task,
            "[images]\nregistries = [\"registry.example.com\"]\n",
        )?;
        spec::annotate(&mut task.spec, "io.kubernetes.cri.image-name", name);
        Ok::<_, casemate_tests::skip::Stop>(task)
    };
    let said = told(image("nginx:1")?)?;
    ensure!(
        said.contains("nginx:1") && said.contains("images.registries"),
        "{said}"
    );
    let said = told(image("")?)?;
    ensure!(said.contains("whose name isn't known"), "{said}");
    let mut fine = image("registry.example.com/a:1")?;
    ensure_eq!(fine.run_to_end()?.0.exit_status, 0, "a known registry");
    fine.rpc()?.shutdown(&fine.id)?;
    Ok(())
}

fn sleeper(config: &str) -> Result<Task, casemate_tests::skip::Stop> {
    let mut task = Task::new("execs", &["/bin/probe", "sleep"])?;
    configure(&mut task, config)?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    Ok(task)
}

fn policy_exec_denied_and_contained() -> Outcome {
    casemate_only()?;
    let task = sleeper("[exec]\npolicy = \"deny\"\n")?;
    let exec = Exec::sh(&task, "e1", "echo ran > /ran")?;
    exec.add()?;
    expect_text("a denied exec", exec.start(), "execs are refused")?;
    let refusals = records(&task, "policy_refusal")?;
    ensure_eq!(refusals.len(), 1, "refusals: {refusals:?}");
    ensure_eq!(refusals[0]["rule"], "exec-denied", "its rule");
    ensure!(!task.side.join("upper/ran").exists(), "it ran");
    task.finish()?;

    let task = sleeper("[exec]\nusers = \"container\"\nterminal = false\n")?;
    let run = |id: &str, change: &dyn Fn(&mut Exec)| {
        let mut exec = Exec::sh(&task, id, "echo ran; grep CapBnd /proc/self/status")?;
        change(&mut exec);
        exec.add()?;
        exec.start()?;
        Ok::<_, casemate_tests::Failure>((exec.wait()?, exec.stdout.text(SHORT)?))
    };
    let (status, out) = run("plain", &|_| ())?;
    ensure!(status == 0 && out.starts_with("ran\n"), "{status} {out}");
    let other = run("other", &|e| e.process["user"]["uid"] = json!(1000));
    expect_text("another user", other, "another user or group")?;
    let more = run("more", &|e| {
        e.process["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN"]);
    });
    expect_text(
        "more capabilities",
        more,
        "more capabilities than its container",
    )?;
    let terminal = Exec::sh(&task, "tty", "true")?.with_terminal(24, 80)?;
    terminal.add()?;
    expect_text("a terminal", terminal.start(), "with a terminal is refused")?;
    let rules: Vec<Value> = records(&task, "policy_refusal")?
        .iter()
        .map(|r| r["rule"].clone())
        .collect();
    ensure_eq!(
        rules,
        ["exec-user", "exec-capabilities", "exec-terminal"],
        "rules"
    );
    ensure_eq!(
        records(&task, "exec")?.len(),
        0,
        "records where none are asked for"
    );
    Ok(task.finish()?)
}

fn policy_exec_is_recorded() -> Outcome {
    casemate_only()?;
    for argv in [false, true] {
        let task = sleeper(&format!(
            "[exec]\npolicy = \"record\"\nrecord_argv = {argv}\n"
        ))?;
        let secret = "exit 7; : hunter2";
        let mut exec = Exec::sh(&task, "e1", secret)?;
        exec.process["user"] = json!({"uid": 7, "gid": 8});
        exec.begin()?;
        ensure_eq!(exec.wait()?, 7, "exit");
        let mut ends = Vec::new();
        until("the record of its end", SHORT, || {
            ends = records(&task, "exec_end").unwrap_or_default();
            !ends.is_empty()
        })?;
        ensure_eq!(
            (&ends[0]["exec"], &ends[0]["status"]),
            (&json!("e1"), &json!(7)),
            "end"
        );
        let [record] = &records(&task, "exec")?[..] else {
            return fail("not one record");
        };
        let hash = casemate_tests::image::oci::sha256(b"/bin/sh\0-c\0exit 7; : hunter2\0");
        ensure_eq!(record["argv_sha256"], hash.as_str(), "hash");
        ensure_eq!(record["user"], "7:8", "user");
        ensure_eq!(record["container"], task.id.as_str(), "container");
        ensure!(
            record["at"].as_str().is_some_and(|at| at.contains('T')),
            "{record}"
        );
        if argv {
            ensure_eq!(
                record["argv"],
                json!(["/bin/sh", "-c", secret]),
                "arguments"
            );
        } else {
            ensure!(!record.to_string().contains("hunter2"), "{record}");
        }
        // Nor does the log have them.
        let log = String::from_utf8_lossy(&task.log.so_far()).into_owned();
        ensure!(!log.contains("hunter2"), "log: {log}");
        task.finish()?;
    }
    Ok(())
}

fn policy_doctor_finds_what_stops_pods() -> Outcome {
    casemate_only()?;
    let scratch = tempfile::tempdir_in("/tmp")?;
    let path = scratch.path().join("config.toml");
    let path = path.display().to_string();
    let missing = casemate(&["doctor", "--config", &path])?;
    ensure!(
        missing.code() == 1 && missing.out().contains("there is no such file"),
        "{}",
        missing.out()
    );
    fs::write(&path, "")?;
    let fine = casemate(&["doctor", "--config", &path])?;
    ensure!(
        fine.code() == 0 && fine.out().contains("config: ok: 1 file"),
        "{}",
        fine.out()
    );
    fs::write(&path, "[exec]\npolicy = \"maybe\"\n")?;
    fs::create_dir(scratch.path().join("config.d"))?;
    fs::write(scratch.path().join("config.d/1.toml"), "[ids]\ncount = 0\n")?;
    let bad = casemate(&["doctor", "--config", &path])?;
    ensure_eq!(bad.code(), 1, "exit");
    for part in [
        &*format!("{path}:2: exec.policy = \"maybe\": "),
        "record",
        "config.d/1.toml:2: ids.count = 0: ",
        "use 1 or more",
    ] {
        ensure!(bad.out().contains(part), "{:?} lacks {part:?}", bad.out());
    }
    let json = casemate(&["doctor", "--config", &path, "--json"])?;
    let found: Value = serde_json::from_str(&json.out())?;
    ensure_eq!(json.code(), 1, "exit with --json");
    ensure_eq!(found["problems"][0]["key"], "exec.policy", "{found}");
    ensure_eq!(found["problems"][1]["line"], 2, "{found}");
    // And a pod says no as well.
    let mut task = Task::new("doctor", &["/bin/true"])?;
    configure(&mut task, "[exec]\npolicy = \"maybe\"\n")?;
    ensure!(told(task)?.contains("exec.policy"), "a pod's own words");
    Ok(())
}
