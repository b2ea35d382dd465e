//! Where recordings and profiles come from.

use std::fs;
use std::path::{Path, PathBuf};

use seccomp_profiles::node::{self, WORKLOADS};
use seccomp_profiles::{Profile, Recording, file, recording, shipped};

use crate::error::{RunError, Step};
use crate::operator::{self, Operator};

/// Recordings of one directory that are read.
const MOST: usize = 4096;

fn refused(error: impl ToString) -> RunError {
    RunError::Refused(error.to_string())
}

/// Recordings of a file, of all `.json` files of a directory, or of a living pod.
pub fn recordings(source: &str) -> Result<Vec<Recording>, RunError> {
    let path = Path::new(source);
    if !is_path(source) {
        return living(source).map(|one| vec![one]);
    }
    let about = fs::metadata(path).step("read recordings of", path.display())?;
    if about.is_file() {
        return Ok(vec![Recording::read(path).map_err(refused)?]);
    }
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).step("read", path.display())? {
        let path = entry.step("read", path.display())?.path();
        if path.extension().is_some_and(|e| e == "json") {
            paths.push(path);
        }
    }
    if paths.is_empty() || paths.len() > MOST {
        return Err(RunError::Refused(format!(
            "read recordings of {}: {} files *.json, 1 to {MOST} are possible; name files of it",
            path.display(),
            paths.len()
        )));
    }
    paths.sort();
    let read = paths.iter().map(|path| Recording::read(path));
    read.collect::<Result<_, _>>().map_err(refused)
}

/// With a `/`, or `.json` at its end: no pod has such a name.
fn is_path(source: &str) -> bool {
    source.contains('/') && Path::new(source).exists()
        || source.starts_with(['/', '.'])
        || source.ends_with(".json")
}

fn living(pod: &str) -> Result<Recording, RunError> {
    operator::needs_root("profile of a living pod")?;
    let pod = operator::find(pod)?;
    let said = operator::block_on(async { Operator::connect(&pod).await?.recording().await })?;
    let said = &said["recording"];
    if said.is_null() {
        return Err(RunError::Refused(format!(
            "read the recording of pod {}: it isn't learned from; start it with the annotation \
             casemate.io/profile: learn, or give the file of an ended pod",
            pod.id
        )));
    }
    Recording::parse(&said.to_string()).map_err(refused)
}

/// One container of all recordings, its instances together.
pub fn container(
    recordings: Vec<Recording>,
    name: Option<&str>,
) -> Result<(String, recording::Container, Recording), RunError> {
    let mut names: Vec<&str> = recordings
        .iter()
        .flat_map(|one| one.containers().map(|(name, _)| name))
        .collect();
    names.sort_unstable();
    names.dedup();
    let name = match (name, &names[..]) {
        (Some(name), names) if names.contains(&name) => name.to_owned(),
        (None, [only]) => (*only).to_owned(),
        (_, []) => {
            return Err(RunError::Refused(
                "no container was recorded; let the pod do its work first".into(),
            ));
        }
        (asked, names) => {
            let asked = asked.map_or_else(String::new, |name| format!("no container {name}, but "));
            let some = names.iter().take(20).copied().collect::<Vec<_>>();
            return Err(RunError::Refused(format!(
                "recorded are {asked}{}: choose one with --container",
                some.join(", ")
            )));
        }
    };
    let mut all = Recording::default();
    for recording in recordings {
        let Some(container) = recording.container(&name).cloned() else {
            continue;
        };
        let mut one = Recording::default();
        for pod in recording.pods() {
            one.name_pod(pod.clone());
        }
        one.add(&name, container).map_err(refused)?;
        all.merge(one).map_err(refused)?;
    }
    match all.container(&name).cloned() {
        Some(container) => Ok((name, container, all)),
        None => Err(RunError::Refused(format!("container {name} has gone"))),
    }
}

/// A profile: shipped, of the node, or in a file.
pub fn profile(
    name: &str,
    directory: &dyn Fn() -> Result<PathBuf, RunError>,
) -> Result<Profile, RunError> {
    if WORKLOADS.contains(&name)
        && let Some(profile) = shipped(name)
    {
        return Ok(profile);
    }
    if node::is_name(name) {
        let path = directory()?.join(format!("{name}.toml"));
        if path.exists() {
            return file::read(&path).map_err(refused);
        }
        if !Path::new(name).exists() {
            return Err(RunError::Refused(format!(
                "find profile {name}: neither one of {}, nor {}, nor a file here; casemate \
                 profile list has all",
                WORKLOADS.join(", "),
                path.display()
            )));
        }
    }
    file::read(Path::new(name)).map_err(refused)
}
