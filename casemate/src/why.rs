//! `casemate why`: which calls of a pod were refused, by which rule, why, and what
//! would allow them.

use std::fmt::Write as _;

use clap::Args;
use serde_json::{Value, json};

use crate::error::{RunError, one_line};
use crate::network::{self, SHOWN};
use crate::operator::{self, Operator};
use crate::out;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate why web-0             a pod by Kubernetes' name
  casemate why default/web-0     with its namespace, where names repeat
  casemate why 3f2a              by the beginning of its id
  casemate why --json POD        everything, as one JSON object

What is counted are calls that the pod's profile refuses, or a filter of the
specification's own (securityContext.seccompProfile), of the latter not those few
that every start of a process needs; and packets that the guard of its network
refused within the last hour. Calls that fail for want of a capability or by
Landlock are the kernel's to answer, and aren't seen here. Nor are
those of a container that is learned from. Exit status: 0, or 125 if casemate
itself failed.";

/// Of which pod, and how.
#[derive(Debug, Args)]
pub struct Why {
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// The pod: its id or the beginning of it, or Kubernetes' name
    #[arg(value_name = "POD")]
    pod: String,
}

/// Explains.
pub fn run(options: &Why) -> Result<i32, RunError> {
    operator::needs_root("why")?;
    let name = options.pod.as_str();
    let mut refusals = operator::refusals();
    refusals.retain(|refusal| {
        let pod = refusal["pod"].as_str().unwrap_or_default();
        !name.is_empty() && pod.starts_with(name)
    });
    let mut network = None;
    let said = match operator::find(name) {
        Ok(pod) => {
            refusals.retain(|refusal| refusal["pod"] == pod.id);
            let asked = operator::block_on(async {
                let shim = Operator::connect(&pod).await?;
                Ok((shim.denials().await?, shim.inspect().await?))
            });
            let (denials, about) = asked?;
            // A kernel that doesn't say is no reason to keep the rest back.
            network = network::seen(&pod.id, &about).unwrap_or_default();
            denials
        }
        // What is left of a pod that was refused.
        Err(_) if !refusals.is_empty() => json!({ "denials": [], "beyond": 0 }),
        Err(error) => return Err(error),
    };
    let text = match options.json {
        true => {
            let mut all = said;
            all["refusals"] = refusals.into();
            all["network"] = network.map_or_else(Vec::new, |seen| seen.as_json()).into();
            format!("{all}\n")
        }
        false => {
            let packets = network.map_or_else(String::new, |seen| seen.explained(SHOWN));
            explain(&said, &refusals, packets)
        }
    };
    out::say(text)?;
    Ok(0)
}

fn explain(said: &Value, refusals: &[Value], packets: String) -> String {
    let mut text = String::new();
    for refusal in refusals {
        let said = one_line(refusal["text"].as_str().unwrap_or_default());
        let rule = refusal["rule"].as_str().unwrap_or("-");
        let at = refusal["at"].as_str().unwrap_or_default();
        let _infallible = writeln!(text, "refused at {at} by {rule}\n  {said}");
    }
    let empty = Vec::new();
    let denials = said["denials"].as_array().unwrap_or(&empty);
    for denial in denials {
        let of = |name: &str| one_line(denial[name].as_str().unwrap_or("-"));
        let class = match of("class") {
            class if class.is_empty() => class,
            class => format!(" ({class})"),
        };
        let own_file = denial["lines"].as_str().zip(denial["file"].as_str());
        let way = match denial["allowed_by"].as_str() {
            _ if own_file.is_some() => own_file.map_or_else(String::new, |(lines, file)| {
                let file = one_line(file);
                let lines = lines.trim_end().replace('\n', "\n           ");
                format!(
                    "for pods that start from then on: before the first [[group]] of {file} put\n\
                     \n           {lines}\n\n         and take {} out of its [[left_out]], where \
                     that has it; or learn from the pod once more",
                    of("syscall")
                )
            }),
            Some(profile) => format!(
                "profile {profile} lets it pass: casemate.io/profile: {profile} on the pod, where \
                 annotations.allow of config.toml has \"profile\"; or profile = \"{profile}\" there, \
                 for the whole node"
            ),
            None if of("rule") == "specification" => {
                "another securityContext.seccompProfile".to_owned()
            }
            None => "no profile lets it pass".to_owned(),
        };
        let way = match denial["own"].as_bool() {
            Some(true) if of("rule") != "specification" => {
                format!("{way}; but the pod's own filter (seccompProfile) refuses it, too")
            }
            _ => way,
        };
        let _infallible = writeln!(
            text,
            "{}x {}{class} -> {} in container {}\n  rule   {}\n  why    {}\n  allow  {way}",
            denial["count"],
            of("syscall"),
            of("errno"),
            of("container"),
            of("rule"),
            of("reason"),
        );
    }
    if said["beyond"].as_u64().is_some_and(|beyond| beyond > 0) {
        let _infallible = writeln!(
            text,
            "{}x of more sorts than are told apart",
            said["beyond"]
        );
    }
    text.push_str(&packets);
    for container in said["learning"].as_array().unwrap_or(&empty) {
        let container = one_line(container.as_str().unwrap_or("-"));
        let _infallible = writeln!(
            text,
            "container {container} is learning: what it is refused isn't counted meanwhile"
        );
    }
    if text.is_empty() {
        text.push_str("nothing was refused\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_is_explained_with_its_way_out() {
        let denial = json!({
            "container": "c", "syscall": "socket", "class": "family=AF_PACKET", "count": 3,
            "errno": "EPERM", "rule": "default/x/1", "reason": "raw packets", "allowed_by": null,
        });
        let text = explain(
            &json!({ "denials": [denial], "beyond": 2 }),
            &[],
            String::new(),
        );
        assert!(text.starts_with("3x socket (family=AF_PACKET) -> EPERM in container c\n"));
        for part in [
            "default/x/1",
            "raw packets",
            "no profile lets it pass",
            "2x of more",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let of_node = json!({
            "container": "c", "syscall": "symlink", "class": "", "count": 1, "own": false,
            "errno": "ENOSYS", "rule": "web/left-out/3", "reason": "not seen",
            "allowed_by": "strict", "file": "/etc/casemate/profiles/web.toml",
            "lines": "[[group]]\nname = \"x\"\n",
        });
        let text = explain(&json!({ "denials": [of_node] }), &[], String::new());
        for part in [
            "before the first [[group]] of /etc/casemate/profiles/web.toml put\n",
            "\n           [[group]]\n           name = \"x\"\n",
            "take symlink out of its [[left_out]]",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("profile strict lets it pass"), "{text}");
        let own = json!({
            "container": "c", "syscall": "mkdir", "class": "", "count": 1, "own": true,
            "errno": "EPERM", "rule": "specification", "reason": "the filter", "allowed_by": null,
        });
        let text = explain(&json!({ "denials": [own] }), &[], String::new());
        assert!(
            text.contains("allow  another securityContext.seccompProfile\n"),
            "{text}"
        );
        let both = json!({
            "container": "c", "syscall": "chroot", "class": "", "count": 1, "own": true,
            "errno": "EPERM", "rule": "strict/refused/1", "reason": "x", "allowed_by": "default",
        });
        let text = explain(&json!({ "denials": [both] }), &[], String::new());
        assert!(text.contains("profile default lets it pass") && text.contains("refuses it, too"));
        assert_eq!(
            explain(&json!({}), &[], String::new()),
            "nothing was refused\n"
        );
        let said = json!({ "denials": [], "learning": ["c"] });
        let learning = explain(&said, &[], String::new());
        assert!(learning.contains("container c is learning"), "{learning}");
    }
}
