//! Records of execs, where the policy asks for them: who, what and when at the
//! start, and the status at the end.

use std::sync::Arc;

use casemate_spec::config::{Exec, ExecPolicy};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::pod::Pod;
use crate::pod::process::Process;
use crate::pod::task::Task;
use crate::record::{Kubernetes, Record};

/// The most bytes of arguments in a record; the hash is of all of them.
const ARGV: usize = 2048;

/// What of an exec's document goes into its record.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    uid: u32,
    gid: u32,
}

/// Records an exec that has been started, and later its end.
pub fn keep(pod: &Pod, task: &Arc<Task>, process: &Arc<Process>) {
    let Some(container) = task.container() else {
        return;
    };
    let (spec, config) = container.policy();
    if spec.effective.exec != ExecPolicy::Record {
        return;
    }
    let Ok(document) = serde_json::from_slice::<Document>(process.spec()) else {
        return;
    };
    let of = &spec.pod;
    let kubernetes = Kubernetes {
        pod: of.pod_name.clone(),
        namespace: of.namespace.clone(),
        uid: of.pod_uid.clone(),
        container: of.container_name.clone(),
    };
    pod.records.push(&Record::Exec {
        container: task.id.clone(),
        exec: process.exec_id.clone(),
        argv_sha256: hash(&document.args),
        argv: argv(&document.args, &config.exec),
        user: format!("{}:{}", document.user.uid, document.user.gid),
        terminal: process.paths.terminal,
        kubernetes: (kubernetes != Kubernetes::default()).then_some(kubernetes),
    });
    let (records, id, process) = (pod.records.clone(), task.id.clone(), process.clone());
    tokio::spawn(async move {
        let status = process.wait().await.status;
        records.push(&Record::ExecEnd {
            container: id,
            exec: process.exec_id.clone(),
            status,
        });
    });
}

/// As `printf '%s\0' "$@" | sha256sum` has it.
fn hash(args: &[String]) -> String {
    let mut digest = Sha256::new();
    for arg in args {
        digest.update(arg);
        digest.update([0]);
    }
    let bytes = digest.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The arguments, if they may be kept; `…` in place of what is too long.
fn argv(args: &[String], config: &Exec) -> Option<Vec<String>> {
    if !config.record_argv {
        return None;
    }
    let mut left = ARGV;
    let mut kept = Vec::new();
    for arg in args {
        // Escapes may make six bytes of one.
        let long: usize = arg
            .chars()
            .map(|c| if c.is_control() { 6 } else { c.len_utf8() })
            .sum();
        let Some(rest) = left.checked_sub(long + 3) else {
            kept.push("…".to_owned());
            break;
        };
        left = rest;
        kept.push(arg.clone());
    }
    Some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(args: &[&str]) -> Vec<String> {
        args.iter().map(|a| (*a).to_owned()).collect()
    }

    #[test]
    fn the_hash_tells_where_an_argument_ends() {
        assert_ne!(hash(&list(&["a", "b"])), hash(&list(&["ab"])));
        assert_eq!(
            hash(&list(&["id"])),
            // printf 'id\0' | sha256sum
            "b1f1e1efa0422888346cb01744e905f325be96a2431ec34557ddc5eb50ef82f8"
        );
    }

    #[test]
    fn arguments_are_kept_by_leave_and_within_a_record() {
        let mut config = Exec::default();
        assert_eq!(argv(&list(&["x"]), &config), None);
        config.record_argv = true;
        assert_eq!(argv(&list(&["x", "y"]), &config), Some(list(&["x", "y"])));
        let long = "\u{1}".repeat(1000);
        assert_eq!(
            argv(&list(&["x", &long, "y"]), &config),
            Some(list(&["x", "…"]))
        );
        let many: Vec<String> = vec![String::new(); 100_000];
        assert!(argv(&many, &config).unwrap().len() < 1000);
    }
}
