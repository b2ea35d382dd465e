//! Recordings as JSON, and what is checked of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    Base, Container, LONGEST, Lost, Pod, Recording, RecordingError, VERSION, is_directory, is_text,
};
use crate::observed::{Kind, classes};
use crate::table;

impl Recording {
    /// As it is kept in files.
    ///
    /// # Errors
    /// Never, as far as can be told.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let containers = self.containers.iter();
        let raw = RawRecording {
            version: VERSION,
            pods: self.pods.iter().cloned().collect(),
            containers: containers.map(|(name, one)| raw(name, one)).collect(),
        };
        serde_json::to_string(&raw)
    }

    /// Reads what [`Recording::to_json`] wrote.
    ///
    /// # Errors
    /// [`RecordingError`], naming the field.
    pub fn parse(json: &str) -> Result<Self, RecordingError> {
        if json.len() > LONGEST {
            return Err(RecordingError::TooLong);
        }
        let syntax = |e: serde_json::Error| RecordingError::Syntax {
            reason: shown(&e.to_string()),
        };
        // Of another version it may have any form.
        let Version { version } = serde_json::from_str(json).map_err(syntax)?;
        if version != VERSION {
            return Err(RecordingError::Version { version });
        }
        let raw: RawRecording = serde_json::from_str(json).map_err(syntax)?;
        raw.checked()
    }

    /// Reads one from a file.
    ///
    /// # Errors
    /// [`RecordingError`], naming the file.
    pub fn read(path: &Path) -> Result<Self, RecordingError> {
        let io = |source| RecordingError::Io {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        let file = File::open(path).map_err(io)?;
        let limit = LONGEST as u64 + 1;
        file.take(limit).read_to_string(&mut text).map_err(io)?;
        Self::parse(&text).map_err(|e| RecordingError::File {
            path: path.to_owned(),
            reason: e.to_string(),
        })
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRecording {
    version: u32,
    pods: Vec<Pod>,
    containers: Vec<RawContainer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContainer {
    name: String,
    ids: Vec<String>,
    base: Base,
    calls: Vec<RawCall>,
    #[serde(default)]
    bound: Vec<u16>,
    #[serde(default)]
    connected: Vec<u16>,
    #[serde(default)]
    directories: Vec<String>,
    #[serde(default)]
    lost: Lost,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCall {
    call: String,
    /// Only those that tell kinds apart, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    args: Vec<u64>,
    count: u64,
}

fn raw(name: &str, container: &Container) -> RawContainer {
    let calls = container.calls.iter().map(|(kind, count)| RawCall {
        call: table::name(kind.number).unwrap_or_default().to_owned(),
        args: classes(kind.number)
            .iter()
            .filter_map(|(index, ..)| kind.args.get(usize::from(*index)).copied())
            .collect(),
        count: *count,
    });
    RawContainer {
        name: name.to_owned(),
        ids: container.ids.iter().cloned().collect(),
        base: container.base.clone(),
        calls: calls.collect(),
        bound: container.bound.iter().copied().collect(),
        connected: container.connected.iter().copied().collect(),
        directories: container.directories.iter().cloned().collect(),
        lost: container.lost,
    }
}

fn wrong<T>(field: String, reason: impl Into<String>) -> Result<T, RecordingError> {
    Err(RecordingError::Value {
        field,
        reason: reason.into(),
    })
}

fn at_most<T>(field: String, list: &[T], most: usize) -> Result<(), RecordingError> {
    match list.len() {
        count if count > most => wrong(field, format!("{count} entries, at most {most} can be")),
        _ => Ok(()),
    }
}

/// Of whatever is in it, what can be shown.
fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(200).map(plain).collect()
}

impl RawRecording {
    fn checked(self) -> Result<Recording, RecordingError> {
        at_most("pods".into(), &self.pods, Recording::PODS)?;
        at_most("containers".into(), &self.containers, Recording::CONTAINERS)?;
        let mut recording = Recording::default();
        for pod in self.pods {
            for (field, text) in [
                ("id", &pod.id),
                ("namespace", &pod.namespace),
                ("name", &pod.name),
                ("uid", &pod.uid),
            ] {
                if !is_text(text) {
                    return wrong(format!("pods.{field}"), "not a short line of text");
                }
            }
            recording.pods.insert(pod);
        }
        for (at, raw) in self.containers.into_iter().enumerate() {
            let (name, container) = raw.checked(&format!("containers[{at}]"))?;
            if recording.containers.insert(name, container).is_some() {
                return wrong(format!("containers[{at}].name"), "it is there twice");
            }
        }
        Ok(recording)
    }
}

impl RawContainer {
    fn checked(self, at: &str) -> Result<(String, Container), RecordingError> {
        at_most(format!("{at}.ids"), &self.ids, Container::IDS)?;
        at_most(format!("{at}.calls"), &self.calls, Container::KINDS)?;
        at_most(format!("{at}.bound"), &self.bound, Container::PORTS)?;
        at_most(format!("{at}.connected"), &self.connected, Container::PORTS)?;
        let directories = &self.directories;
        at_most(
            format!("{at}.directories"),
            directories,
            Container::DIRECTORIES,
        )?;
        let texts = [&self.name, &self.base.name];
        let short = self.ids.iter().chain(texts).all(|text| is_text(text));
        if self.name.is_empty() || !short {
            let reason = "not a short line of text";
            return wrong(format!("{at}.name, .ids or .base"), reason);
        }
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if self.base.hash.len() != 64 || !self.base.hash.bytes().all(hex) {
            return wrong(format!("{at}.base.hash"), "not 64 hexadecimal digits");
        }
        if !directories.iter().all(|directory| is_directory(directory)) {
            return wrong(format!("{at}.directories"), "one isn't / and a name");
        }
        if self.bound.contains(&0) || self.connected.contains(&0) {
            return wrong(format!("{at}.bound or .connected"), "0 is no port");
        }
        let mut calls = BTreeMap::new();
        for call in self.calls {
            let field = format!("{at}.calls");
            let Some(number) = table::number(&call.call) else {
                return wrong(field, format!("\"{}\" is no call", shown(&call.call)));
            };
            let classes = classes(number);
            if call.args.len() != classes.len() {
                let reason = format!(
                    "{} has {} arguments that count, not {}",
                    call.call,
                    classes.len(),
                    call.args.len()
                );
                return wrong(field, reason);
            }
            let mut args = [0; 6];
            for ((index, mask, what), value) in classes.iter().zip(&call.args) {
                if value & !u64::from(*mask) != 0 {
                    return wrong(field, format!("{} has {what} {value:#x}", call.call));
                }
                if let Some(arg) = args.get_mut(usize::from(*index)) {
                    *arg = *value;
                }
            }
            if calls.insert(Kind { number, args }, call.count).is_some() {
                return wrong(field, format!("{} is there twice", call.call));
            }
        }
        let container = Container {
            base: self.base,
            ids: self.ids.into_iter().collect(),
            calls,
            bound: self.bound.into_iter().collect(),
            connected: self.connected.into_iter().collect(),
            directories: self.directories.into_iter().collect(),
            lost: self.lost,
        };
        Ok((self.name, container))
    }
}
