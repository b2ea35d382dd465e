//! The read-only part of `casemate install`: what is on the node, and what would be
//! written to its containerd's configuration.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_spec::Class;

use super::Install;
use super::config::{self, Config};
use super::containerd::{self, Release};
use super::effective::{Effective, Handlers};
use super::files;
use super::journal::Record;
use super::layout::{ConfigFile, Layout};
use crate::error::{RunError, Step};

/// What is to be written, in this order.
pub struct Plan {
    pub files: Vec<(PathBuf, String)>,
    pub import: Option<String>,
}

/// What a look at the node has shown.
pub struct Seen {
    pub release: Release,
    pub want: Handlers,
    /// Those of them that are casemate's to write: not of an operator's own making.
    pub ours: Handlers,
    pub before: Option<Effective>,
    pub plan: Option<Plan>,
}

impl Seen {
    /// Whether a containerd that has these needs nothing more.
    pub fn is_in(&self, has: &Handlers, layout: &Layout) -> bool {
        self.want.iter().all(|(name, want)| has.get(name) == Some(want))
            // One that is no longer wanted must go.
            && has.iter().all(|(name, has)| {
                self.want.contains_key(name) || !Path::new(&has.path).starts_with(&layout.prefix)
            })
    }

    /// Whether this containerd's CRI finds a shim by its path; 1.6 does by its name alone.
    pub fn by_path(&self, options: &Install) -> bool {
        options.binaries_only || self.release.number >= (1, 7)
    }

    /// For messages.
    pub fn names(&self) -> String {
        let names: Vec<&str> = self.want.keys().map(String::as_str).collect();
        names.join(", ")
    }

    /// Handlers that an operator has made.
    pub fn adopted(&self) -> Vec<&str> {
        let made = |name: &&String| !self.ours.contains_key(*name);
        self.want.keys().filter(made).map(String::as_str).collect()
    }
}

/// Those that are asked for.
pub fn classes(options: &Install) -> impl Iterator<Item = Class> {
    let compat = options.compat;
    let wanted = move |class: &Class| *class != Class::Compat || compat;
    Class::ALL.into_iter().filter(wanted)
}

pub fn paths(handlers: &Handlers) -> String {
    let paths: Vec<&str> = handlers.values().map(|h| h.path.as_str()).collect();
    paths.join(", ")
}

/// The read-only part.
pub fn look(options: &Install, layout: &Layout, record: &Record) -> Result<Seen, RunError> {
    let release = containerd::release(&layout.containerd)?;
    let want: Handlers = classes(options)
        .map(|class| {
            let handler = config::handler(release.number, class, &layout.shim(class));
            (layout.handler(class), handler)
        })
        .collect();
    let mut seen = Seen {
        release,
        ours: want.clone(),
        want,
        before: None,
        plan: None,
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
    let written = record.written();
    let has: Handlers = layout
        .handlers()
        .into_iter()
        .filter_map(|name| Some((name.clone(), before.handler(&name)?)))
        .collect();
    for (name, want) in &seen.want {
        match has.get(name) {
            Some(has) if written.contains(name) || has == want => {}
            Some(has) => {
                return Err(RunError::Refused(format!(
                    "check {}: containerd has a runtime {name:?} already, not of casemate's \
                     making ({} {}): take it out, or choose another name with --handler",
                    path.display(),
                    has.kind,
                    has.path
                )));
            }
            None => {}
        }
    }
    seen.ours
        .retain(|name, _| written.contains(name) || !has.contains_key(name));
    let stale = written.iter().any(|name| !seen.want.contains_key(name));
    if stale
        || seen
            .want
            .iter()
            .any(|(name, want)| has.get(name) != Some(want))
    {
        seen.plan = Some(match &layout.config {
            ConfigFile::Plain(path) => {
                plain(layout, &seen, &written, &before, path, text.as_deref())?
            }
            ConfigFile::Template(dir) => template(&seen, dir)?,
        });
    }
    seen.before = Some(before);
    Ok(seen)
}

pub fn text(path: &Path) -> Result<Option<String>, RunError> {
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
    written: &[String],
    before: &Effective,
    path: &Path,
    text: Option<&str>,
) -> Result<Plan, RunError> {
    let parse = || match text {
        Some(text) => Config::parse(text, path),
        None => Ok(Config::new(before.version(), path)),
    };
    let (name, ours) = (&layout.handler, &seen.ours);
    let without = |mut config: Config| {
        for name in written.iter().chain(ours.keys()) {
            config.remove(name);
        }
        config
    };
    // Some may be of an older containerd's form.
    let mut root = without(parse()?);
    if seen.release.number.0 >= 2 {
        let dir = path.parent().unwrap_or(Path::new("/")).join("conf.d");
        let file = dir.join(match name.as_str() {
            "casemate" => "casemate.toml".to_owned(),
            other => format!("casemate-{other}.toml"),
        });
        let drop_in = config::drop_in(root.version(), ours);
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
    let mut with = without(parse()?);
    with.add(ours, &[])?;
    let lost = alone(layout, without(parse()?))?.lost_in(&alone(layout, with)?);
    root.add(ours, &lost)?;
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
fn template(seen: &Seen, dir: &Path) -> Result<Plan, RunError> {
    let (newer, older) = (
        dir.join("config-v3.toml.tmpl"),
        dir.join("config.toml.tmpl"),
    );
    let is_newer = seen.release.number.0 >= 2 && (newer.exists() || !older.exists());
    let (path, version) = if is_newer { (newer, 3) } else { (older, 2) };
    let now = text(&path)?;
    let with = config::template(now.as_deref(), version, &seen.ours);
    Ok(Plan {
        files: vec![(path, with)],
        import: None,
    })
}

pub fn accept(
    before: &Effective,
    after: &Effective,
    names: &[String],
    want: &Handlers,
) -> Result<(), RunError> {
    if let Some((name, _)) = want
        .iter()
        .find(|(name, want)| after.handler(name).as_ref() != Some(want))
    {
        return Err(RunError::Refused(format!(
            "config: containerd config dump doesn't have the handler {name} as it was written: \
             a file in its imports has another of that name, or (containerd 1.x) replaces the \
             section of CRI: add the handler there by hand, as the README shows"
        )));
    }
    let changed = before.differences(after, names);
    match changed.first() {
        None => Ok(()),
        Some(first) => Err(RunError::Refused(format!(
            "config: containerd config dump would change in {} more ({first}): that is never \
             wanted; add the handler by hand, as the README shows",
            changed.len()
        ))),
    }
}
