//! The node in Kubernetes: labels that say that a sandbox was seen to hold there, set
//! after the proof and taken away first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Map, json};

use super::kubernetes::Kubernetes;
use super::stages::say;
use crate::error::RunError;

/// Label of a node on which a container of the classes casemate and casemate-strict
/// has run; `false` while that is being changed.
const READY: &str = "casemate.io/ready";
/// Label of one on which a container of the class casemate-compat has.
const COMPAT: &str = "casemate.io/compat";
/// Annotation with what is installed.
const VERSION: &str = "casemate.io/version";

/// Between two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// How Kubernetes is told.
#[derive(Debug, Args)]
pub struct Cluster {
    /// The node's name in Kubernetes: it gets the labels casemate.io/NAME after the proof
    #[arg(long = "node", value_name = "NAME")]
    name: Option<String>,
    /// How to reach Kubernetes [default: with the account of the pod that this runs in]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl Cluster {
    /// The node's name, if it was given.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The file, if it was given.
    pub fn kubeconfig(&self) -> Option<&Path> {
        self.kubeconfig.as_deref()
    }
}

/// A node, as Kubernetes knows it.
pub struct Known {
    /// Its machine-id(5), as its kubelet has told; empty before.
    pub machine: String,
    /// All its labels.
    pub labels: BTreeMap<String, String>,
    /// All its annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Ours of a node, with their values; `None` for one that isn't there.
pub type Marks = BTreeMap<&'static str, Option<String>>;

/// While the node is being changed.
pub fn claimed() -> Marks {
    [(READY, Some("false".to_owned())), (COMPAT, None)].into()
}

/// After the proof.
pub fn proven(compat: bool, version: &str) -> Marks {
    [
        (READY, Some("true".to_owned())),
        (COMPAT, compat.then(|| "true".to_owned())),
        (VERSION, Some(version.to_owned())),
    ]
    .into()
}

/// Without casemate.
pub fn none() -> Marks {
    [(READY, None), (COMPAT, None), (VERSION, None)].into()
}

/// What Kubernetes says of a node.
pub enum Answer {
    /// It has it, and it is this machine.
    Ours(Marks),
    /// It has none of that name.
    Unknown,
    /// It is another machine, or isn't known to be this one; why.
    Other(String),
}

/// Asks for the node, which must be the machine of that id.
fn ask(kubernetes: &Kubernetes, name: &str, machine: &Path) -> Result<Answer, RunError> {
    let Some(node) = kubernetes.node(name)? else {
        return Ok(Answer::Unknown);
    };
    let here = std::fs::read_to_string(machine).unwrap_or_default();
    if here.trim().is_empty() {
        let why = format!("{} is missing or empty here", machine.display());
        return Ok(Answer::Other(why));
    }
    if node.machine != here.trim() {
        return Ok(Answer::Other(match node.machine.as_str() {
            "" => "its kubelet hasn't told its machine id yet".to_owned(),
            known => format!("it is the machine {known}, and this is {}", here.trim()),
        }));
    }
    Ok(Answer::Ours(
        [
            (READY, node.labels.get(READY).cloned()),
            (COMPAT, node.labels.get(COMPAT).cloned()),
            (VERSION, node.annotations.get(VERSION).cloned()),
        ]
        .into(),
    ))
}

/// Sets them, once.
fn set(kubernetes: &Kubernetes, name: &str, marks: &Marks) -> Result<(), RunError> {
    let (mut labels, mut annotations) = (Map::new(), Map::new());
    for (key, value) in marks {
        let place = match *key {
            VERSION => &mut annotations,
            _ => &mut labels,
        };
        place.insert((*key).to_owned(), json!(value));
    }
    let patch = json!({"metadata": {"labels": labels, "annotations": annotations}});
    kubernetes.patch(name, &patch)
}

/// Sets them, and tries for as long as that.
fn set_within(
    kubernetes: &Kubernetes,
    name: &str,
    marks: &Marks,
    limit: Duration,
) -> Result<(), RunError> {
    let until = Instant::now() + limit;
    loop {
        match set(kubernetes, name, marks) {
            Err(_) if Instant::now() < until => std::thread::sleep(AGAIN),
            done => return done,
        }
    }
}

/// The labels that come with casemate: asked for at the beginning, told at the end.
pub struct Labelling {
    kubernetes: Kubernetes,
    name: String,
    /// As they were.
    before: Marks,
    claimed: bool,
}

impl Labelling {
    /// Looks whether it can be: nothing is changed.
    pub fn check(kubernetes: Kubernetes, name: &str, machine: &Path) -> Result<Self, RunError> {
        let refused = |why: String| RunError::Refused(format!("check --node {name}: {why}"));
        match ask(&kubernetes, name, machine).map_err(|e| refused(e.to_string()))? {
            Answer::Ours(before) => Ok(Self {
                kubernetes,
                name: name.to_owned(),
                before,
                claimed: false,
            }),
            Answer::Unknown => Err(refused(
                "Kubernetes has no node of that name: was it renamed? kubectl get nodes".to_owned(),
            )),
            Answer::Other(why) => Err(refused(format!("{why}: nothing is done to it"))),
        }
    }

    /// Has no new pods come while the node is changed.
    pub fn claim(&mut self) -> Result<(), RunError> {
        let name = &self.name;
        set(&self.kubernetes, name, &claimed())
            .map_err(|error| RunError::Refused(format!("label node {name}: {error}")))?;
        self.claimed = true;
        say("label", format!("node {name}: {READY}=false for now"));
        Ok(())
    }

    /// Says that it is ready.
    pub fn ready(&self, compat: bool, version: &str, limit: Duration) -> Result<(), RunError> {
        let (name, marks) = (&self.name, proven(compat, version));
        if self.before == marks && !self.claimed {
            say("label", format!("node {name}: unchanged"));
            return Ok(());
        }
        set_within(&self.kubernetes, name, &marks, limit).map_err(|error| {
            RunError::Refused(format!(
                "label node {name}: {error}; casemate is installed and proven, and Kubernetes \
                 doesn't know it: run this again"
            ))
        })?;
        say("label", format!("node {name}: {READY}=true"));
        Ok(())
    }

    /// Nothing was changed, and still a proof has failed: a node that is called ready isn't.
    pub fn unproven(&self, error: RunError) -> RunError {
        let is_ready = self.before.get(READY).cloned().flatten();
        if self.claimed || is_ready.as_deref() != Some("true") {
            return error;
        }
        RunError::Refused(match set(&self.kubernetes, &self.name, &claimed()) {
            Ok(()) => format!(
                "{error}; node {} has the label {READY}=false now",
                self.name
            ),
            Err(why) => format!(
                "{error}; the label {READY} of node {} stays true ({why})",
                self.name
            ),
        })
    }

    /// As it was before; what to add to the error, if it can't be.
    pub fn back(&self) -> Option<String> {
        if !self.claimed {
            return None;
        }
        let failed = set(&self.kubernetes, &self.name, &self.before).err()?;
        Some(format!(
            "; the label {READY} of node {} stays false ({failed})",
            self.name
        ))
    }
}

/// The labels that go with casemate, if that can be told to anybody; without them it
/// goes all the same.
pub struct Unlabelling {
    kubernetes: Kubernetes,
    name: String,
    before: Marks,
}

impl Unlabelling {
    /// Takes them away.
    pub fn new(
        options: &Cluster,
        kubernetes: Result<Kubernetes, RunError>,
        recorded: Option<&str>,
        machine: &Path,
    ) -> Option<Self> {
        let name = options.name().or(recorded)?;
        let kubernetes = match kubernetes {
            Ok(kubernetes) => kubernetes,
            Err(why) => return left(name, &why.to_string()),
        };
        let before = match ask(&kubernetes, name, machine) {
            Ok(Answer::Ours(before)) => before,
            Ok(Answer::Unknown) => {
                say("label", format!("node {name}: Kubernetes has no such node"));
                return None;
            }
            Ok(Answer::Other(why)) => {
                say("label", format!("node {name}: {why}: left alone"));
                return None;
            }
            Err(why) => return left(name, &why.to_string()),
        };
        if before.values().all(Option::is_none) {
            say("label", format!("node {name}: has none of casemate's"));
            return None;
        }
        match set(&kubernetes, name, &none()) {
            Ok(()) => say("label", format!("node {name}: casemate's are gone")),
            Err(why) => return left(name, &why.to_string()),
        }
        Some(Self {
            kubernetes,
            name: name.to_owned(),
            before,
        })
    }

    /// Puts them back: casemate stays after all.
    pub fn back(&self) {
        if let Err(why) = set(&self.kubernetes, &self.name, &self.before) {
            say("label", format!("node {}: not put back: {why}", self.name));
        }
    }
}

fn left<T>(name: &str, why: &str) -> Option<T> {
    say(
        "label",
        format!(
            "node {name}: {why}; if it has them, take them away by kubectl label node {name} \
             {READY}- {COMPAT}-"
        ),
    );
    None
}
