//! What was done, and how to undo it. Each change is written down before it is
//! made; a run that was cut short is undone by the next one, whatever that is to do.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::binaries;
use super::files::{self, Owner};
use crate::error::{RunError, Step};

const LOCK: &str = "lock";
const UNDO: &str = "undo.json";
const RECORD: &str = "record.json";
const BACKUP: &str = "backup";

/// What is installed: what `uninstall` takes away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the directory of the newest version.
    pub version: String,
    /// The runtime handler, if containerd's configuration has it.
    pub handler: Option<String>,
    /// The handlers that were written, that one and its classes'; before there
    /// were classes, that one alone.
    #[serde(default)]
    pub handlers: Vec<String>,
    /// The node's name in Kubernetes, if it was labelled.
    #[serde(default)]
    pub node: Option<String>,
    /// What was added to `imports`, if it was.
    pub import: Option<String>,
    /// Links to the programs.
    pub links: Vec<PathBuf>,
    /// Directories that weren't there before.
    pub directories: Vec<PathBuf>,
    /// Files that were changed or made.
    pub files: Vec<Changed>,
}

impl Record {
    /// The handlers in containerd's configuration that are casemate's making.
    pub fn written(&self) -> Vec<String> {
        match (&self.handler, self.handlers.is_empty()) {
            (Some(handler), true) => vec![handler.clone()],
            _ => self.handlers.clone(),
        }
    }
}

/// A file of the node's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The file.
    pub path: PathBuf,
    /// What it was; `None` if there was none.
    pub original: Option<Original>,
    /// Digest of what it was made.
    pub written: String,
}

/// A kept copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Original {
    /// Digest of the bytes, and the name of the copy.
    pub digest: String,
    /// The owner.
    pub owner: Owner,
}

/// How long processes that end may take to.
const ENDING: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Undo {
    /// A file is to be as it was.
    File {
        path: PathBuf,
        original: Option<Original>,
    },
    /// A link is to lead there again, or nowhere.
    Link {
        path: PathBuf,
        target: Option<PathBuf>,
    },
    /// A directory was made.
    Directory { path: PathBuf },
    /// A version was put there.
    Version { path: PathBuf },
}

/// The node's only installer, for as long as this lives.
#[derive(Debug)]
pub struct Journal {
    state: PathBuf,
    undo: Vec<Undo>,
    /// Directories made since it was opened.
    made: Vec<PathBuf>,
    _lock: File,
}

impl Journal {
    /// Locks the node and undoes what an interrupted run left; whether it did. `first` is
    /// done before that, if there is something to undo.
    pub fn open(state: &Path, first: impl FnOnce()) -> Result<(Self, bool), RunError> {
        let mut made = Vec::new();
        let locked = make_all(state, &mut made).and_then(|()| lock(&state.join(LOCK)));
        let lock = match locked {
            Ok(lock) => lock,
            Err(error) => {
                remove_empty(&made);
                return Err(error);
            }
        };
        let mut journal = Self {
            state: state.to_owned(),
            undo: Vec::new(),
            made,
            _lock: lock,
        };
        let Some((bytes, _)) = files::read(&state.join(UNDO))? else {
            return Ok((journal, false));
        };
        journal.undo = parse(&state.join(UNDO), &bytes)?;
        first();
        journal.undo()?;
        Ok((journal, true))
    }

    /// What is installed, as an earlier run has left it.
    pub fn record(&self) -> Result<Option<Record>, RunError> {
        recorded(&self.state)
    }

    fn note(&mut self, undo: Undo) -> Result<(), RunError> {
        self.undo.push(undo);
        self.save()
    }

    fn save(&self) -> Result<(), RunError> {
        write_json(&self.state.join(UNDO), &self.undo)
    }

    /// A kept copy of the file, as it is now.
    fn keep(&mut self, path: &Path) -> Result<Option<Original>, RunError> {
        let Some((bytes, owner)) = files::read(path)? else {
            return Ok(None);
        };
        let digest = files::digest(&bytes);
        let dir = self.state.join(BACKUP);
        let copy = dir.join(&digest);
        if files::read(&copy)?.is_none_or(|(kept, _)| kept != bytes) {
            fs::create_dir_all(&dir).step("make", dir.display())?;
            let private = Owner {
                mode: 0o600,
                ..Owner::OURS
            };
            files::write(&copy, &bytes, private)?;
        }
        Ok(Some(Original { digest, owner }))
    }

    /// The bytes of a kept copy.
    pub fn kept(&self, original: &Original) -> Result<Vec<u8>, RunError> {
        let path = self.state.join(BACKUP).join(&original.digest);
        match files::read(&path)? {
            Some((bytes, _)) if files::digest(&bytes) == original.digest => Ok(bytes),
            _ => Err(RunError::Refused(format!(
                "read backup {}: missing or damaged; put the file that it was made of in order \
                 by hand",
                path.display()
            ))),
        }
    }

    /// Makes a directory and those above it.
    pub fn directory(&mut self, path: &Path) -> Result<(), RunError> {
        for dir in missing(path) {
            self.note(Undo::Directory { path: dir.clone() })?;
            fs::create_dir(&dir).step("make", dir.display())?;
            self.made.push(dir);
        }
        Ok(())
    }

    /// Directories made so far.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// Writes a file; what it was before.
    pub fn write(
        &mut self,
        path: &Path,
        bytes: &[u8],
        owner: Owner,
    ) -> Result<Option<Original>, RunError> {
        let original = self.keep(path)?;
        self.note(Undo::File {
            path: path.to_owned(),
            original: original.clone(),
        })?;
        let owner = original.as_ref().map_or(owner, |original| original.owner);
        files::write(path, bytes, owner)?;
        Ok(original)
    }

    /// Puts a file back as it was.
    pub fn restore(&mut self, path: &Path, to: Option<&Original>) -> Result<(), RunError> {
        let original = self.keep(path)?;
        self.note(Undo::File {
            path: path.to_owned(),
            original,
        })?;
        self.put_back(path, to)
    }

    fn put_back(&self, path: &Path, to: Option<&Original>) -> Result<(), RunError> {
        match to {
            Some(original) => files::write(path, &self.kept(original)?, original.owner),
            None => files::remove(path),
        }
    }

    /// Makes or turns a link.
    pub fn link(&mut self, path: &Path, target: &Path) -> Result<(), RunError> {
        self.note(Undo::Link {
            path: path.to_owned(),
            target: files::target(path)?,
        })?;
        files::link(path, target)
    }

    /// Says that a version is about to appear at `path`.
    pub fn version(&mut self, path: &Path) -> Result<(), RunError> {
        self.note(Undo::Version {
            path: path.to_owned(),
        })
    }

    /// Everything stays: from here on `record` is the truth. After an error, nothing
    /// is decided yet.
    pub fn commit(&mut self, record: &Record) -> Result<(), RunError> {
        self.write_record(record)?;
        self.done()?;
        self.sweep(record);
        Ok(())
    }

    fn write_record(&mut self, record: &Record) -> Result<(), RunError> {
        let path = self.state.join(RECORD);
        let before = self.record()?;
        if before.as_ref() == Some(record) {
            return Ok(());
        }
        let original = self.keep(&path)?;
        self.note(Undo::File {
            path: path.clone(),
            original,
        })?;
        write_json(&path, record)
    }

    fn done(&mut self) -> Result<(), RunError> {
        files::remove(&self.state.join(UNDO))?;
        self.undo.clear();
        Ok(())
    }

    /// Copies that nothing refers to any more.
    fn sweep(&self, record: &Record) {
        let kept: Vec<&str> = record
            .files
            .iter()
            .filter_map(|file| file.original.as_ref())
            .map(|original| original.digest.as_str())
            .collect();
        for entry in fs::read_dir(self.state.join(BACKUP))
            .into_iter()
            .flatten()
            .flatten()
        {
            if !kept.iter().any(|name| entry.file_name() == *name) {
                let _next_time = fs::remove_file(entry.path());
            }
        }
    }

    /// Undoes everything since it was opened; what is left of the journal says
    /// whether that worked.
    pub fn back(mut self) -> Result<(), RunError> {
        self.undo()?;
        let record = self.record()?;
        if let Some(record) = record {
            self.sweep(&record);
        } else {
            self.vanish();
        }
        Ok(())
    }

    fn undo(&mut self) -> Result<(), RunError> {
        let mut failed = None;
        for undo in self.undo.iter().rev() {
            if let Err(error) = self.undo_one(undo) {
                failed.get_or_insert(error);
            }
        }
        match failed {
            Some(error) => Err(error),
            None => self.done(),
        }
    }

    fn undo_one(&self, undo: &Undo) -> Result<(), RunError> {
        match undo {
            Undo::File { path, original } => {
                files::unfinished(path);
                let now = files::read(path)?.map(|(bytes, _)| files::digest(&bytes));
                if now.as_ref() == original.as_ref().map(|original| &original.digest) {
                    return Ok(());
                }
                self.put_back(path, original.as_ref())
            }
            Undo::Link { path, target } => {
                files::unfinished(path);
                // As it may be where nothing could be written.
                if files::target(path).is_ok_and(|now| now == *target) {
                    return Ok(());
                }
                match target {
                    Some(target) => files::link(path, target),
                    None => files::remove(path),
                }
            }
            Undo::Directory { path } => {
                // Not empty: somebody else uses it by now.
                let _stays = fs::remove_dir(path);
                Ok(())
            }
            Undo::Version { path } => {
                // A sandbox of a proof that was cut short may be on its way out.
                let until = Instant::now() + ENDING;
                while !binaries::remove(path)? && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(50));
                }
                path.parent().map_or(Ok(()), binaries::tidy)
            }
        }
    }

    /// Nothing is installed any more: the journal's own directory goes, too.
    pub fn end(mut self, directories: &[PathBuf]) -> Result<(), RunError> {
        // While it is still known which they are.
        remove_empty(directories);
        self.done()?;
        files::remove(&self.state.join(RECORD))?;
        self.made.extend(directories.iter().cloned());
        self.vanish();
        Ok(())
    }

    fn vanish(&self) {
        // What isn't empty stays, and so does what was here before.
        files::unfinished(&self.state.join(UNDO));
        files::unfinished(&self.state.join(RECORD));
        let _copies = fs::remove_dir_all(self.state.join(BACKUP));
        let _lock = fs::remove_file(self.state.join(LOCK));
        let _own = fs::remove_dir(&self.state);
        remove_empty(&self.made);
        vestige(&self.state);
    }
}

/// Removes what a run that was killed early made before it could say so.
pub fn vestige(state: &Path) {
    if let Some(parent) = state.parent().filter(|dir| dir.ends_with("casemate")) {
        let _stays = fs::remove_dir(parent);
    }
}

/// Removes those directories that have nothing in them.
fn remove_empty(directories: &[PathBuf]) {
    let mut all = directories.to_vec();
    all.sort();
    for dir in all.iter().rev() {
        let _stays = fs::remove_dir(dir);
    }
}

fn make_all(dir: &Path, made: &mut Vec<PathBuf>) -> Result<(), RunError> {
    for dir in missing(dir) {
        fs::create_dir(&dir).step("make", dir.display())?;
        made.push(dir);
    }
    Ok(())
}

/// What is installed, without a lock: for a look.
pub fn recorded(state: &Path) -> Result<Option<Record>, RunError> {
    let path = state.join(RECORD);
    files::read(&path)?
        .map(|(bytes, _)| parse(&path, &bytes))
        .transpose()
}

/// Whether a run was cut short.
pub fn interrupted(state: &Path) -> bool {
    state.join(UNDO).exists()
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, RunError> {
    serde_json::from_slice(bytes).map_err(|error| {
        RunError::Refused(format!(
            "read {}: {error}: not what this release writes; use the release that did",
            path.display()
        ))
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), RunError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| RunError::Refused(format!("write {}: {error}", path.display())))?;
    files::write(path, &text, Owner::OURS)
}

/// The directories to make for `path`, outermost first.
fn missing(path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = path
        .ancestors()
        .take_while(|dir| !dir.exists())
        .map(Path::to_path_buf)
        .collect();
    all.reverse();
    all
}

fn lock(path: &Path) -> Result<File, RunError> {
    loop {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .step("open", path.display())?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut holder = String::new();
            let _unknown = file.read_to_string(&mut holder);
            return Err(RunError::Refused(format!(
                "lock {}: another casemate install or uninstall runs on this node (process {}): \
                 wait for its end",
                path.display(),
                holder.trim()
            )));
        }
        let own = file.metadata().step("look at", path.display())?.ino();
        // Else its last holder has removed it meanwhile.
        if fs::metadata(path).is_ok_and(|there| there.ino() == own) {
            // For the message of another one; the lock holds without.
            let _untold = file
                .set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| writeln!(file, "{}", std::process::id()));
            return Ok(file);
        }
    }
}
