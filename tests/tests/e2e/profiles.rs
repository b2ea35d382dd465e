//! Profiles of the node: what a pod gets that asks for one, what is refused, and the
//! commands that make them of recordings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_posture::Depth;
use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::{ask, casemate, command, deviations};
use casemate_tests::pod::{init, say};
use casemate_tests::run::{run, until};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, spec};
use seccomp_profiles::profile::{Group, Rule};
use seccomp_profiles::recording::{Base, Container, Pod};
use seccomp_profiles::{
    Action, Form, Hash, Prepared, Profile, Recording, export, shipped, shipped_program, table,
};
use serde_json::{Value, json};

use crate::common::{LONG, casemate_only, expect_text};
use crate::hostile_node::configure;
use crate::profiles_least::{PROBE, PROGRAMS};

crate::trials![
    profiles_of_the_node_bind,
    profiles_of_a_living_pod_stay,
    profiles_only_tighten_without_leave,
    profiles_that_are_bad_start_nothing,
    profiles_from_recordings_by_command,
    profiles_exported_run_under_runc,
];

/// Fails without.
const LINK: &[&str] = &["/bin/ln", "-s", "x", "/link"];

/// What asks for one.
pub const ANNOTATION: &str = "casemate.io/profile";

/// A directory of profiles for the task, and the configuration that names it.
pub fn profiles(task: &mut Task, text: &str) -> Result<PathBuf, Stop> {
    let directory = task.side.join("profiles");
    fs::create_dir_all(&directory)?;
    let path = directory.display();
    configure(
        task,
        &format!("{text}\n[profiles]\ndirectory = \"{path}\"\n"),
    )?;
    Ok(directory)
}

pub fn put(directory: &Path, profile: &Profile) -> Outcome {
    let path = directory.join(format!("{}.toml", profile.name));
    Ok(fs::write(path, export::toml(profile))?)
}

pub fn one(name: &str) -> Result<Profile, Stop> {
    shipped(name).ok_or_else(|| Stop::Fail(format!("no profile {name}")))
}

/// All that `within` allows but symbolic links, which are refused with an error of
/// their own.
fn without_links(name: &str, within: &str) -> Result<Profile, Stop> {
    let mut profile = one(within)?;
    profile.name = name.to_owned();
    profile.within = Some(within.to_owned());
    let rule = Rule {
        syscalls: vec!["symlink".to_owned(), "symlinkat".to_owned()],
        args: Vec::new(),
        reason: "a server that makes no links needs none".to_owned(),
        quiet: false,
    };
    let group = Group {
        name: "No links".to_owned(),
        action: Action::Errno(95),
        rules: vec![rule],
    };
    profile.groups.insert(0, group);
    Ok(profile)
}

pub fn denials(task: &Task) -> Result<Vec<Value>, Stop> {
    let told = ask(task.rpc()?, "Denials", &json!({}), SHORT)?;
    Ok(told["denials"].as_array().cloned().unwrap_or_default())
}

/// Refused calls of which the shipped profile refuses none.
pub fn unseen(task: &Task) -> Result<Vec<String>, Stop> {
    let cut = |d: &&Value| d["reason"].as_str().is_some_and(|r| r.contains("not seen"));
    let all = denials(task)?;
    let told = |d: &Value| format!("{} {} {}", d["syscall"], d["class"], d["rule"]);
    Ok(all.iter().filter(cut).map(told).collect())
}

pub fn as_promised(task: &Task) -> Outcome {
    let found = deviations(task, Depth::Whole)?;
    ensure!(found.is_empty(), "not as promised: {found:?}");
    Ok(())
}

fn profiles_of_the_node_bind() -> Outcome {
    casemate_only()?;
    for broker in [true, false] {
        let mut task = Task::new("named", &["/bin/probe", "sleep"])?;
        let text = format!("[broker]\nenabled = {broker}\n");
        let profile = without_links("linkless", "default")?;
        put(&profiles(&mut task, &text)?, &profile)?;
        spec::annotate(&mut task.spec, ANNOTATION, "linkless");
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;

        let prepared = Prepared::of(&profile).map_err(|e| Stop::Fail(e.to_string()))?;
        let form = if broker { Form::Notify } else { Form::Enforce };
        let installed = casemate_sys::seccomp::filters_of(init(&task)?)?;
        let own = installed.last().map(|bytes| Hash::of(bytes));
        ensure_eq!(
            own,
            Some(Hash::of(prepared.program(form))),
            "the filter that is installed"
        );
        as_promised(&task)?;
        let told = ask(task.rpc()?, "Inspect", &json!({}), SHORT)?;
        let about = &told["containers"][0]["sandbox"];
        ensure_eq!(about["profile"], "linkless", "profile of {about}");
        let hash = prepared.hash().to_string();
        ensure_eq!(about["profile_hash"], hash.as_str(), "hash of {about}");

        // EOPNOTSUPP: no other profile answers with it.
        let exec = Exec::new(&task, "u", LINK)?;
        exec.begin()?;
        ensure!(exec.wait()? != 0, "a link can be made");
        let said = exec.stderr.text(SHORT)?;
        ensure!(said.contains("not supported"), "ln says {said:?}");
        if broker {
            let denied = || {
                let of = |d: &&Value| {
                    d["syscall"]
                        .as_str()
                        .is_some_and(|s| s.starts_with("symlink"))
                };
                denials(&task).ok()?.iter().find(of).cloned()
            };
            until("a denial", LONG, || denied().is_some())?;
            let link = denied().unwrap_or_default();
            ensure_eq!(link["profile"], "linkless", "profile of {link}");
            ensure_eq!(link["rule"], "linkless/no-links/1", "rule of {link}");
            ensure_eq!(link["allowed_by"], "strict", "what allows {link}");
            let why = casemate(&["why", &task.id])?.ok()?.out();
            ensure!(why.contains("makes no links"), "why says {why}");
        }
        task.finish()?;
    }
    Ok(())
}

/// What a living pod's containers have doesn't change with the file.
fn profiles_of_a_living_pod_stay() -> Outcome {
    casemate_only()?;
    let mut pause = casemate_tests::pod::pause("namedpod")?;
    let directory = profiles(&mut pause, "")?;
    put(&directory, &without_links("linkless", "default")?)?;
    spec::annotate(&mut pause.spec, ANNOTATION, "linkless");
    pause.boot()?;
    let pid = pause.create()?.pid;
    pause.rpc()?.start(&pause.id)?;
    let pod = casemate_tests::pod::Pod { pause, pid };
    let names = ["/bin/probe", "sleep"];
    let first = pod.run("namedfirst", &names, casemate_tests::pod::Pids::Own)?;
    for change in ["other", "gone"] {
        match change {
            "other" => fs::write(directory.join("linkless.toml"), "no profile")?,
            _ => fs::remove_file(directory.join("linkless.toml"))?,
        }
        let name = format!("named{change}");
        let later = pod.run(&name, &names, casemate_tests::pod::Pids::Own)?;
        for task in [&first, &later] {
            let exec = Exec::new(task, change, LINK)?;
            exec.begin()?;
            ensure!(exec.wait()? != 0, "a link can be made");
        }
        let filters = |task: &Task| Ok::<_, Stop>(casemate_sys::seccomp::filters_of(init(task)?)?);
        ensure_eq!(filters(&first)?, filters(&later)?, "filters, {change}");
        pod.remove(later)?;
    }
    as_promised(&pod.pause)?;
    pod.remove(first)?;
    Ok(pod.finish()?)
}

fn profiles_only_tighten_without_leave() -> Outcome {
    casemate_only()?;
    let make = |text: &str, asked: &str| -> Result<Task, Stop> {
        let mut task = Task::new("leave", &["/bin/probe", "sleep"])?;
        let directory = profiles(&mut task, text)?;
        put(&directory, &without_links("wide", "compat")?)?;
        put(&directory, &without_links("narrow", "strict")?)?;
        spec::annotate(&mut task.spec, ANNOTATION, asked);
        Ok(task)
    };
    let mut task = make("", "wide")?;
    task.boot()?;
    expect_text("wide", task.create(), "would loosen")?;
    let mut task = make("", "none")?;
    let missing = format!("{}/none.toml", task.side.join("profiles").display());
    task.boot()?;
    expect_text("none", task.create(), &missing)?;
    for (text, asked) in [
        ("", "narrow"),
        ("[annotations]\nallow = [\"profile\"]\n", "wide"),
        ("profile = \"compat\"\n", "wide"),
    ] {
        let mut task = make(text, asked)?;
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        as_promised(&task)?;
        task.finish()?;
    }
    Ok(())
}

fn profiles_that_are_bad_start_nothing() -> Outcome {
    casemate_only()?;
    let wide = {
        let mut profile = without_links("bad", "compat")?;
        profile.within = Some("strict".to_owned());
        export::toml(&profile)
    };
    for (text, mode, expected) in [
        ("name =", 0o644, "line 1"),
        (&*wide, 0o644, "which strict answers with"),
        ("", 0o666, "chmod go-w"),
    ] {
        let mut task = Task::new("bad", &["/bin/true"])?;
        let path = profiles(&mut task, "")?.join("bad.toml");
        fs::write(&path, text)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(&path, mode)?;
        spec::annotate(&mut task.spec, ANNOTATION, "bad");
        task.boot()?;
        let error = match task.create() {
            Ok(_) => return Err(Stop::Fail(format!("{expected}: it starts"))),
            Err(error) => error.to_string(),
        };
        ensure!(
            error.contains(expected) && error.contains("bad.toml"),
            "expected {expected}: {error}"
        );
        let config = task.side.join("config.toml").display().to_string();
        let doctor = casemate(&["doctor", "--config", &config])?;
        ensure_eq!(doctor.code(), 1, "doctor's exit status");
        ensure!(
            doctor.out().contains("bad.toml") && doctor.out().lines().count() == 1,
            "doctor says {}",
            doctor.out()
        );
        let list = run(
            &mut command(&["profile", "--config", &config, "list"])?,
            &[],
            SHORT,
        )?;
        ensure_eq!(list.code(), 1, "list's exit status");
        ensure!(list.out().contains(expected), "list says {}", list.out());
    }
    Ok(())
}

/// A recording of a web server that also mounts, and of its neighbour.
fn recording() -> Result<Recording, Stop> {
    let fail = |e: seccomp_profiles::RecordingError| Stop::Fail(e.to_string());
    let hash = shipped_program("default").map(|program| Hash::of(program).to_string());
    let base = Base {
        name: "default".to_owned(),
        hash: hash.unwrap_or_default(),
    };
    let mut web = Container::new("abc", base.clone());
    let call = |one: &mut Container, name: &str, args: [u64; 6]| {
        one.call(table::number(name).unwrap_or(0), &args, 1);
    };
    for name in PROBE.iter().chain(PROGRAMS) {
        call(&mut web, name, [0; 6]);
    }
    call(&mut web, "socket", [2, 1, 6, 0, 0, 0]);
    call(&mut web, "inotify_init1", [0; 6]);
    web.bound(80);
    web.connected(5432);
    web.path("/usr/share/x");
    let mut recording = Recording::new(Pod {
        id: "p1".to_owned(),
        ..Pod::default()
    });
    recording.add("web", web).map_err(fail)?;
    recording
        .add("sidecar", Container::new("def", base))
        .map_err(fail)?;
    Ok(recording)
}

fn profiles_from_recordings_by_command() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("exported", &["/bin/sh", "-c", "exec /bin/probe sleep"])?;
    let directory = profiles(&mut task, "")?;
    let config = task.side.join("config.toml").display().to_string();
    let learned = task.side.join("learned");
    fs::create_dir(&learned)?;
    let json = recording()?
        .to_json()
        .map_err(|e| Stop::Fail(e.to_string()))?;
    for name in ["a.json", "b.json"] {
        fs::write(learned.join(name), &json)?;
    }
    let learned = learned.display().to_string();
    let profile = |args: &[&str]| -> Result<casemate_tests::run::Output, Stop> {
        let all: Vec<&str> = ["profile", "--config", &config]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        Ok(run(&mut command(&all)?, &[], SHORT)?)
    };
    let two = profile(&["export", &learned])?;
    ensure_eq!(two.code(), 125, "of two containers: {}", two.err());
    ensure!(
        two.err().contains("sidecar, web") && two.err().contains("--container"),
        "said of two containers: {}",
        two.err()
    );
    let file = directory.join("web.toml").display().to_string();
    let export = ["export", "--container", "web", "-o", &file, &learned];
    let written = profile(&export)?.ok()?;
    ensure_eq!(written.err(), "", "warnings");
    let text = fs::read_to_string(&file)?;
    for part in [
        "casemate.io/ingress: \"0.0.0.0/0:80\"",
        "casemate.io/egress: \"0.0.0.0/0:5432\"",
        "paths in: /usr",
        "within = \"default\"",
        "name = \"web\"",
    ] {
        ensure!(text.contains(part), "{part:?} is not in {text}");
    }
    ensure_eq!(
        profile(&["check", "web", &learned])?.ok()?.out(),
        "",
        "check"
    );
    let strict = profile(&["check", "--container", "web", "strict", &learned])?;
    ensure_eq!(strict.code(), 1, "check of strict");
    ensure!(
        strict.out().contains("web: set_robust_list: ") && !strict.out().contains(" openat: "),
        "check of strict says {}",
        strict.out()
    );
    let differ = profile(&["diff", "default", "web"])?;
    ensure_eq!(differ.code(), 1, "diff");
    ensure!(
        differ.out().contains("- splice: "),
        "diff: {}",
        differ.out()
    );
    ensure!(!differ.out().contains("\n+ "), "diff: {}", differ.out());
    ensure_eq!(
        profile(&["diff", "web", &file])?.code(),
        0,
        "diff with itself"
    );
    let list = profile(&["list"])?.ok()?.out();
    ensure!(list.contains("\nweb "), "list: {list}");
    let oci = profile(&["export", "--container", "web", "--format", "oci", &learned])?.ok()?;
    let oci: Value = serde_json::from_str(&oci.out()).map_err(|e| Stop::Fail(e.to_string()))?;
    ensure_eq!(oci["defaultAction"], "SCMP_ACT_ERRNO", "OCI");
    let named = ["export", "--container", "web", "--name", "a/b", &learned];
    ensure_eq!(profile(&named)?.code(), 125, "a bad name");
    let missing = profile(&["check", "webb", &learned])?;
    ensure!(
        missing.err().contains("casemate profile list"),
        "{}",
        missing.err()
    );

    // And a pod runs under what was written.
    spec::annotate(&mut task.spec, ANNOTATION, "web");
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    ensure_eq!(say(&task, "e", &["/bin/echo", "x"])?.trim(), "x", "an exec");
    let told = unseen(&task)?;
    ensure!(told.is_empty(), "refused: {told:?}");
    as_promised(&task)?;
    let none = profile(&["export", &task.id])?;
    ensure!(
        none.code() == 125,
        "of a pod that isn't learned from: {}",
        none.err()
    );
    Ok(task.finish()?)
}

/// What is exported for others is taken by runc, and binds there.
fn profiles_exported_run_under_runc() -> Outcome {
    casemate_only()?;
    if run(Command::new("runc").arg("--version"), &[], SHORT).is_err() {
        return Err(Stop::Skip("no runc".to_owned()));
    }
    let mut task = Task::new("runc", &["/bin/true"])?;
    profiles(&mut task, "")?;
    let file = task.side.join("a.json");
    let json = recording()?
        .to_json()
        .map_err(|e| Stop::Fail(e.to_string()))?;
    fs::write(&file, json)?;
    let file = file.display().to_string();
    let bundle = task.side.join("runc");
    fs::create_dir_all(&bundle)?;
    for format in ["oci", "resource"] {
        let args = [
            "profile",
            "export",
            "--container",
            "web",
            "--format",
            format,
            &file,
        ];
        let said = run(&mut command(&args)?, &[], SHORT)?.ok()?.out();
        let exported: Value = serde_json::from_str(&said).map_err(|e| Stop::Fail(e.to_string()))?;
        let filter = if format == "oci" {
            &exported
        } else {
            &exported["spec"]
        };
        let script = "echo runs; ln -s x /tmp/link 2>&1; grep Seccomp: /proc/self/status";
        let document = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "noNewPrivileges": true,
                "env": ["PATH=/bin"], "args": ["/bin/sh", "-c", script],
            },
            "root": {"path": World::get()?.base()?, "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "network"},
                    {"type": "ipc"}, {"type": "uts"},
                ],
                "cgroupsPath": format!("/{}", task.id),
                "seccomp": filter,
            },
        });
        fs::write(bundle.join("config.json"), document.to_string())?;
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(task.side.join("runc.state"));
        runc.args(["run", "--bundle"]).arg(&bundle).arg(&task.id);
        let output = run(&mut runc, &[], LONG)?;
        let said = output.out();
        ensure!(
            said.starts_with("runs\n") && said.contains("Seccomp:\t2"),
            "{format}: runc says {said:?}, {:?}",
            output.err()
        );
        // What wasn't recorded is refused there as well.
        ensure!(
            said.contains("not implemented"),
            "{format}: ln says {said:?}"
        );
    }
    Ok(())
}
