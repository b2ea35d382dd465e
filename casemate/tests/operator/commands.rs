//! The rest of what the `casemate` command does for an operator: a page about the
//! node, figures, completions and manual pages.

use std::fs;
use std::process::Command;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, command};
use casemate_tests::run::{run, until};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, skip};
use casemate_tests::world::binaries;
use casemate_tests::{World, ensure, ensure_eq, leaks, procs};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{LONG, ready};

crate::trials![
    commands_report_of_a_node,
    commands_report_shows_what_is_wrong,
    commands_bench_beside_runc,
    commands_show_progress_on_terminals_alone,
    commands_complete_themselves,
    commands_have_manual_pages,
];

fn section<'a>(page: &'a str, task: &Task) -> Result<&'a str, Stop> {
    page.split("<section")
        .find(|part| part.contains(&task.id))
        .and_then(|part| part.split("</section>").next())
        .ok_or_else(|| Stop::Fail(format!("{} is not on the page", task.id)))
}

/// The page as it is now.
fn page(task: &Task, more: &[&str]) -> Result<String, Stop> {
    let file = task.side.join("node.html");
    let shown = file.display().to_string();
    let mut args = vec!["report", "--html", &shown];
    args.extend(more);
    run(&mut command(&args)?, &[], LONG)?.ok()?;
    Ok(fs::read_to_string(file)?)
}

fn commands_report_of_a_node() -> Outcome {
    ready()?;
    let script = "/bin/probe refused 4 mount; exec /bin/probe sleep";
    let mut task = Task::new("report", &["/bin/sh", "-c", script])?;
    let hostile = "<script>alert(1)</script>";
    task.spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!(task.id);
    for key in ["sandbox-name", "sandbox-namespace"] {
        task.spec["annotations"][format!("io.kubernetes.cri.{key}")] = json!(hostile);
    }
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    until("the refused calls to be told", LONG, || {
        casemate(&["why", &task.id]).is_ok_and(|o| o.out().contains("4x mount"))
    })?;
    let bench = task.side.join("bench.json");
    let rows = json!({ "rows": [{
        "name": "<b>start", "unit": "ms", "runtimes": { "casemate": { "median": 4.5 } },
    }] });
    fs::write(&bench, rows.to_string())?;
    let page = page(&task, &["--bench", &bench.display().to_string()])?;
    ensure!(!page.contains("<script"), "markup of a pod's name: {page}");
    ensure!(!page.contains("<b>start"), "markup of a file of figures");
    let own = section(&page, &task)?;
    ensure!(own.contains("&lt;script&gt;alert(1)"), "{own}");
    let bad = own.matches("class=\"bad\"").count();
    let good = own.matches("class=\"good\"").count();
    ensure!(
        bad == 0 && good >= 11,
        "{good} good, {bad} bad lights: {own}"
    );
    ensure!(page.contains("4x mount"), "refused calls of the last hour");
    ensure!(page.contains("4.50"), "figures");
    for part in ["http:", "https:", "src=", "href=", "url("] {
        ensure!(!page.contains(part), "{part:?} in the page");
    }
    let none = casemate(&["report", "--html", "-", "--bench", "/dev/null"])?;
    ensure!(
        none.code() == 125 && none.err().contains("no figures"),
        "{}",
        none.err()
    );
    Ok(task.finish()?)
}

/// script(1) makes a terminal.
fn commands_show_progress_on_terminals_alone() -> Outcome {
    ready()?;
    let mut task = Task::new("progress", &["/bin/probe", "sleep"])?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let program = command(&[])?.get_program().to_owned();
    let file = task.side.join("node.html");
    let line = format!(
        "{} report --html {}",
        program.to_string_lossy(),
        file.display()
    );
    let mut seen = Command::new("script");
    seen.env("TERM", "xterm").args(["-qec", &line, "/dev/null"]);
    let seen = run(&mut seen, &[], LONG)?.ok()?;
    // Other trials have pods as well.
    ensure!(seen.out().contains("pod 1 of "), "{:?}", seen.out());
    let unseen = casemate(&["report", "--html", &file.display().to_string()])?.ok()?;
    ensure_eq!(unseen.err(), "", "standard error of no terminal");
    ensure_eq!(unseen.out(), "", "standard output");
    Ok(task.finish()?)
}

fn commands_report_shows_what_is_wrong() -> Outcome {
    ready()?;
    let mut task = Task::new("reportbad", &["/bin/sleep", "3600"])?;
    task.spec["linux"]["resources"]["pids"] = serde_json::json!({ "limit": 100 });
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    task.posture = false;
    let stuck = Task::sleeping("reportstuck")?;
    let found = leaks::cgroups_with(&task.id).into_iter().find_map(|dir| {
        let dir = std::path::PathBuf::from(dir);
        let own = dir.file_name().is_some_and(|name| *name == *task.id);
        let file = dir.join("pids.max");
        (own && file.exists()).then_some(file)
    });
    let Some(file) = found else {
        return fail("no pids.max");
    };
    fs::write(&file, "4321")?;
    procs::signal(stuck.shim_pid()?, Signal::STOP);
    let page = page(&task, &[]);
    procs::signal(stuck.shim_pid()?, Signal::CONT);
    let page = page?;
    let own = section(&page, &task)?;
    ensure!(
        own.matches("class=\"bad\"").count() == 1 && own.contains("4321"),
        "{own}"
    );
    let lost = section(&page, &stuck)?;
    ensure!(lost.contains("class=\"wrong\""), "{lost}");
    stuck.finish()?;
    Ok(task.finish()?)
}

fn commands_bench_beside_runc() -> Outcome {
    ready()?;
    if !std::path::Path::new("/usr/sbin/runc").exists() {
        return skip("no runc: install it");
    }
    let world = World::get()?;
    let daemon = world.daemon()?;
    let json = world.dir().join(format!("{}.json", world.id("bench")));
    let shown = json.display().to_string();
    let shim = binaries().join("containerd-shim-casemate-v2");
    let shim = shim.display().to_string();
    let address = daemon.address().display().to_string();
    let args = [
        "bench",
        "--rounds",
        "2",
        "--json",
        &shown,
        "--runtime",
        &shim,
        "--address",
        &address,
    ];
    let said = run(&mut command(&args)?, &[], Duration::from_secs(120))?.ok()?;
    ensure!(
        said.out().contains("casemate") && said.out().contains("runc"),
        "{}",
        said.out()
    );
    let all: Value = serde_json::from_str(&fs::read_to_string(&json)?)?;
    let rows = all["rows"].as_array().cloned().unwrap_or_default();
    ensure_eq!(rows.len(), 5, "rows of {all}");
    for row in &rows {
        for runtime in ["casemate", "runc"] {
            let of = &row["runtimes"][runtime];
            ensure!(
                of["count"] == 2 && of["median"].as_f64().is_some_and(|m| m > 0.0),
                "{runtime} in {row}"
            );
        }
    }
    // What it made is gone, and so is its namespace.
    let spaces = daemon
        .ctr("default")
        .run(&["namespaces", "ls", "-q"], SHORT)?
        .ok()?
        .out();
    ensure!(!spaces.contains("casemate-bench"), "namespaces: {spaces}");
    ensure_eq!(
        leaks::mounts_with("casemate-bench"),
        Vec::<String>::new(),
        "mounts"
    );
    ensure_eq!(
        leaks::cgroups_with("casemate-bench"),
        Vec::<String>::new(),
        "cgroups"
    );
    // Its figures are what a page can show.
    let task = Task::sleeping("benchpage")?;
    let page = page(&task, &["--bench", &shown])?;
    ensure!(page.contains("containerd: create and start"), "{page}");
    // A containerd that isn't there is one line.
    let away = casemate(&["bench", "--address", "/nonexistent.sock"])?;
    ensure!(
        away.code() == 125 && away.err().lines().count() == 1,
        "{}",
        away.err()
    );
    Ok(task.finish()?)
}

fn commands_complete_themselves() -> Outcome {
    ready()?;
    let script = casemate(&["completion", "bash"])?.ok()?.out();
    let file = World::get()?.dir().join("completion.bash");
    fs::write(&file, &script)?;
    let ask = "source \"$0\"; COMP_WORDS=(casemate doc); COMP_CWORD=1; \
               _casemate casemate doc casemate; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", ask]).arg(&file);
    let said = run(&mut bash, &[], SHORT)?.ok()?;
    ensure_eq!(said.out().trim(), "doctor", "completion of doc");
    for shell in ["zsh", "fish"] {
        let script = casemate(&["completion", shell])?.ok()?.out();
        ensure!(script.contains("doctor"), "{shell}: {script}");
    }
    Ok(())
}

fn commands_have_manual_pages() -> Outcome {
    ready()?;
    let dir = World::get()?.dir().join("man");
    casemate(&["man", &dir.display().to_string()])?.ok()?;
    let pages: Vec<String> = fs::read_dir(&dir)?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let help = casemate(&["--help"])?.ok()?.out();
    let commands = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .map_while(|line| line.strip_prefix("  ")?.split_whitespace().next())
        // What it says is each command's own page.
        .filter(|name| *name != "help");
    let mut count = 0;
    for name in commands {
        let wanted = format!("casemate-{name}.1");
        ensure!(pages.contains(&wanted), "no {wanted} in {pages:?}");
        let page = fs::read_to_string(dir.join(&wanted))?;
        ensure!(
            page.contains(".TH") && page.contains("Examples:") && page.contains("xit status"),
            "{wanted}: {page}"
        );
        count += 1;
    }
    ensure!(count >= 12, "{count} commands in {help}");
    Ok(())
}
