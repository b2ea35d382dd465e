//! What a workload reaches, counted by making the calls: in each profile, and under
//! runc with containerd's default profile on the same machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use casemate_tests::ensure;
use casemate_tests::skip::{Outcome, Stop};

use crate::common::casemate_only;
use crate::hostile_node::configure;
use crate::probes;

crate::trials![probes_reach_is_within_bars];

/// Kinds, and what they are called on the page.
const KINDS: [(&str, &str); 6] = [
    ("family", "Socket families that open, of 46"),
    ("netlink", "Protocols of netlink that open, of 32"),
    ("terminal", "`ioctl`: requests of terminals"),
    ("device", "`ioctl`: of devices, files, interfaces"),
    ("option", "`setsockopt`: pairs of level and option"),
    ("namespace", "Kinds of namespaces that can be made, of 8"),
];

/// Kinds that count together, and how the bars for `default` and `strict`, and for
/// `compat`, follow from runc's count.
type Bar = (
    &'static [&'static str],
    fn(usize) -> usize,
    fn(usize) -> usize,
);

const BARS: [Bar; 5] = [
    (&["family"], |_| 4, |_| 4),
    (&["netlink"], |_| 1, |_| 3),
    (
        &["terminal", "device"],
        |runc| runc * 4 / 10,
        |runc| runc * 3 / 4,
    ),
    (&["option"], |runc| runc / 3, |runc| runc * 3 / 4),
    (&["namespace"], |_| 0, |_| 0),
];

/// What was reached, by kind.
type Reached = BTreeMap<String, Vec<String>>;

fn parse(said: &str) -> Result<Reached, Stop> {
    let mut all = Reached::new();
    for line in said.lines() {
        let (kind, name) = line
            .split_once('\t')
            .ok_or_else(|| Stop::Fail(format!("checks reach says {line:?}")))?;
        all.entry(kind.to_owned())
            .or_default()
            .push(name.to_owned());
    }
    ensure!(
        all.remove("end").is_some(),
        "checks reach broke off: {said}"
    );
    Ok(all)
}

fn under(name: &str) -> Result<Reached, Stop> {
    let mut task = probes::task("reach")?;
    task.spec["process"]["args"] = serde_json::json!(["/bin/checks", "reach"]);
    if name == "runc" {
        probes::as_runc(&mut task)?;
    } else {
        configure(&mut task, &format!("profile = \"{name}\"\n"))?;
    }
    parse(&probes::said_by(task)?)
}

fn probes_reach_is_within_bars() -> Outcome {
    casemate_only()?;
    let names = ["runc", "compat", "default", "strict"];
    let mut all = BTreeMap::new();
    for name in names {
        all.insert(name, under(name)?);
    }
    let count = |name: &str, kind: &str| all[name].get(kind).map_or(0, Vec::len);
    let mut page = String::from(
        "| | runc | compat | default | strict |\n| --- | ---: | ---: | ---: | ---: |\n",
    );
    for (kind, what) in KINDS {
        write!(page, "| {what} |").map_err(|e| Stop::Fail(e.to_string()))?;
        for name in names {
            write!(page, " {} |", count(name, kind)).map_err(|e| Stop::Fail(e.to_string()))?;
        }
        page.push('\n');
    }
    let mut missed = Vec::new();
    for (kinds, bar, of_compat) in BARS {
        let sum = |name: &str| -> usize { kinds.iter().map(|kind| count(name, kind)).sum() };
        let runc = sum("runc");
        // As a control: what can't be reached anywhere shows nothing.
        let nowhere = kinds == ["namespace"];
        ensure!(runc > 0 || nowhere, "{kinds:?}: runc reaches nothing");
        for (name, bar) in [("strict", bar), ("default", bar), ("compat", of_compat)] {
            let own = sum(name);
            if own > bar(runc) {
                let found: Vec<_> = kinds.iter().map(|kind| all[name].get(*kind)).collect();
                missed.push(format!(
                    "{name} reaches {own} of {kinds:?}, {} at most: {found:?}",
                    bar(runc)
                ));
            }
            ensure!(own > 0 || nowhere, "{name} reaches no {kinds:?}");
        }
    }
    ensure!(missed.is_empty(), "{page}\n{}", missed.join("\n"));
    if std::env::var_os("CASEMATE_WRITE_DOCS").is_some_and(|set| !set.is_empty()) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reach.md");
        fs::write(path, page)?;
    }
    Ok(())
}
