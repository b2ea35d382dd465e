//! `casemate uninstall`: the node as it was before `install`, byte for byte where
//! nobody else has changed anything since.

use std::path::Path;
use std::time::Duration;

use super::Uninstall;
use super::binaries;
use super::cluster::Unlabelling;
use super::config::{self, Config};
use super::containerd;
use super::effective::{Effective, Handler};
use super::files;
use super::journal::{self, Changed, Journal, Record};
use super::kubernetes::Kubernetes;
use super::layout::{ConfigFile, Layout};
use super::proof::{self, Loaded};
use super::stages::say;
use crate::error::RunError;

/// Runs the command.
pub fn uninstall(options: &Uninstall) -> Result<i32, RunError> {
    // Before the node's root is entered: the account's files are here.
    let kubernetes = Kubernetes::open(options.cluster.kubeconfig());
    let layout = Layout::new(&options.node)?;
    if !layout.state.exists() {
        if !options.dry_run {
            journal::vestige(&layout.state);
            // Stale ones, of a node that was set up anew.
            let cluster = &options.cluster;
            let _gone = Unlabelling::new(cluster, kubernetes, None, &layout.machine);
        }
        say("check", "casemate isn't installed here");
        return Ok(0);
    }
    if options.dry_run {
        return dry_run(options, &layout).map(|()| 0);
    }
    let (mut journal, undone) = Journal::open(&layout.state, || proof::tidy(&layout))?;
    if undone {
        say(
            "check",
            "an earlier run was cut short; what it did is undone",
        );
    }
    let Some(record) = journal.record()? else {
        let cluster = &options.cluster;
        let _gone = Unlabelling::new(cluster, kubernetes, None, &layout.machine);
        let restarted = forget(options, &layout, None);
        journal.end(&[])?;
        say("check", "casemate isn't installed here");
        return restarted.map(|()| 0);
    };
    let mut labels = None;
    let configured = refuse(options, &layout).and_then(|()| {
        // First, so that no pod comes while its runtime goes.
        let name = record.node.as_deref();
        labels = Unlabelling::new(&options.cluster, kubernetes, name, &layout.machine);
        configure(&mut journal, &layout, &record)
    });
    if let Err(error) = configured {
        if let Some(labels) = labels {
            labels.back();
        }
        return Err(match journal.back() {
            Ok(()) => RunError::Refused(format!("{error}; the node is as it was")),
            Err(second) => RunError::Refused(format!(
                "{error}; and the node can't be put back: {second}; mend that, then run this again"
            )),
        });
    }
    // There is no way back from here, and no reason for one: what is left is no
    // configuration's.
    journal.commit(&Record {
        handler: None,
        handlers: Vec::new(),
        node: None,
        import: None,
        files: Vec::new(),
        ..record.clone()
    })?;
    forget(options, &layout, record.handler.as_deref())?;
    remove(&layout, &record, journal)
}

fn refuse(options: &Uninstall, layout: &Layout) -> Result<(), RunError> {
    let running = binaries::sandboxes(&layout.prefix);
    if running.is_empty() {
        return Ok(());
    }
    if options.force {
        say(
            "check",
            format!("{} sandboxes run, and go on", running.len()),
        );
        return Ok(());
    }
    Err(RunError::Refused(format!(
        "check: {} sandboxes run (process {}): end their pods, or use --force, which leaves them \
         the programs that they need",
        running.len(),
        running.first().copied().unwrap_or_default()
    )))
}

/// How a file is made what it was.
enum Way {
    /// As kept.
    Whole,
    /// Somebody has changed it since: without what is ours.
    Part(String),
    /// It is gone, or has nothing of ours.
    Nothing,
}

fn way(file: &Changed, record: &Record) -> Result<Way, RunError> {
    let Some((bytes, _)) = files::read(&file.path)? else {
        return Ok(Way::Nothing);
    };
    if files::digest(&bytes) == file.written {
        return Ok(Way::Whole);
    }
    let text = String::from_utf8(bytes).map_err(|_| {
        RunError::Refused(format!(
            "read {}: not UTF-8; mend it first",
            file.path.display()
        ))
    })?;
    let without = if file.path.extension().is_some_and(|e| e == "tmpl") {
        config::untemplate(&text)
    } else {
        let mut config = Config::parse(&text, &file.path)?;
        for handler in record.written() {
            config.remove(&handler);
        }
        if let Some(import) = &record.import {
            config.unimport(import);
        }
        config.text()
    };
    Ok(if without == text {
        Way::Nothing
    } else {
        Way::Part(without)
    })
}

fn configure(journal: &mut Journal, layout: &Layout, record: &Record) -> Result<(), RunError> {
    // The list of imports before what it leads to.
    for file in record.files.iter().rev() {
        let shown = file.path.display();
        match way(file, record)? {
            Way::Whole => {
                journal.restore(&file.path, file.original.as_ref())?;
                say(
                    "config",
                    match file.original {
                        Some(_) => format!("{shown}: as it was"),
                        None => format!("{shown}: removed, as it wasn't there"),
                    },
                );
            }
            Way::Part(text) => {
                journal.write(&file.path, text.as_bytes(), files::Owner::OURS)?;
                say(
                    "config",
                    format!("{shown}: changed since; only casemate's part is out"),
                );
            }
            Way::Nothing => say("config", format!("{shown}: has nothing of casemate's")),
        }
    }
    let (Some(_), ConfigFile::Plain(path)) = (&record.handler, &layout.config) else {
        return Ok(());
    };
    let there = path.exists().then_some(path.as_path());
    let dump = Effective::parse(&containerd::effective(&layout.containerd, there)?)?;
    let left = record.written().into_iter().find(|handler| {
        let has = dump.handler(handler);
        has.is_some_and(|has| Path::new(&has.path).starts_with(&layout.prefix))
    });
    match left {
        Some(handler) => Err(RunError::Refused(format!(
            "config: containerd config dump still has the handler {handler}: take it out of \
             the file that somebody has copied it to"
        ))),
        None => Ok(()),
    }
}

/// Has the running containerd forget the handler, if it knows it.
fn forget(options: &Uninstall, layout: &Layout, handler: Option<&str>) -> Result<(), RunError> {
    let is_ours = |has: &Handler| Path::new(&has.path).starts_with(&layout.prefix);
    let knows = |now: &Loaded| matches!(now, Loaded::Yes(has) if has.values().any(is_ours));
    if !knows(&proof::loaded(layout)) {
        say("restart", "not needed");
        return Ok(());
    }
    let name = handler.unwrap_or(&layout.handler);
    let Some(done) = containerd::restart(&options.restarting, layout) else {
        say(
            "restart",
            format!("left to you: until then containerd has the handler {name}"),
        );
        return Ok(());
    };
    done?;
    let limit = Duration::from_secs(options.restarting.timeout);
    let forgotten = |now: &Loaded| !knows(now) && !matches!(now, Loaded::Down(_));
    proof::wait(layout, limit, forgotten).map_err(|now| {
        RunError::Refused(format!(
            "restart containerd: after {} s {}; its configuration is without casemate: look at \
             its log, then run this again",
            options.restarting.timeout,
            match now {
                Loaded::Down(why) => format!("it doesn't answer: {why}"),
                _ => format!("it still has the handler {name}"),
            }
        ))
    })?;
    say("restart", "containerd is back, without the handler");
    Ok(())
}

/// Links and programs, as far as nobody uses them.
fn remove(layout: &Layout, record: &Record, journal: Journal) -> Result<i32, RunError> {
    for link in &record.links {
        let leads = files::target(link).unwrap_or_default();
        if leads.is_some_and(|target| target.starts_with(&layout.prefix)) {
            files::remove(link)?;
        }
    }
    let mut stay = 0;
    for dir in binaries::versions(&layout.prefix) {
        if binaries::remove(&dir)? {
            say("binaries", format!("{}: removed", dir.display()));
        } else {
            stay += 1;
            say(
                "binaries",
                format!("{}: stays, as sandboxes run on it", dir.display()),
            );
        }
    }
    if stay > 0 {
        say("binaries", "run this again when their pods have ended");
        return Ok(0);
    }
    files::remove(&layout.current())?;
    binaries::tidy(&layout.prefix)?;
    journal.end(&record.directories)?;
    say("done", "nothing of casemate's is left");
    Ok(0)
}

fn dry_run(options: &Uninstall, layout: &Layout) -> Result<(), RunError> {
    if journal::interrupted(&layout.state) {
        say(
            "check",
            "an earlier run was cut short: what it did would be undone first",
        );
        return Ok(());
    }
    let Some(record) = journal::recorded(&layout.state)? else {
        say("check", "casemate isn't installed here");
        return Ok(());
    };
    refuse(options, layout)?;
    for file in record.files.iter().rev() {
        let shown = file.path.display();
        say(
            "config",
            match (way(file, &record)?, &file.original) {
                (Way::Whole, Some(_)) => format!("would put {shown} back as it was"),
                (Way::Whole, None) => format!("would remove {shown}"),
                (Way::Part(_), _) => format!("would take casemate's part out of {shown}"),
                (Way::Nothing, _) => format!("{shown} has nothing of casemate's"),
            },
        );
    }
    if let Loaded::Yes(_) = proof::loaded(layout) {
        let how = containerd::describe(&options.restarting, layout);
        say("restart", format!("would run {how}"));
    }
    for dir in binaries::versions(&layout.prefix) {
        say("binaries", format!("would remove {}", dir.display()));
    }
    Ok(())
}
