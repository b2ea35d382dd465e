//! `casemate metrics` of living pods: the numbers are the kernel's, a shim that is
//! stuck holds up nobody, and nothing runs while nobody asks.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, command, lines};
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{LONG, ready};

crate::trials![
    metrics_are_what_the_kernel_has,
    metrics_of_a_stuck_shim,
    metrics_over_http,
    metrics_cost_nothing_while_nobody_asks,
    metrics_to_a_textfile,
];

/// The number of a family that belongs to a task, with these labels besides.
fn sample(page: &str, name: &str, task: &Task, more: &[(&str, &str)]) -> Option<f64> {
    let own = format!("sandbox=\"{}\"", task.id);
    let more: Vec<String> = more.iter().map(|(k, v)| format!("{k}=\"{v}\"")).collect();
    page.lines()
        .filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(&own))
        .find(|line| more.iter().all(|part| line.contains(part.as_str())))
        .and_then(|line| line.rsplit(' ').next()?.parse().ok())
}

/// Fails unless it is text that Prometheus reads, each family once.
fn well_formed(page: &str) -> Outcome {
    let mut family = String::new();
    let mut seen = std::collections::BTreeSet::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            family = rest.split(' ').next().unwrap_or_default().to_owned();
            ensure!(seen.insert(family.clone()), "{family} twice");
            continue;
        }
        if line.starts_with("# TYPE ") {
            ensure!(line.contains(&family), "{line} after {family}");
            continue;
        }
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let value = line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok());
        ensure!(name == family && value.is_some(), "{line:?} in {family}");
    }
    Ok(())
}

fn metrics_are_what_the_kernel_has() -> Outcome {
    ready()?;
    let script = "/bin/probe refused 3 mount; exec /bin/probe sleep";
    let mut task = Task::new("metrics", &["/bin/sh", "-c", script])?;
    // Names are whatever a specification says.
    let id = task.id.clone();
    for (key, value) in [
        ("io.kubernetes.cri.sandbox-id", id.as_str()),
        ("io.kubernetes.cri.sandbox-name", "we\"b\\0\n# TYPE x gauge"),
        ("io.kubernetes.cri.sandbox-namespace", "team"),
    ] {
        task.spec["annotations"][key] = json!(value);
    }
    task.spec["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20 });
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let mut page = String::new();
    let denied = |page: &str| {
        let mut lines = page.lines();
        lines.any(|line| {
            line.starts_with("casemate_denied_calls_total{")
                && line.contains(&format!("sandbox=\"{}\"", task.id))
                && line.ends_with(" 3")
        })
    };
    until("the refused calls to be counted", LONG, || {
        page = casemate(&["metrics"]).map(|o| o.out()).unwrap_or_default();
        denied(&page)
    })
    .map_err(|error| Stop::Fail(format!("{error}: {page}")))?;
    well_formed(&page)?;
    let of = |name: &str, more: &[(&str, &str)]| sample(&page, name, &task, more);
    ensure_eq!(of("casemate_sandbox_up", &[]), Some(1.0), "up");
    ensure_eq!(
        of(
            "casemate_container_memory_limit_bytes",
            &[("container", &task.id)]
        ),
        Some(f64::from(64 << 20)),
        "limit"
    );
    ensure_eq!(
        of("casemate_sandbox_containers", &[("state", "running")]),
        Some(1.0),
        "containers"
    );
    ensure!(
        page.contains("namespace=\"team\"") && page.contains("pod=\"we\\\"b\\\\0\\n# TYPE"),
        "{page}"
    );
    ensure!(page.contains("rule=\"default/"), "no rule in {page}");
    // Memory is what the cgroup says, give or take what changes meanwhile.
    let pods = lines(&["ps", "--json"])?;
    let pods = pods.first().and_then(Value::as_array).cloned();
    let pods = pods.unwrap_or_default();
    let own = pods.iter().find(|pod| pod["pod"] == task.id);
    let used = own.and_then(|p| p["containers"][0]["sandbox"]["usage"]["memory"].as_f64());
    let told = of("casemate_container_memory_bytes", &[]);
    let (Some(used), Some(told)) = (used, told) else {
        return fail(format!("memory {used:?} and {told:?}"));
    };
    ensure!(
        (used - told).abs() < f64::from(8 << 20),
        "{used} and {told}"
    );
    for process in ["shim", "agent"] {
        let pss = of("casemate_sandbox_overhead_bytes", &[("process", process)]);
        ensure!(pss.is_some_and(|pss| pss > 1000.0), "{process}: {pss:?}");
    }
    ensure!(
        of("casemate_guard_packets_total", &[("direction", "egress")]).is_some(),
        "no guard in {page}"
    );
    Ok(task.finish()?)
}

fn metrics_of_a_stuck_shim() -> Outcome {
    ready()?;
    let stuck = Task::sleeping("stuck")?;
    let well = Task::sleeping("well")?;
    let shim = stuck.shim_pid()?;
    procs::signal(shim, Signal::STOP);
    let page = casemate(&["metrics"]);
    procs::signal(shim, Signal::CONT);
    let page = page?.ok()?.out();
    ensure_eq!(
        sample(&page, "casemate_sandbox_up", &stuck, &[]),
        Some(0.0),
        "stuck"
    );
    ensure_eq!(
        sample(&page, "casemate_sandbox_up", &well, &[]),
        Some(1.0),
        "well"
    );
    // A second is its time, and a call would wait for five; the rest is what a busy
    // machine takes.
    let took = page
        .lines()
        .find_map(|line| line.strip_prefix("casemate_scrape_duration_seconds "))
        .and_then(|seconds| seconds.parse::<f64>().ok());
    ensure!(took.is_some_and(|took| took < 4.0), "it took {took:?}");
    let page = casemate(&["metrics"])?.ok()?.out();
    ensure_eq!(
        sample(&page, "casemate_sandbox_up", &stuck, &[]),
        Some(1.0),
        "again"
    );
    stuck.finish()?;
    Ok(well.finish()?)
}

/// An exporter and its port.
struct Exporter {
    child: Child,
    port: u16,
}

impl Exporter {
    fn start() -> Result<Self, Stop> {
        let mut child = command(&["metrics", "--listen", "127.0.0.1:0"])?
            .stderr(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(stderr) = child.stderr.take() {
            BufReader::new(stderr).read_line(&mut line)?;
        }
        let port = line
            .rsplit_once(':')
            .and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
        match port {
            Some(port) => Ok(Self { child, port }),
            None => {
                let _gone = child.kill();
                let _reaped = child.wait();
                fail(format!("no address in {line:?}"))
            }
        }
    }

    fn ask(&self, request: &str) -> Result<String, Stop> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(SHORT))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn metrics_over_http() -> Outcome {
    ready()?;
    let task = Task::sleeping("http")?;
    let exporter = Exporter::start()?;
    let get = |path: &str, verb: &str| {
        let request = format!("{verb} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        exporter.ask(&request)
    };
    // Clients that say nothing, or nonsense, keep no other waiting.
    let silent: Vec<_> = (0..4)
        .map(|_| TcpStream::connect(("127.0.0.1", exporter.port)))
        .collect();
    let _refused = exporter.ask("nonsense\r\n\r\n");
    let page = get("/metrics", "GET")?;
    ensure!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
    ensure!(page.contains("text/plain; version=0.0.4"), "{page}");
    let body = page.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    well_formed(body)?;
    ensure_eq!(
        sample(body, "casemate_sandbox_up", &task, &[]),
        Some(1.0),
        "up"
    );
    ensure!(get("/", "GET")?.starts_with("HTTP/1.1 404"), "another path");
    ensure!(get("/metrics", "POST")?.starts_with("HTTP/1.1 405"), "POST");
    drop(silent);
    Ok(task.finish()?)
}

fn metrics_cost_nothing_while_nobody_asks() -> Outcome {
    ready()?;
    let task = Task::sleeping("idle")?;
    let shim = task.shim_pid()?;
    let files = || fs::read_dir(format!("/proc/{shim}/fd")).map(Iterator::count);
    let alone = files()?;
    let exporter = Exporter::start()?;
    let switches = |pid: u32| procs::status_field(pid, "voluntary_ctxt_switches");
    let pid = exporter.child.id();
    // It is asleep once this stands still.
    let mut last = None;
    until("the exporter to wait", SHORT, || {
        std::thread::sleep(Duration::from_millis(200));
        let now = switches(pid);
        std::mem::replace(&mut last, now.clone()) == now
    })?;
    let before = switches(pid);
    std::thread::sleep(Duration::from_secs(2));
    ensure_eq!(switches(pid), before, "it woke up");
    // Commands of other trials connect as well, and go again.
    until("no connection to the shim", SHORT, || {
        files().is_ok_and(|now| now <= alone)
    })?;
    Ok(task.finish()?)
}

fn metrics_to_a_textfile() -> Outcome {
    ready()?;
    let task = Task::sleeping("textfile")?;
    let path = task.side.join("casemate.prom");
    let shown = path.display().to_string();
    for _ in 0..2 {
        casemate(&["metrics", "--textfile", &shown])?.ok()?;
        let page = fs::read_to_string(&path)?;
        well_formed(&page)?;
        ensure_eq!(
            sample(&page, "casemate_sandbox_up", &task, &[]),
            Some(1.0),
            "up"
        );
    }
    let left = fs::read_dir(&task.side)?.flatten();
    let left = left.filter(|e| e.file_name().to_string_lossy().starts_with(".casemate"));
    ensure_eq!(left.count(), 0, "unfinished files");
    let nowhere = casemate(&["metrics", "--textfile", "/nonexistent/x.prom"])?;
    ensure_eq!(nowhere.code(), 125, "exit code");
    Ok(task.finish()?)
}
