//! What Prometheus makes of our rules, dashboard and numbers: by promtool, its own.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use casemate_tests::run::{run, until};
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::{World, ensure, world};
use serde_json::Value;

use crate::server::{here, programs};

crate::kube_trials![
    alerts_fire_for_what_they_say,
    dashboard_asks_what_can_be_asked,
    metrics_are_as_prometheus_wants_them,
];

const LIMIT: Duration = Duration::from_secs(60);

fn promtool(args: &[&str], stdin: &[u8]) -> Result<String, Stop> {
    let program = programs().join("promtool");
    if !program.exists() {
        return skip("no promtool: scripts/apiserver.sh builds it");
    }
    let ran = run(Command::new(program).args(args), stdin, LIMIT)?;
    let said = format!("{}{}", ran.out(), ran.err());
    match ran.code() {
        0 => Ok(said),
        status => fail(format!("promtool {args:?}: status {status}: {said}")),
    }
}

fn alerts_fire_for_what_they_say() -> Outcome {
    let dir = World::get()?.dir().join("rules");
    fs::create_dir_all(&dir)?;
    let rules = dir.join("rules.yaml");
    fs::copy(here().join("runtimeclass/monitoring/rules.yaml"), &rules)?;
    let tests = dir.join("alerts.yaml");
    fs::copy(here().join("tests/tests/kube/rules/alerts.yaml"), &tests)?;
    let (rules, tests) = (rules.display().to_string(), tests.display().to_string());
    promtool(
        &["check", "rules", "--lint=all", "--lint-fatal", &rules],
        b"",
    )?;
    promtool(&["test", "rules", &tests], b"")?;
    // Each alert has its test.
    let tested = fs::read_to_string(&tests)?;
    for line in fs::read_to_string(&rules)?.lines() {
        if let Some(alert) = line.trim().strip_prefix("- alert: ") {
            let line = format!("alertname: {alert}");
            ensure!(tested.contains(&line), "{alert} has no test");
        }
    }
    Ok(())
}

fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("expr").and_then(Value::as_str).map(str::to_owned));
            map.values().for_each(|value| expressions(value, found));
        }
        Value::Array(all) => all.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

fn dashboard_asks_what_can_be_asked() -> Outcome {
    let text = fs::read_to_string(here().join("runtimeclass/monitoring/dashboard.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let mut all = Vec::new();
    expressions(&dashboard, &mut all);
    ensure!(all.len() > 10, "expressions: {all:?}");
    for expression in all {
        // As Grafana fills them in.
        let filled = expression
            .replace("$namespace", ".*")
            .replace("$__rate_interval", "1m");
        promtool(&["--experimental", "promql", "format", &filled], b"")?;
    }
    Ok(())
}

/// Of a node with a living pod that was refused something.
fn metrics_are_as_prometheus_wants_them() -> Outcome {
    let casemate = || Command::new(world::binaries().join("casemate"));
    let mut pod = casemate()
        .args([
            "run",
            "--",
            "sh",
            "-c",
            "mount -t tmpfs none /mnt; exec sleep 60",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut told = String::new();
    let seen = until("a pod with a refused call", LIMIT, || {
        told =
            run(casemate().arg("metrics"), b"", LIMIT).map_or_else(|_| String::new(), |o| o.out());
        told.contains("casemate_denied_calls_total{")
    });
    let checked = seen
        .map_err(Stop::from)
        .and_then(|_| promtool(&["check", "metrics"], told.as_bytes()));
    // Passed on to the command, which ends by it.
    if let Some(pid) = i32::try_from(pod.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    {
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    }
    pod.wait()?;
    checked.map(drop)
}
