//! `casemate collect`: a report has what it should, and nothing of what a workload
//! was given.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use casemate_tests::bundle::Task;
use casemate_tests::operator::command;
use casemate_tests::pod;
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{LONG, configure, ready};

crate::trials![
    collect_has_what_it_should_and_no_secrets,
    collect_beside_a_stuck_shim,
];

fn collect(task: &Task, args: &[&str]) -> Result<Output, Stop> {
    let mut all = vec!["collect"];
    all.extend(args);
    let mut command = command(&all)?;
    command.env("CASEMATE_CONFIG", task.side.join("config.toml"));
    Ok(run(&mut command, &[], LONG)?)
}

/// Names and contents of a report.
fn unpack(path: &Path) -> Result<Vec<(String, String)>, Stop> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(fs::File::open(path)?));
    let mut all = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let name = name.split_once('/').map_or("", |(_, rest)| rest).to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text)?;
        all.push((name, text));
    }
    Ok(all)
}

fn file<'a>(all: &'a [(String, String)], name: &str) -> Result<&'a str, Stop> {
    let found = all.iter().find(|(own, _)| own == name);
    found
        .map(|(_, text)| text.as_str())
        .ok_or_else(|| Stop::Fail(format!("no {name}")))
}

fn collect_has_what_it_should_and_no_secrets() -> Outcome {
    ready()?;
    let script = "/bin/probe refused 1 mount; sleep 1000; : canary-in-argv";
    let mut task = Task::new("collect", &["/bin/sh", "-c", script])?;
    if let Some(env) = task.spec["process"]["env"].as_array_mut() {
        env.push(json!("DB_PASSWORD=canary-in-environment"));
    }
    for (key, value) in [
        ("example.com/token", "canary-in-annotation"),
        ("casemate.io/egress", "192.0.2.77:443"),
    ] {
        task.spec["annotations"][key] = json!(value);
    }
    let volume = task.side.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("token"), "canary-in-volume")?;
    if let Some(mounts) = task.spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": "/secret", "type": "bind", "source": volume,
            "options": ["bind", "ro"],
        }));
    }
    // Records then have arguments, for who asks for events.
    configure(
        &mut task,
        "[exec]\npolicy = \"record\"\nrecord_argv = true\n",
    )?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let exec = "sleep 1000; : canary-in-exec";
    pod::exec(&task, "e", &["/bin/sh", "-c", exec])?;
    until("the exec to be recorded", LONG, || {
        let told = casemate_tests::operator::casemate(&["events", &task.id]);
        told.is_ok_and(|told| told.out().contains("canary-in-exec"))
    })?;
    // A containerd with credentials, and a log of it with those of somebody.
    let containerd = task.side.join("containerd.toml");
    fs::write(
        &containerd,
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"r\".auth]\n\
         password = \"canary-in-registry\"\n",
    )?;
    let log = task.side.join("containerd.log");
    fs::write(
        &log,
        format!(
            "level=error msg=\"casemate: {}: TOKEN canary-in-environment\"\n\
             level=info msg=\"of somebody else canary-elsewhere\"\n",
            task.id
        ),
    )?;
    let report = task.side.join("report.tar.gz");
    let [shown, config, log] = [&report, &containerd, &log].map(|p| p.display().to_string());
    let args = ["-o", &shown, "--containerd-config", &config, "--log", &log];
    let said = collect(&task, &args)?.ok()?;
    ensure!(said.out().contains("look into it"), "{}", said.out());
    let mode = fs::metadata(&report)?.permissions().mode() & 0o777;
    ensure_eq!(mode, 0o600, "mode of the report");

    let all = unpack(&report)?;
    for (name, text) in &all {
        let canary = text.find("canary").map(|at| {
            let begin = text.floor_char_boundary(at.saturating_sub(60));
            let end = text.floor_char_boundary((at + 60).min(text.len()));
            &text[begin..end]
        });
        ensure!(canary.is_none(), "{name} has {canary:?}");
        ensure!(!text.contains("192.0.2.77:443"), "{name} has an annotation");
    }
    let ps: Value = serde_json::from_str(file(&all, "ps.json")?)?;
    let own = ps.as_array().into_iter().flatten();
    let own = own.into_iter().find(|pod| pod["pod"] == task.id);
    let Some(at) = own.and_then(|pod| pod["files"].as_str()) else {
        return casemate_tests::skip::fail(format!("the pod is not in {ps}"));
    };
    let inspected: Value = serde_json::from_str(file(&all, &format!("{at}/inspect.json"))?)?;
    ensure_eq!(inspected["pod"], json!(task.id), "inspect.json");
    ensure!(
        file(&all, &format!("{at}/why.json"))?.contains("\"mount\""),
        "why.json has no refusal"
    );
    let posture: Value = serde_json::from_str(file(&all, &format!("{at}/posture.json"))?)?;
    ensure_eq!(posture["found"]["deviations"], json!([]), "posture.json");
    let doctor: Value = serde_json::from_str(file(&all, "doctor.json")?)?;
    ensure!(
        doctor["checks"].as_array().is_some_and(|c| c.len() > 20),
        "doctor.json"
    );
    let configured: Value = serde_json::from_str(file(&all, "config.json")?)?;
    ensure_eq!(configured["exec"]["policy"], json!("record"), "config.json");
    let releases: Value = serde_json::from_str(file(&all, "releases.json")?)?;
    ensure!(
        releases["containerd"]["release"].is_string()
            && releases["shim_and_agent"]
                .as_array()
                .is_some_and(|b| b.len() == 2),
        "{releases}"
    );
    ensure!(file(&all, "log.txt")?.contains("[redacted]"), "log.txt");
    ensure!(file(&all, "metrics.txt")?.contains(&task.id), "metrics.txt");
    let exec = file(&all, "events.jsonl")?
        .lines()
        .find(|line| line.contains("\"exec\"") && line.contains(&task.id))
        .map(str::to_owned);
    ensure!(
        exec.as_ref()
            .is_some_and(|line| line.contains("argv_sha256")),
        "the exec in events.jsonl: {exec:?}"
    );

    // What is there is nobody's to overwrite.
    let again = collect(&task, &args)?;
    ensure!(
        again.code() == 125 && again.err().contains("exists"),
        "{} {}",
        again.code(),
        again.err()
    );
    Ok(task.finish()?)
}

fn collect_beside_a_stuck_shim() -> Outcome {
    ready()?;
    let task = Task::sleeping("collectstuck")?;
    fs::write(task.side.join("config.toml"), "")?;
    let report = task.side.join("report.tar.gz");
    let shim = task.shim_pid()?;
    procs::signal(shim, Signal::STOP);
    let said = collect(&task, &["-o", &report.display().to_string()]);
    procs::signal(shim, Signal::CONT);
    said?.ok()?;
    let all = unpack(&report)?;
    let errors = file(&all, "errors.txt")?;
    ensure!(errors.contains("pods/"), "errors.txt: {errors}");
    file(&all, "doctor.json")?;
    Ok(task.finish()?)
}
