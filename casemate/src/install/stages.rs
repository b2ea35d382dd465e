//! `casemate install`, stage by stage.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Install;
use super::binaries::{self, Payload};
use super::config::{self, Config};
use super::containerd::{self, Release};
use super::effective::{Effective, Handler};
use super::files::{self, Owner};
use super::journal::{self, Changed, Journal, Record};
use super::layout::{ConfigFile, Layout};
use super::proof::{self, Loaded};
use crate::error::{RunError, Step};

/// One line for the person who watches; a closed stream is no reason to stop.
pub fn say(stage: &str, text: impl std::fmt::Display) {
    let _lost = writeln!(std::io::stdout(), "{stage}: {text}");
}

/// What is to be written, in this order.
struct Plan {
    files: Vec<(PathBuf, String)>,
    import: Option<String>,
}

/// What a look at the node has shown.
struct Seen {
    release: Release,
    want: Handler,
    before: Option<Effective>,
    plan: Option<Plan>,
    /// Whether the handler is of an operator's own making.
    adopted: bool,
}

/// Runs the command.
pub fn install(options: &Install) -> Result<i32, RunError> {
    let payload = Payload::find(options.from.as_deref())?;
    let layout = Layout::new(&options.node)?;
    if options.dry_run {
        return dry_run(options, &layout, &payload).map(|()| 0);
    }
    let (mut journal, undone) = Journal::open(&layout.state)?;
    if undone {
        say(
            "check",
            "an earlier run was cut short; what it did is undone",
        );
    }
    let mut run = Installation {
        options,
        layout: &layout,
        payload: &payload,
        restarted: false,
    };
    match run.all(&mut journal) {
        Ok(()) => {
            clean(&layout, &payload.name);
            Ok(0)
        }
        Err(error) => Err(run.back(journal, error)),
    }
}

struct Installation<'a> {
    options: &'a Install,
    layout: &'a Layout,
    payload: &'a Payload,
    restarted: bool,
}

impl Installation<'_> {
    fn all(&mut self, journal: &mut Journal) -> Result<(), RunError> {
        let record = journal.record()?.unwrap_or_default();
        let seen = look(self.options, self.layout, &record)?;
        say("check", checked(self.layout, &seen));

        let mut record = Record {
            version: self.payload.name.clone(),
            ..record
        };
        let planned = self.payload.plan(self.layout)?;
        let mut notes = Vec::new();
        record.links = self.payload.put(self.layout, journal, &mut notes)?;
        let dir = self.payload.directory(self.layout);
        say(
            "binaries",
            match planned.is_empty() {
                true => format!("{}: unchanged", dir.display()),
                false => format!("{}: done", dir.display()),
            },
        );
        for note in notes {
            say("binaries", note);
        }
        if self.options.binaries_only {
            say("config", "left as it is, as asked");
        } else {
            self.configure(journal, &seen, &mut record)?;
            self.restart(&seen)?;
        }
        self.prove()?;
        record.directories.extend(journal.made().iter().cloned());
        journal.commit(&record)
    }

    fn configure(
        &self,
        journal: &mut Journal,
        seen: &Seen,
        record: &mut Record,
    ) -> Result<(), RunError> {
        let Some(plan) = &seen.plan else {
            say(
                "config",
                format!("has the handler {}: unchanged", self.layout.handler),
            );
            if seen.adopted {
                say(
                    "config",
                    "it isn't casemate's making, and uninstall will leave it",
                );
            }
            return Ok(());
        };
        for (path, text) in &plan.files {
            if let Some(dir) = path.parent() {
                journal.directory(dir)?;
            }
            let found = journal.write(path, text.as_bytes(), Owner::OURS)?;
            let written = files::digest(text.as_bytes());
            match record.files.iter_mut().find(|file| file.path == *path) {
                // As it was before all our changes, if nobody else made any.
                Some(file) if found.as_ref().is_some_and(|f| f.digest == file.written) => {
                    file.written = written;
                }
                Some(file) => {
                    file.original = found;
                    file.written = written;
                }
                None => record.files.push(Changed {
                    path: path.clone(),
                    original: found,
                    written,
                }),
            }
            say("config", format!("{}: written", path.display()));
        }
        record.handler = Some(self.layout.handler.clone());
        record.import = plan.import.clone().or(record.import.take());
        if let (ConfigFile::Plain(path), Some(before)) = (&self.layout.config, &seen.before) {
            let text = containerd::effective(&self.layout.containerd, Some(path))?;
            accept(
                before,
                &Effective::parse(&text)?,
                &self.layout.handler,
                &seen.want,
            )?;
            say(
                "config",
                "containerd config dump: as before, and the handler",
            );
        }
        Ok(())
    }

    fn restart(&mut self, seen: &Seen) -> Result<(), RunError> {
        let is_loaded = |now: &Loaded| matches!(now, Loaded::Yes(has) if *has == seen.want);
        let before = proof::loaded(self.layout);
        if is_loaded(&before) {
            say("restart", "not needed: containerd has loaded the handler");
            return Ok(());
        }
        let restarting = &self.options.restarting;
        // From here on it may be down.
        self.restarted = !restarting.no_restart;
        let Some(done) = containerd::restart(restarting, self.layout) else {
            say(
                "restart",
                "left to you: restart containerd, then run this again for the proof",
            );
            return Ok(());
        };
        let limit = Duration::from_secs(restarting.timeout);
        let back = done.and_then(|()| {
            proof::wait(self.layout, limit, is_loaded).map_err(|now| {
                RunError::Refused(format!(
                    "restart containerd: after {} s {}",
                    restarting.timeout,
                    match now {
                        Loaded::Down(why) => format!("it doesn't answer: {why}"),
                        Loaded::NoCri(why) => format!("it runs without CRI: {why}"),
                        Loaded::No => "it has no such handler: does it read another \
                                       configuration? --config names it"
                            .to_owned(),
                        Loaded::Yes(has) => format!(
                            "it has another handler of that name ({}): does it read another \
                             configuration? --config names it",
                            has.path
                        ),
                    }
                ))
            })
        });
        match (&before, back) {
            (Loaded::Down(_), Err(error)) => Err(RunError::Refused(format!(
                "{error}; it didn't answer before either: look at its log first"
            ))),
            (_, back) => {
                back?;
                say("restart", "containerd is back, and has loaded the handler");
                Ok(())
            }
        }
    }

    fn prove(&self) -> Result<(), RunError> {
        if self.options.no_proof {
            say("proof", "left out, as asked");
            return Ok(());
        }
        if let Loaded::Down(why) = proof::loaded(self.layout) {
            if self.options.restarting.no_restart || self.options.binaries_only {
                say("proof", format!("left out: {why}"));
                return Ok(());
            }
            return Err(RunError::Refused(format!("prove: {why}")));
        }
        proof::container(self.layout)?;
        say("proof", "a container ran in its sandbox, behind its locks");
        Ok(())
    }

    /// Puts the node back; the error to tell.
    fn back(&self, journal: Journal, error: RunError) -> RunError {
        if let Err(second) = journal.back() {
            return RunError::Refused(format!(
                "{error}; and the node can't be put back: {second}; mend that, then run casemate \
                 uninstall"
            ));
        }
        if !self.restarted {
            return RunError::Refused(format!("{error}; the node is as it was"));
        }
        let limit = Duration::from_secs(self.options.restarting.timeout);
        let again = match containerd::restart(&self.options.restarting, self.layout) {
            None => Ok(()),
            Some(done) => done.map_err(|second| second.to_string()).and_then(|()| {
                proof::wait(self.layout, limit, |now| !matches!(now, Loaded::Down(_)))
                    .map_err(|now| format!("{now:?}"))
            }),
        };
        match again {
            Ok(()) => RunError::Refused(format!(
                "{error}; the node is as it was, and containerd runs"
            )),
            Err(_) => RunError::Refused(format!(
                "{error}; its configuration is as it was, and it doesn't run with that either: \
                 look at its log"
            )),
        }
    }
}

/// The read-only part.
fn look(options: &Install, layout: &Layout, record: &Record) -> Result<Seen, RunError> {
    let release = containerd::release(&layout.containerd)?;
    let want = config::handler(release.number, &layout.shim());
    let mut seen = Seen {
        release,
        want,
        before: None,
        plan: None,
        adopted: false,
    };
    if options.binaries_only {
        return Ok(seen);
    }
    let name = &layout.handler;
    if let Some(other) = record.handler.as_ref().filter(|other| *other != name) {
        return Err(RunError::Refused(format!(
            "check --handler {name}: casemate is installed as {other}: run casemate uninstall \
             first"
        )));
    }
    let path = match &layout.config {
        ConfigFile::Plain(path) => path.clone(),
        ConfigFile::Template(dir) => dir.join("config.toml"),
    };
    let text = text(&path)?;
    let dump = containerd::effective(&layout.containerd, text.as_ref().map(|_| path.as_path()))?;
    let before = Effective::parse(&dump)?;
    if let Some(plugin) = before.without_cri() {
        return Err(RunError::Refused(format!(
            "check {}: CRI is off (disabled_plugins has {plugin:?}): take it out, or use \
             --binaries-only, which is enough for ctr and nerdctl",
            path.display()
        )));
    }
    let has = before.handler(name);
    let is_ours = record.handler.is_some();
    if has.as_ref() == Some(&seen.want) {
        seen.adopted = !is_ours;
    } else if let (Some(has), false) = (&has, is_ours) {
        return Err(RunError::Refused(format!(
            "check {}: containerd has a runtime {name:?} already, not of casemate's making \
             ({} {}): take it out, or choose another name with --handler",
            path.display(),
            has.kind,
            has.path
        )));
    } else {
        seen.plan = Some(match &layout.config {
            ConfigFile::Plain(path) => plain(layout, &seen, &before, path, text.as_deref())?,
            ConfigFile::Template(dir) => template(layout, &seen, dir)?,
        });
    }
    seen.before = Some(before);
    Ok(seen)
}

fn text(path: &Path) -> Result<Option<String>, RunError> {
    let Some((bytes, _)) = files::read(path)? else {
        return Ok(None);
    };
    String::from_utf8(bytes).map(Some).map_err(|_| {
        RunError::Refused(format!("read {}: not UTF-8; mend it first", path.display()))
    })
}

/// For a containerd that reads its own file.
fn plain(
    layout: &Layout,
    seen: &Seen,
    before: &Effective,
    path: &Path,
    text: Option<&str>,
) -> Result<Plan, RunError> {
    let parse = || match text {
        Some(text) => Config::parse(text, path),
        None => Ok(Config::new(before.version(), path)),
    };
    let (name, want) = (&layout.handler, &seen.want);
    let mut root = parse()?;
    // One of an older containerd's form, if it is there.
    root.remove(name);
    if seen.release.number.0 >= 2 {
        let dir = path.parent().unwrap_or(Path::new("/")).join("conf.d");
        let file = dir.join(match name.as_str() {
            "casemate" => "casemate.toml".to_owned(),
            other => format!("casemate-{other}.toml"),
        });
        let drop_in = config::drop_in(root.version(), name, want);
        let mut import = None;
        if !root.reads(&file) {
            // A pattern, as containerd doesn't start when a file in the list is gone.
            let pattern = dir.join("casemate*.toml").display().to_string();
            root.import(&pattern)?;
            import = Some(pattern);
        }
        let root = root.text();
        let mut files = vec![(file, drop_in)];
        if text != Some(root.as_str()) {
            files.push((path.to_owned(), root));
        }
        let plan = Plan { files, import };
        candidate(layout, path, &plan)?;
        return Ok(plan);
    }
    // 1.x forgets its default runtimes as soon as the file has one.
    let mut with = parse()?;
    with.remove(name);
    with.add(name, want, &[])?;
    let lost = alone(layout, parse()?)?.lost_in(&alone(layout, with)?);
    root.add(name, want, &lost)?;
    let plan = Plan {
        files: vec![(path.to_owned(), root.text())],
        import: None,
    };
    candidate(layout, path, &plan)?;
    Ok(plan)
}

/// What containerd would make of the plan, elsewhere on the disk: that it can read
/// it. What it comes to is seen in its place, where imports may lead back to it.
fn candidate(layout: &Layout, path: &Path, plan: &Plan) -> Result<(), RunError> {
    let dir = scratch()?;
    let mut root = match plan.files.iter().find(|(file, _)| file == path) {
        Some((_, text)) => Config::parse(text, path)?,
        None => Config::parse(&text(path)?.unwrap_or_default(), path)?,
    };
    for (file, text) in plan.files.iter().filter(|(file, _)| file != path) {
        let name = file.file_name().unwrap_or_default();
        let there = dir.path().join(name);
        fs::write(&there, text).step("write", there.display())?;
        root.import(&there.display().to_string())?;
    }
    effective(layout, &dir, &root.detached()).map(drop)
}

/// What a file comes to without its imports.
fn alone(layout: &Layout, config: Config) -> Result<Effective, RunError> {
    effective(layout, &scratch()?, &config.alone())
}

fn scratch() -> Result<tempfile::TempDir, RunError> {
    tempfile::Builder::new()
        .prefix("casemate-install-")
        .tempdir()
        .step("make a directory in", std::env::temp_dir().display())
}

fn effective(layout: &Layout, dir: &tempfile::TempDir, text: &str) -> Result<Effective, RunError> {
    let there = dir.path().join("config.toml");
    fs::write(&there, text).step("write", there.display())?;
    Effective::parse(&containerd::effective(&layout.containerd, Some(&there))?)
}

/// For k3s and rke2, which make the file that containerd reads.
fn template(layout: &Layout, seen: &Seen, dir: &Path) -> Result<Plan, RunError> {
    let (newer, older) = (
        dir.join("config-v3.toml.tmpl"),
        dir.join("config.toml.tmpl"),
    );
    let is_newer = seen.release.number.0 >= 2 && (newer.exists() || !older.exists());
    let (path, version) = if is_newer { (newer, 3) } else { (older, 2) };
    let now = text(&path)?;
    let with = config::template(now.as_deref(), version, &layout.handler, &seen.want);
    Ok(Plan {
        files: vec![(path, with)],
        import: None,
    })
}

fn accept(
    before: &Effective,
    after: &Effective,
    name: &str,
    want: &Handler,
) -> Result<(), RunError> {
    if after.handler(name).as_ref() != Some(want) {
        return Err(RunError::Refused(format!(
            "config: containerd config dump doesn't have the handler {name} as it was written: \
             a file in its imports has another of that name, or (containerd 1.x) replaces the \
             section of CRI: add the handler there by hand, as the README shows"
        )));
    }
    let changed = before.differences(after, name);
    match changed.first() {
        None => Ok(()),
        Some(first) => Err(RunError::Refused(format!(
            "config: containerd config dump would change in {} more ({first}): that is never \
             wanted; add the handler by hand, as the README shows",
            changed.len()
        ))),
    }
}

fn checked(layout: &Layout, seen: &Seen) -> String {
    let config = match &layout.config {
        ConfigFile::Plain(path) => path,
        ConfigFile::Template(dir) => dir,
    };
    format!(
        "containerd {} ({}), configured in {}",
        seen.release.text,
        layout.containerd.display(),
        config.display()
    )
}

/// Versions that nobody uses any more.
fn clean(layout: &Layout, newest: &str) {
    for dir in binaries::versions(&layout.prefix) {
        if dir.file_name().is_some_and(|name| name == newest) {
            continue;
        }
        match binaries::remove(&dir) {
            Ok(true) => say("clean", format!("{}: removed", dir.display())),
            Ok(false) => say(
                "clean",
                format!("{}: stays, as sandboxes run on it", dir.display()),
            ),
            Err(error) => say("clean", format!("{error}; the next install tries again")),
        }
    }
}

fn dry_run(options: &Install, layout: &Layout, payload: &Payload) -> Result<(), RunError> {
    if journal::interrupted(&layout.state) {
        say(
            "check",
            "an earlier run was cut short: what it did would be undone first",
        );
        return Ok(());
    }
    let record = journal::recorded(&layout.state)?.unwrap_or_default();
    let seen = look(options, layout, &record)?;
    say("check", checked(layout, &seen));
    let planned = payload.plan(layout)?;
    if planned.is_empty() {
        say("binaries", "unchanged");
    }
    for line in planned {
        say("binaries", format!("would {line}"));
    }
    if options.binaries_only {
        say("config", "left as it is, as asked");
    } else {
        match &seen.plan {
            None => say("config", "unchanged"),
            Some(plan) => {
                for (path, text) in &plan.files {
                    say("config", format!("would write {}", path.display()));
                    let now = self::text(path)?.unwrap_or_default();
                    for line in text.lines().filter(|line| !now.lines().any(|l| l == *line)) {
                        say("config", format!("  + {line}"));
                    }
                }
            }
        }
        let is_loaded = matches!(proof::loaded(layout), Loaded::Yes(has) if has == seen.want);
        match (is_loaded, options.restarting.no_restart) {
            (true, _) => say("restart", "not needed: containerd has loaded the handler"),
            (false, true) => say("restart", "left to you"),
            (false, false) => say(
                "restart",
                format!(
                    "would run {}",
                    containerd::describe(&options.restarting, layout)
                ),
            ),
        }
    }
    if !options.no_proof {
        say("proof", "would run a container");
    }
    Ok(())
}
