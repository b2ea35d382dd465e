//! The programs on the node: a directory per version, and a link to the newest.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_spec::Class;

use super::containerd;
use super::files;
use super::journal::Journal;
use super::layout::Layout;
use crate::error::{RunError, Step};
use crate::release::{Release, SHIM};

/// Begins the name of a directory that isn't whole yet.
const UNFINISHED: &str = ".new-";
/// Directories of the root file system that the proof runs in.
const ROOT: [&str; 7] = ["bin", "dev", "etc", "proc", "run", "sys", "tmp"];
/// Name of that root in a version's directory.
const PROOF: &str = "proof";

/// The programs of one build, read before anything is done.
pub struct Payload(Release);

impl Payload {
    /// Those in `from`, those that this program carries, or those beside it.
    pub fn find(from: Option<&Path>) -> Result<Self, RunError> {
        Release::find(from).map(Self)
    }

    /// Name of their directory.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its directory on the node.
    pub fn directory(&self, layout: &Layout) -> PathBuf {
        layout.prefix.join(self.name())
    }

    /// What is to be done; nothing if it is all there.
    pub fn plan(&self, layout: &Layout) -> Result<Vec<String>, RunError> {
        let mut plan = Vec::new();
        let dir = self.directory(layout);
        if !dir.is_dir() {
            plan.push(format!("copy the programs to {}", dir.display()));
        }
        if files::target(&layout.current())?.as_deref() != Some(Path::new(self.name())) {
            plan.push(format!("{} -> {}", layout.current().display(), self.name()));
        }
        for (path, target) in links(layout) {
            if files::target(&path)?.as_ref() != Some(&target) {
                plan.push(format!("{} -> {}", path.display(), target.display()));
            }
        }
        Ok(plan)
    }

    /// Copies the programs to the node: nothing leads to them yet.
    pub fn bring(&self, layout: &Layout, journal: &mut Journal) -> Result<(), RunError> {
        let made = journal.directory(&layout.prefix);
        made.and_then(|()| tidy(&layout.prefix))
            .map_err(elsewhere)?;
        let dir = self.directory(layout);
        if !dir.is_dir() {
            journal.version(&dir)?;
            self.copy(&dir, layout).map_err(elsewhere)?;
        }
        self.runs(&dir)
    }

    /// Whether the links lead to another version, which this one is to take the place of.
    pub fn is_upgrade(&self, layout: &Layout) -> Result<bool, RunError> {
        let now = files::target(&layout.current())?;
        Ok(now.is_some_and(|now| now != Path::new(self.name())))
    }

    /// Has the links lead to the programs; those outside. `by_path`: this containerd finds
    /// shims by their path.
    pub fn link(
        &self,
        layout: &Layout,
        by_path: bool,
        journal: &mut Journal,
        notes: &mut Vec<String>,
    ) -> Result<Vec<PathBuf>, RunError> {
        if files::target(&layout.current())?.as_deref() != Some(Path::new(self.name())) {
            journal.link(&layout.current(), Path::new(self.name()))?;
        }
        let mut made = Vec::new();
        for (path, target) in links(layout) {
            if files::target(&path)?.as_ref() != Some(&target) {
                let linked = journal
                    .directory(&layout.links)
                    .and_then(|()| journal.link(&path, &target));
                match linked {
                    // As where /usr is part of an image. CRI needs no link, since 1.7.
                    Err(error) if by_path && error.is(ErrorKind::ReadOnlyFilesystem) => {
                        notes.push(format!("no link: {error}; ctr finds no shim by name"));
                        break;
                    }
                    Err(error) if error.is(ErrorKind::ReadOnlyFilesystem) => {
                        return Err(RunError::Refused(format!(
                            "{error}; containerd 1.6 finds shims in its own PATH alone: --links \
                             names another directory of it"
                        )));
                    }
                    other => other?,
                }
            }
            made.push(path);
        }
        Ok(made)
    }

    fn copy(&self, dir: &Path, layout: &Layout) -> Result<(), RunError> {
        let new = layout
            .prefix
            .join(format!("{UNFINISHED}{}", std::process::id()));
        let copied = self
            .copy_to(&new)
            .and_then(|()| fs::rename(&new, dir).step("move", new.display()));
        if copied.is_err() {
            let _next_time = fs::remove_dir_all(&new);
        }
        copied
    }

    fn copy_to(&self, new: &Path) -> Result<(), RunError> {
        let bin = new.join("bin");
        fs::create_dir_all(&bin).step("make", bin.display())?;
        for (program, bytes) in &self.0.programs {
            files::program(&bin.join(program), bytes)?;
        }
        for class in [Class::Strict, Class::Compat] {
            let link = bin.join(class.program());
            std::os::unix::fs::symlink(SHIM, &link).step("link", link.display())?;
        }
        let root = new.join(PROOF);
        for name in ROOT {
            let dir = root.join(name);
            fs::create_dir_all(&dir).step("make", dir.display())?;
        }
        let inside = root.join("bin/casemate");
        fs::hard_link(bin.join("casemate"), &inside).step("link", inside.display())?;
        fs::File::open(&bin)
            .and_then(|dir| dir.sync_all())
            .step("sync", bin.display())
    }

    /// They are programs of this machine, where programs may run.
    fn runs(&self, dir: &Path) -> Result<(), RunError> {
        let shim = dir.join("bin").join(SHIM);
        let mut command = std::process::Command::new(&shim);
        let said = containerd::bounded(command.arg("-v"), Duration::from_secs(10));
        let why = match said {
            Ok(said) if said.success && said.out.starts_with(SHIM) => return Ok(()),
            Ok(said) => said.tail(),
            Err(error) => error.to_string(),
        };
        Err(RunError::Refused(format!(
            "check {}: doesn't run here: {why}; is {} mounted noexec, or of another machine? \
             --prefix names another place",
            shim.display(),
            dir.display()
        )))
    }
}

/// Names the way out where programs can't be written.
fn elsewhere(error: RunError) -> RunError {
    match error.is(ErrorKind::ReadOnlyFilesystem) {
        true => RunError::Refused(format!("{error}; --prefix names another place")),
        false => error,
    }
}

/// The root file system that the proof of the version in that directory runs in.
pub fn proof_root(version: &Path) -> PathBuf {
    version.join(PROOF)
}

/// What containerd is told to run for pods of that class.
pub fn shim(version: &Path, class: Class) -> PathBuf {
    version.join("bin").join(class.program())
}

/// Links outside of the prefix, with where they lead.
fn links(layout: &Layout) -> Vec<(PathBuf, PathBuf)> {
    // Those that people and containerd find by name.
    Class::ALL
        .map(Class::program)
        .into_iter()
        .chain(["casemate".to_owned()])
        .map(|name| {
            (
                layout.links.join(&name),
                layout.current().join("bin").join(&name),
            )
        })
        .collect()
}

/// Removes what runs that were cut short have left.
pub fn tidy(prefix: &Path) -> Result<(), RunError> {
    for path in entries(prefix) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(UNFINISHED) {
            fs::remove_dir_all(&path).step("remove", path.display())?;
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

/// Versions on the node, without those not whole.
pub fn versions(prefix: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = entries(prefix)
        .filter(|path| !path.is_symlink() && path.join("bin").join(SHIM).is_file())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| !name.to_string_lossy().starts_with('.'))
        })
        .collect();
    all.sort();
    all
}

/// Processes whose program is in this directory, or was.
pub fn users(dir: &Path) -> Vec<u32> {
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    // Not by getpid(2): the node's /proc may be that of another pid namespace.
    let own = fs::read_link("/proc/self").unwrap_or_default();
    entries(Path::new("/proc"))
        .filter_map(|path| path.file_name()?.to_str()?.parse::<u32>().ok())
        .filter(|pid| own != Path::new(&pid.to_string()))
        .filter(|pid| {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program.starts_with(&dir))
        })
        .collect()
}

/// Processes of sandboxes of any version.
pub fn sandboxes(prefix: &Path) -> Vec<u32> {
    users(prefix)
        .into_iter()
        .filter(|pid| {
            fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| {
                program
                    .file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(SHIM))
            })
        })
        .collect()
}

/// Removes a version unless a sandbox runs on it; whether it did.
pub fn remove(dir: &Path) -> Result<bool, RunError> {
    if !dir.exists() {
        return Ok(true);
    }
    if !users(dir).is_empty() {
        return Ok(false);
    }
    // At once out of sight: what is left by a kill is no version any more.
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let going = dir.with_file_name(format!("{UNFINISHED}{name}"));
    fs::rename(dir, &going).step("move away", dir.display())?;
    fs::remove_dir_all(&going).step("remove", going.display())?;
    Ok(true)
}
