//! `runtimeclass/`, as far as no API server is needed: its files are read, name each
//! other rightly, and say of casemate what the code says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use casemate_spec::annotations::Key;
use casemate_spec::config::Config;
use casemate_spec::{Class, caps, sysctls};
use serde_json::Value;

use crate::pages::top;

fn dir() -> PathBuf {
    top().join("runtimeclass")
}

fn text(path: &str) -> String {
    let path = dir().join(path);
    fs::read_to_string(&path).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

/// The documents of a YAML file.
fn documents(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    serde_saphyr::from_multiple(&text).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

fn objects(path: &str) -> Vec<Value> {
    documents(&dir().join(path))
}

/// All files that are YAML, without the chart's templates.
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![dir()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("templates") {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() > 20, "{found:?}");
    found
}

fn strings(value: &Value) -> BTreeSet<&str> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).collect()
}

/// Every quoted word of the text that begins so.
fn quoted<'a>(text: &'a str, begin: &str) -> BTreeSet<&'a str> {
    let words = text.split('"').filter(|word| word.starts_with(begin));
    words.filter(|word| word.len() > begin.len()).collect()
}

#[test]
fn every_file_is_an_object_with_kind_and_name() {
    for path in files() {
        let all = documents(&path);
        assert!(!all.is_empty(), "{} is empty", path.display());
        let of_other_programs = ["Chart.yaml", "values.yaml", "rules.yaml"];
        if of_other_programs.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        for object in all {
            for at in ["/apiVersion", "/kind"] {
                let said = object.pointer(at).and_then(Value::as_str);
                assert!(said.is_some(), "{}: no {at}: {object}", path.display());
            }
            let named = object.pointer("/metadata/name").is_some();
            assert!(
                named || object["kind"] == "Kustomization",
                "{}: no name: {object}",
                path.display()
            );
        }
    }
}

/// What a kustomization names is there, and what is there is named.
#[test]
fn kustomizations_name_all_files_beside_them() {
    for path in files() {
        if !path.ends_with("kustomization.yaml") {
            continue;
        }
        let here = path.parent().unwrap();
        let said = documents(&path).remove(0);
        for name in strings(&said["resources"]) {
            let target = here.join(name);
            let is_there = match target.is_dir() {
                true => target.join("kustomization.yaml").is_file(),
                false => target.is_file(),
            };
            assert!(is_there, "{}: {name} isn't there", path.display());
        }
        if here == dir() {
            continue;
        }
        let generated = said["configMapGenerator"].as_array().into_iter().flatten();
        let generated: BTreeSet<&str> = generated
            .flat_map(|map| strings(&map["files"]))
            .filter_map(|entry| Some(entry.split_once('=')?.1))
            .collect();
        for entry in fs::read_dir(here).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(
                name == "kustomization.yaml"
                    || strings(&said["resources"]).contains(name.as_str())
                    || generated.contains(name.as_str()),
                "{}: {name} isn't named",
                path.display()
            );
        }
    }
}

/// The chart renders the directories that kustomize reads, and each has a switch.
#[test]
fn chart_has_the_parts_of_the_kustomization() {
    let all = objects("kustomization.yaml").remove(0);
    let template = text("templates/all.yaml");
    let parts: BTreeMap<&str, &str> = template
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once("\" .Values."))
        .collect();
    assert_eq!(
        parts.keys().copied().collect::<BTreeSet<_>>(),
        strings(&all["resources"])
    );
    let values = objects("values.yaml").remove(0);
    for switch in parts.values() {
        let at = format!("/{}", switch.replace('.', "/"));
        assert_eq!(
            values.pointer(&at),
            Some(&Value::Bool(true)),
            "{switch} in values.yaml"
        );
    }
    for path in template.split(".Files.Get \"").skip(1) {
        let path = path.split('"').next().unwrap();
        assert!(dir().join(path).is_file(), "the chart reads {path}");
    }
    let ignored = text(".helmignore");
    for part in parts.keys().chain(&["monitoring", "templates"]) {
        assert!(!ignored.contains(part), ".helmignore has {part}");
    }
}

#[test]
fn annotations_are_those_of_the_code() {
    let policy = text("policies/pods.yaml");
    let names: Vec<String> = Key::ALL.iter().map(ToString::to_string).collect();
    let known: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(quoted(&policy, "casemate.io/"), known);
}

#[test]
fn sysctls_are_those_of_the_code() {
    let policy = text("policies/pods.yaml");
    let listed: BTreeSet<&str> = ["net.", "kernel.", "fs."]
        .iter()
        .flat_map(|begin| quoted(&policy, begin))
        .collect();
    let safe: BTreeSet<&str> = sysctls::SAFE.into_iter().collect();
    assert_eq!(listed, safe);
}

/// The settings of policies, as they come, are the default configuration of nodes.
#[test]
fn settings_are_the_default_configuration() {
    let node = Config::default();
    let settings = objects("policies/settings.yaml").remove(0);
    let lines = |key: &str| -> BTreeSet<String> {
        let text = settings["data"][key].as_str();
        let text = text.unwrap_or_else(|| panic!("no {key} in settings.yaml"));
        text.lines().map(str::to_owned).collect()
    };
    let paths: BTreeSet<String> = node.host_paths.allow.iter().cloned().collect();
    assert_eq!(lines("host-paths"), paths);
    let yes = |value: bool| BTreeSet::from([value.to_string()]);
    assert_eq!(lines("host-network"), yes(node.sandbox.allow_host_network));
    assert_eq!(
        lines("sysctls"),
        node.sysctls.allow.iter().cloned().collect()
    );
    assert_eq!(lines("block-devices"), yes(!node.devices.allow.is_empty()));
    // What a container may ask for and still start: what it then lacks of these four is
    // left out.
    let left_out = ["AUDIT_WRITE", "MKNOD", "NET_RAW", "SETFCAP"].map(str::to_owned);
    let allowed = caps::names(node.capabilities.allow);
    let allowed = allowed
        .into_iter()
        .map(|name| name.trim_start_matches("CAP_").to_owned());
    assert_eq!(lines("capabilities"), allowed.chain(left_out).collect());
    let known = [
        "host-paths",
        "host-network",
        "capabilities",
        "sysctls",
        "block-devices",
    ];
    let keys = settings["data"].as_object().unwrap().keys();
    assert!(keys.into_iter().all(|key| known.contains(&key.as_str())));
}

#[test]
fn classes_are_those_of_the_code() {
    let mut handlers = BTreeSet::new();
    for class in objects("classes/classes.yaml") {
        assert_eq!(class["metadata"]["name"], class["handler"]);
        handlers.insert(class["handler"].as_str().unwrap().to_owned());
        // What `install --node` says of nodes that offer it.
        let label = match class["handler"] == "casemate-compat" {
            true => "casemate.io/compat",
            false => "casemate.io/ready",
        };
        let nodes = &class["scheduling"]["nodeSelector"];
        assert_eq!(nodes, &serde_json::json!({label: "true"}), "{class}");
    }
    let known = Class::ALL.map(|class| format!("casemate{}", class.suffix()));
    assert_eq!(handlers, known.into());
}

/// The rule, as overhead.json says it.
fn rule(measured: f64) -> u64 {
    (measured * 1.25).ceil().max(1.0) as u64
}

/// `make bench` writes what it has measured: classes that say less, or much more, fail.
#[test]
fn overhead_is_the_measured_one() {
    let measured: Value = serde_json::from_str(&text("overhead.json")).unwrap();
    for (key, unit, resource) in [("memory_mib", "Mi", "memory"), ("cpu_milli", "m", "cpu")] {
        let value = measured[key].as_f64().unwrap();
        let expected = format!("{}{unit}", rule(value));
        for class in objects("classes/classes.yaml") {
            assert_eq!(
                class["overhead"]["podFixed"][resource], expected,
                "{resource} of {}; measured: {value}",
                class["handler"]
            );
        }
    }
}

#[test]
fn version_is_the_crates() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = objects("Chart.yaml").remove(0);
    assert_eq!(
        (&chart["version"], &chart["appVersion"]),
        (&version.into(), &version.into())
    );
    let image = format!("casemate.invalid/casemate:{version}");
    let mut seen = 0;
    for path in [
        "installer/daemonset.yaml",
        "job/install.yaml",
        "job/uninstall.yaml",
    ] {
        let pod = &objects(path).remove(0)["spec"]["template"]["spec"];
        for list in ["containers", "initContainers"] {
            for container in pod[list].as_array().into_iter().flatten() {
                assert_eq!(container["image"], image, "{path}");
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 4);
    assert!(
        text("templates/all.yaml").contains(&image),
        "the chart replaces another image"
    );
    let images = &objects("installer/kustomization.yaml").remove(0)["images"][0];
    assert_eq!(
        (&images["newTag"], &images["name"]),
        (&version.into(), &"casemate.invalid/casemate".into())
    );
}

/// Names and labels of metrics, as the page of them has them, which is made of the code.
fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let page = fs::read_to_string(top().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| `casemate_")?.split('|').collect();
        let name = cells.first()?.trim().trim_end_matches('`');
        let labels = cells
            .get(2)?
            .split(',')
            .map(|l| l.trim().trim_matches('`').to_owned());
        Some((format!("casemate_{name}"), labels.collect()))
    });
    let found: BTreeMap<_, _> = rows.collect();
    assert!(found.len() > 10, "{found:?}");
    found
}

/// All strings in a tree of values under these keys.
fn under<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Array(list) => list.iter().for_each(|v| under(v, key, found)),
        Value::Object(map) => {
            for (name, value) in map {
                match value.as_str() {
                    Some(text) if name == key => found.push(text),
                    _ => under(value, key, found),
                }
            }
        }
        _ => {}
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
}

/// Dashboard and rules ask for metrics and labels that there are.
#[test]
fn metrics_of_dashboard_and_rules_are_told() {
    let known = metrics();
    let rules = objects("monitoring/rules.yaml").remove(0);
    let dashboard: Value = serde_json::from_str(&text("monitoring/dashboard.json")).unwrap();
    let mut queries = Vec::new();
    under(&rules, "expr", &mut queries);
    under(&dashboard, "expr", &mut queries);
    under(&dashboard, "query", &mut queries);
    assert!(queries.len() > 15, "{queries:?}");
    for query in &queries {
        let names: Vec<&str> = words(query)
            .filter(|word| word.starts_with("casemate_"))
            .collect();
        let mut labels = BTreeSet::from(["job".to_owned(), "instance".to_owned()]);
        for name in &names {
            let own = known.get(*name);
            labels.extend(
                own.unwrap_or_else(|| panic!("no metric {name}: {query}"))
                    .clone(),
            );
        }
        // by (a, b), {a="…"}, {a=~"…"} and label_values(metric, a)
        for list in query.split("by (").skip(1) {
            for label in words(list.split(')').next().unwrap()) {
                assert!(labels.contains(label), "no label {label}: {query}");
            }
        }
        for list in query.split('{').skip(1) {
            for pair in list.split('}').next().unwrap().split(',') {
                let label = words(pair).next().unwrap_or_default();
                assert!(labels.contains(label), "no label {label}: {query}");
            }
        }
    }
    // What alerts tell of is among the labels that their expression leaves.
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let query = rule["expr"].as_str().unwrap();
        let mut left: BTreeSet<String> = match query.split_once("by (") {
            Some((_, list)) => words(list.split(')').next().unwrap())
                .map(str::to_owned)
                .collect(),
            None => words(query)
                .filter_map(|name| known.get(name))
                .flatten()
                .cloned()
                .collect(),
        };
        left.insert("instance".to_owned());
        let told = rule["annotations"].to_string();
        for label in told.split("$labels.").skip(1) {
            let label = words(label).next().unwrap();
            assert!(left.contains(label), "{}: no label {label}", rule["alert"]);
        }
    }
}

/// Each says in its first line what an API server with the policies does (`make
/// kube-test` asks one), and no annotation that there isn't.
#[test]
fn examples_say_what_becomes_of_them() {
    let mut seen = 0;
    for path in files() {
        if !path.parent().unwrap().ends_with("examples") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let first = text.lines().next().unwrap();
        let says = first == "# admitted" || first.starts_with("# refused: casemate: ");
        assert!(
            says || path.ends_with("namespace.yaml"),
            "{}: {first}",
            path.display()
        );
        let names: Vec<String> = Key::ALL.iter().map(ToString::to_string).collect();
        for object in documents(&path) {
            let places = [
                "/metadata/annotations",
                "/spec/template/metadata/annotations",
            ];
            for place in places.iter().filter_map(|place| object.pointer(place)) {
                for key in place.as_object().into_iter().flat_map(|map| map.keys()) {
                    let known = !key.starts_with("casemate.io/") || names.contains(key);
                    assert!(known, "{}: {key}", path.display());
                }
            }
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen} objects in examples/");
}
