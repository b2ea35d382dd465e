//! `casemate install`, stage by stage.

use std::io::Write;
use std::time::Duration;

use casemate_spec::Class;

use super::Install;
use super::binaries::{self, Payload};
use super::cluster::Labelling;
use super::containerd;
use super::effective::Effective;
use super::files::{self, Owner};
use super::journal::{self, Changed, Journal, Record};
use super::kubernetes::Kubernetes;
use super::layout::{ConfigFile, Layout};
use super::look::{self, Seen, accept, classes, look, paths};
use super::pod::{self, Told};
use super::proof::{self, Loaded};
use crate::error::RunError;

/// One line for the person who watches; a closed stream is no reason to stop.
pub fn say(stage: &str, text: impl std::fmt::Display) {
    let _lost = writeln!(std::io::stdout(), "{stage}: {text}");
}

/// Runs the command.
pub fn install(options: &Install) -> Result<i32, RunError> {
    let payload = Payload::find(options.from.as_deref())?;
    // Before the node's root is entered: the account's files are here.
    let kubernetes = match options.cluster.name() {
        Some(name) => Some(
            Kubernetes::open(options.cluster.kubeconfig())
                .map_err(|error| RunError::Refused(format!("check --node {name}: {error}")))?,
        ),
        None => None,
    };
    let layout = Layout::new(&options.node)?;
    let mut labelling = match (kubernetes, options.cluster.name()) {
        (Some(kubernetes), Some(name)) => {
            Some(Labelling::check(kubernetes, name, &layout.machine)?)
        }
        _ => None,
    };
    if options.dry_run {
        dry_run(options, &layout, &payload)?;
        if let Some(name) = options.cluster.name() {
            say("label", format!("would label node {name}"));
        }
        return Ok(0);
    }
    let (mut journal, undone) = Journal::open(&layout.state, || proof::tidy(&layout))?;
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
        labelling: labelling.as_mut(),
        restarted: false,
    };
    let proven = match run.all(&mut journal) {
        Ok(proven) => proven,
        Err(error) => return Err(run.back(journal, error)),
    };
    clean(&layout, payload.name());
    if let Some(labelling) = labelling {
        if proven {
            let limit = Duration::from_secs(options.restarting.timeout);
            labelling.ready(options.compat, payload.name(), limit)?;
        } else {
            say(
                "label",
                "left as it is: nothing is proven yet; run this again",
            );
        }
    }
    Ok(0)
}

struct Installation<'a> {
    options: &'a Install,
    layout: &'a Layout,
    payload: &'a Payload,
    labelling: Option<&'a mut Labelling>,
    restarted: bool,
}

impl Installation<'_> {
    /// Whether it was proven, too.
    fn all(&mut self, journal: &mut Journal) -> Result<bool, RunError> {
        let record = journal.record()?.unwrap_or_default();
        let seen = look(self.options, self.layout, &record)?;
        say("check", checked(self.layout, &seen));

        let mut record = Record {
            version: self.payload.name().to_owned(),
            ..record
        };
        let planned = self.payload.plan(self.layout)?;
        if let Some(labelling) = &mut self.labelling {
            if !planned.is_empty() || seen.plan.is_some() {
                labelling.claim()?;
            }
            let now = self.options.cluster.name().map(str::to_owned);
            if let Some(other) = record.node.filter(|other| Some(other) != now.as_ref()) {
                say(
                    "label",
                    format!("this machine was node {other} before: kubectl delete node {other}"),
                );
            }
            record.node = now;
        }
        let mut notes = Vec::new();
        let by_path = seen.by_path(self.options);
        self.payload.bring(self.layout, journal)?;
        self.rehearse(by_path, seen.plan.is_some())?;
        record.links = self
            .payload
            .link(self.layout, by_path, journal, &mut notes)?;
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
        let image = seen.before.as_ref().and_then(Effective::pause);
        let proven = self
            .prove(by_path, image)
            .map_err(|error| match &self.labelling {
                Some(labelling) => labelling.unproven(error),
                None => error,
            })?;
        record.directories.extend(journal.made().iter().cloned());
        journal.commit(&record)?;
        Ok(proven)
    }

    fn configure(
        &self,
        journal: &mut Journal,
        seen: &Seen,
        record: &mut Record,
    ) -> Result<(), RunError> {
        for name in seen.adopted() {
            say(
                "config",
                format!("{name} isn't casemate's making, and uninstall will leave it"),
            );
        }
        let Some(plan) = &seen.plan else {
            say("config", format!("has {}: unchanged", seen.names()));
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
        record.handlers = seen.ours.keys().cloned().collect();
        record.import = plan.import.clone().or(record.import.take());
        if let (ConfigFile::Plain(path), Some(before)) = (&self.layout.config, &seen.before) {
            let text = containerd::effective(&self.layout.containerd, Some(path))?;
            accept(
                before,
                &Effective::parse(&text)?,
                &self.layout.handlers(),
                &seen.want,
            )?;
            say(
                "config",
                format!("containerd config dump: as before, and {}", seen.names()),
            );
        }
        Ok(())
    }

    fn restart(&mut self, seen: &Seen) -> Result<(), RunError> {
        let layout = self.layout;
        let is_loaded = |now: &Loaded| matches!(now, Loaded::Yes(has) if seen.is_in(has, layout));
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
                            "it has other handlers of these names ({}): does it read another \
                             configuration? --config names it",
                            paths(&has)
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

    /// The proof of a version that nothing leads to yet: of an upgrade, so that one which
    /// doesn't work meets no pod, and of a new installation, so that a node on which none
    /// works isn't restarted for it, and once more by each try of a DaemonSet. Where
    /// containerd finds shims by name alone, or isn't there to ask, the proof that follows
    /// is the only one.
    fn rehearse(&self, by_path: bool, is_new: bool) -> Result<(), RunError> {
        let is_upgrade = self.payload.is_upgrade(self.layout)?;
        if self.options.no_proof
            || !by_path
            || !(is_new || is_upgrade)
            || matches!(proof::loaded(self.layout), Loaded::Down(_))
        {
            return Ok(());
        }
        let version = self.payload.directory(self.layout);
        for class in classes(self.options) {
            proof::container(self.layout, &version, class, by_path).map_err(told_of_selinux)?;
        }
        say(
            "proof",
            match is_upgrade {
                true => format!("{} holds, and takes its place now", self.payload.name()),
                false => format!(
                    "{} holds: now containerd is told of it",
                    self.payload.name()
                ),
            },
        );
        Ok(())
    }

    fn prove(&self, by_path: bool, image: Option<&str>) -> Result<bool, RunError> {
        if self.options.no_proof {
            say("proof", "left out, as asked");
            return Ok(false);
        }
        if let Loaded::Down(why) = proof::loaded(self.layout) {
            if self.options.restarting.no_restart || self.options.binaries_only {
                say("proof", format!("left out: {why}"));
                return Ok(false);
            }
            return Err(RunError::Refused(format!("prove: {why}")));
        }
        let current = self.layout.current();
        for class in classes(self.options) {
            let unseen =
                proof::container(self.layout, &current, class, by_path).map_err(told_of_selinux)?;
            let of = match class {
                Class::Node => String::new(),
                class => format!(" of class {}", class.name()),
            };
            say(
                "proof",
                format!("a container{of} ran in its sandbox, and is held as promised"),
            );
            for what in unseen {
                say("proof", format!("can't be seen on this node: {what}"));
            }
        }
        if !self.options.binaries_only {
            self.prove_by_pods(image)?;
        }
        Ok(true)
    }

    /// As Kubernetes would have them.
    fn prove_by_pods(&self, image: Option<&str>) -> Result<(), RunError> {
        for class in classes(self.options) {
            let handler = self.layout.handler(class);
            match pod::pod(self.layout, class, image).map_err(told_of_selinux)? {
                Told::Ran => say(
                    "proof",
                    format!("a pod of handler {handler} ran by CRI, and is held as promised"),
                ),
                Told::NotTried(why) => {
                    say("proof", format!("no pod by CRI yet: {why}"));
                    break;
                }
            }
        }
        Ok(())
    }

    /// Puts the node back; the error to tell.
    fn back(&self, journal: Journal, error: RunError) -> RunError {
        let error = self.files_back(journal, error);
        match self.labelling.as_ref().and_then(|l| l.back()) {
            Some(more) => RunError::Refused(format!("{error}{more}")),
            None => error,
        }
    }

    /// What an upgrade that failed has left, and the way out.
    fn older(&self, version: &str) -> String {
        let way = match self.labelling {
            Some(_) => {
                "mend that, or go back to its image: kubectl -n casemate-system rollout undo \
                 daemonset/casemate-installer"
            }
            None => "mend that, or stay with it",
        };
        format!(": new pods get {version}, as before; {way}")
    }

    fn files_back(&self, journal: Journal, error: RunError) -> RunError {
        let before = journal.record().ok().flatten().map(|record| record.version);
        if let Err(second) = journal.back() {
            return RunError::Refused(format!(
                "{error}; and the node can't be put back: {second}; mend that, then run casemate \
                 uninstall"
            ));
        }
        let older = before.filter(|version| *version != self.payload.name());
        let older = older.map_or(String::new(), |version| self.older(&version));
        if !self.restarted {
            return RunError::Refused(format!("{error}; the node is as it was{older}"));
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
                "{error}; the node is as it was, and containerd runs{older}"
            )),
            Err(_) => RunError::Refused(format!(
                "{error}; its configuration is as it was, and it doesn't run with that either: \
                 look at its log"
            )),
        }
    }
}

/// With what may be behind it, where SELinux has a say.
fn told_of_selinux(error: RunError) -> RunError {
    let text = error.to_string();
    let enforces = std::fs::read_to_string("/sys/fs/selinux/enforce");
    let enforces = enforces.is_ok_and(|text| text.trim() == "1");
    match enforces && text.to_lowercase().contains("permission denied") {
        true => RunError::Refused(format!(
            "{text}; SELinux enforces here: ausearch -m avc has what it refused; --prefix names a \
             directory whose files containerd may execute, as /usr/local/libexec/casemate"
        )),
        false => error,
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
                    let now = look::text(path)?.unwrap_or_default();
                    for line in text.lines().filter(|line| !now.lines().any(|l| l == *line)) {
                        say("config", format!("  + {line}"));
                    }
                }
            }
        }
        let is_loaded =
            matches!(proof::loaded(layout), Loaded::Yes(has) if seen.is_in(&has, layout));
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
        say(
            "proof",
            match options.binaries_only {
                true => "would run a container of each class",
                false => "would run a container of each class, and a pod of each handler by CRI",
            },
        );
    }
    Ok(())
}
