//! `casemate inspect`: all that is known of one pod.

use std::fmt::Write as _;
use std::fs;

use clap::Args;
use serde_json::{Value, json};

use crate::error::RunError;
use crate::network;
use crate::operator::{self, Operator, Pod};
use crate::out;
use crate::paint::{Paint, plain};
use crate::ps::state;

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate inspect POD           what the pod is, what holds it, and where that is from
  casemate inspect --json POD    the same, with every field of the specification
  casemate inspect --json POD | jq '.containers[].policy'

POD is an id, or the beginning of one, or Kubernetes' name. Arguments, environment
and values of annotations of workloads are not told. Exit status: 0, or 125 if casemate
itself failed.";

/// Of which pod, and how.
#[derive(Debug, Args)]
pub struct Inspect {
    /// As one JSON object
    #[arg(long)]
    json: bool,
    /// The pod
    pod: String,
}

/// Prints it.
pub fn run(options: &Inspect) -> Result<i32, RunError> {
    operator::needs_root("inspect")?;
    let pod = operator::find(&options.pod)?;
    let found = operator::block_on(whole(&pod))?;
    let text = match options.json {
        true => format!("{found}\n"),
        false => table(&found, Paint::stdout()),
    };
    out::say(text)?;
    Ok(0)
}

/// What the shim says, and what the node's kernel says.
pub async fn whole(pod: &Pod) -> Result<Value, RunError> {
    let shim = Operator::connect(pod).await?;
    let mut found = shim.inspect().await?;
    // A pod that has lost its agent has none, and is looked at all the more.
    let promise = shim.promise().await.unwrap_or_default();
    // A shim of a release before has no word for it.
    let explained = shim.explain().await.unwrap_or_default();
    let named = |list: &Value, id: &Value| {
        let mut all = list["containers"].as_array().into_iter().flatten();
        all.find(|one| one["id"] == *id).cloned()
    };
    for container in found["containers"].as_array_mut().into_iter().flatten() {
        let id = container["id"].clone();
        if let Some(promised) = named(&promise, &id) {
            container["filters"] = promised["filters"].clone();
            container["limits"] = promised["limits"].clone();
        }
        if let (Some(Value::Object(more)), Some(own)) =
            (named(&explained, &id), container.as_object_mut())
        {
            for (key, value) in more {
                own.entry(key).or_insert(value);
            }
        }
    }
    if let Some((namespace, name)) = &pod.kubernetes {
        found["kubernetes"] = json!({ "namespace": namespace, "name": name });
    }
    found["shim"]["program"] = program(pod.shim);
    if let Some(agent) = found["sandbox"]["agent"]["pid"].as_u64() {
        found["network"] = rules(agent);
    }
    Ok(found)
}

/// The file that a shim is run from: after an upgrade, an older one.
fn program(pid: u32) -> Value {
    let link = fs::read_link(format!("/proc/{pid}/exe"));
    link.map_or(Value::Null, |path| path.display().to_string().into())
}

fn rules(agent: u64) -> Value {
    match network::counters_from_afar(agent) {
        Ok(Some(all)) => {
            json!({ "guard": true, "rules": all.iter().map(network::as_json).collect::<Vec<_>>() })
        }
        Ok(None) => json!({ "guard": false }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// A value in few words.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => plain(text),
        Value::Array(all) if all.is_empty() => "none".to_owned(),
        Value::Array(all) => all.iter().map(word).collect::<Vec<_>>().join(", "),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

/// Lines of a page, by depth.
struct Page {
    text: String,
    paint: Paint,
}

impl Page {
    fn line(&mut self, depth: usize, name: &str, value: impl AsRef<str>) {
        let indent = depth * 2;
        let width = 22usize.saturating_sub(indent);
        let line = format!("{:indent$}{name:<width$} {}", "", value.as_ref());
        // Writing to a String doesn't fail.
        let _ = writeln!(self.text, "{}", line.trim_end());
    }

    fn heading(&mut self, text: &str) {
        let _ = writeln!(self.text, "{}", self.paint.strong(text));
    }
}

fn table(found: &Value, paint: Paint) -> String {
    let mut page = Page {
        text: String::new(),
        paint,
    };
    page.heading(&format!("pod {}", word(&found["pod"])));
    let kubernetes = &found["kubernetes"];
    if kubernetes.is_object() {
        let name = format!(
            "{}/{}",
            word(&kubernetes["namespace"]),
            word(&kubernetes["name"])
        );
        page.line(1, "kubernetes", name);
    }
    let (sandbox, shim) = (&found["sandbox"], &found["shim"]);
    if let Some(error) = sandbox["error"].as_str() {
        page.line(1, "lost", page.paint.bad(&plain(error)));
    }
    for (name, value) in [
        ("namespace", &found["namespace"]),
        ("since", &found["since"]),
        ("bundle", &found["bundle"]),
        ("release", &found["version"]),
        ("shim", &shim["pid"]),
        ("program", &shim["program"]),
        ("agent", &sandbox["agent"]["pid"]),
        ("pause", &sandbox["pause"]),
        ("agent's host id", &sandbox["ids"]["agent"]),
        ("landlock", &sandbox["landlock"]),
        ("cgroups", &sandbox["agent"]["cgroups"]),
    ] {
        page.line(1, name, word(value));
    }
    if let Some(first) = sandbox["ids"]["root"].as_u64() {
        page.line(
            1,
            "containers' host ids",
            format!("{first}…{}", first + 65_535),
        );
    }
    guard(&mut page, &found["network"]);
    for container in found["containers"].as_array().into_iter().flatten() {
        if container["pause"] != true {
            one(&mut page, container);
        }
    }
    page.text
}

fn guard(page: &mut Page, network: &Value) {
    if network["guard"] != true {
        let why = match network["error"].as_str() {
            Some(error) => plain(error),
            // Without an agent there is nobody to ask by.
            None if network.is_null() => "-".to_owned(),
            None => "none".to_owned(),
        };
        page.line(1, "network guard", why);
        return;
    }
    page.line(1, "network guard", "rules, and packets that met them");
    for rule in network["rules"].as_array().into_iter().flatten() {
        page.line(2, &word(&rule["packets"]), word(&rule["rule"]));
    }
}

fn one(page: &mut Page, container: &Value) {
    page.heading(&format!("container {}", word(&container["id"])));
    let sandbox = &container["sandbox"];
    for (name, value) in [
        ("state", &state(container).into()),
        ("init", &container["pid"]),
        ("forker", &sandbox["forker"]),
        ("user", &sandbox["user"]),
        ("memory, bytes", &sandbox["usage"]["memory"]),
        ("processes", &sandbox["usage"]["processes"]),
        ("refused calls", &container["denied"]),
        ("cgroups", &sandbox["cgroups"]),
    ] {
        page.line(1, name, word(value));
    }
    for hash in container["filters"].as_array().into_iter().flatten() {
        page.line(1, "filter, SHA-256", word(hash));
    }
    let policy = container["policy"].as_object();
    page.line(1, "policy", "");
    for (name, setting) in policy.into_iter().flatten() {
        let text = format!(
            "{}  (from {})",
            word(&setting["value"]),
            word(&setting["from"])
        );
        page.line(2, name, text);
    }
    page.line(1, "namespaces", "");
    for (name, value) in container["namespaces"].as_object().into_iter().flatten() {
        page.line(2, name, word(value));
    }
    page.line(1, "mounts", "");
    for mount in container["mounts"].as_array().into_iter().flatten() {
        let text = match &mount["source"] {
            Value::String(source) => format!("{} of {}", word(&mount["flags"]), plain(source)),
            _ => format!("{} {}", word(&mount["kind"]), word(&mount["flags"])),
        };
        page.line(2, &word(&mount["target"]), text);
    }
    page.line(1, "hidden", word(&container["masked"]));
    page.line(1, "read-only", word(&container["readonly"]));
    page.line(1, "limits", "");
    for (file, value) in container["limits"].as_object().into_iter().flatten() {
        let name = file.rsplit('/').next().unwrap_or(file);
        page.line(2, &plain(name), word(value));
    }
    for exec in container["execs"].as_array().into_iter().flatten() {
        let text = format!("pid {} {}", word(&exec["pid"]), word(&exec["state"]));
        page.line(1, &format!("exec {}", word(&exec["id"])), text);
    }
    page.line(1, "not as written", "");
    let decisions = container["decisions"].as_array().into_iter().flatten();
    for decision in decisions.filter(|decision| decision["how"] != "applied") {
        let text = format!("{}: {}", word(&decision["how"]), word(&decision["note"]));
        page.line(2, &word(&decision["field"]), text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_others_do_not_reach_the_terminal_as_they_are() {
        let found = json!({
            "pod": "p\u{1b}[2J", "kubernetes": { "namespace": "n", "name": "a\nb" },
            "containers": [{
                "id": "c", "policy": { "exec": { "value": "deny", "from": "config exec.policy" } },
                "mounts": [{ "target": "/x\u{1b}", "kind": "bind", "source": "/y", "flags": ["ro"] }],
                "decisions": [
                    { "field": "f", "how": "stricter", "note": "made so" },
                    { "field": "g", "how": "applied", "note": "" },
                ],
            }],
        });
        let text = table(&found, Paint::stdout());
        assert!(!text.contains('\u{1b}'), "{text:?}");
        for part in [
            "deny  (from config exec.policy)",
            "ro of /y",
            "stricter: made so",
            "n/a\\u{a}b",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert!(!text.contains("    g"), "{text}");
    }
}
