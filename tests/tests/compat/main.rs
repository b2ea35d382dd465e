//! Real programs of Debian's packages in the sandbox, under each profile: what
//! works is measured, and written into `docs/compatibility.md`.
//!
//! Each workload is a script of `tests/compat` with a checkable end. It runs as
//! root of its container, in a directory of its own, on an overlay over the root
//! that `scripts/compat-root.sh` has made; in a shim started as containerd does.
//!
//! `compat some|all [NAME]`: with `some` those that are marked so. `compat learned
//! [NAME]`: servers under profiles that are made here of their own load.

mod learned;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use casemate_tests::World;
use casemate_tests::bundle::Task;
use casemate_tests::skip::{self, Stop};

const PROFILES: [&str; 3] = ["compat", "default", "strict"];
/// For one workload. The slowest takes a tenth of it on an idle machine.
const LIMIT: Duration = Duration::from_secs(180);

/// One script, as its first lines describe it.
struct Workload {
    name: String,
    text: String,
}

impl Workload {
    /// The value of `# key: value`.
    fn header(&self, key: &str) -> Option<&str> {
        let mut lines = self.text.lines().take_while(|line| line.starts_with('#'));
        let start = format!("# {key}: ");
        lines.find_map(|line| line.strip_prefix(&start))
    }

    /// Why it fails with that profile, where it is known to.
    fn known(&self, profile: &str) -> Option<&str> {
        self.header(&format!("fails with {profile}"))
    }

    /// What it says then: the reason, in its own words.
    fn shown(&self, profile: &str) -> Option<&str> {
        self.header(&format!("shown with {profile}"))
    }

    /// Whether it failed for the reason that is known: `said` has those words.
    fn is_known_failure(&self, profile: &str, said: &str) -> bool {
        self.shown(profile).is_some_and(|text| said.contains(text))
    }
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn workloads(set: &str, name: Option<&str>) -> std::io::Result<Vec<Workload>> {
    let mut all = Vec::new();
    let directory = match set {
        "learned" => "tests/learned",
        _ => "tests/compat",
    };
    for entry in fs::read_dir(here().join(directory))? {
        let path = entry?.path();
        let workload = Workload {
            name: path.file_stem().unwrap_or_default().display().to_string(),
            text: fs::read_to_string(&path)?,
        };
        let in_set = set != "some" || workload.header("set") == Some("some");
        if in_set && name.is_none_or(|name| workload.name == name) {
            all.push(workload);
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// What came of a run.
enum End {
    Works,
    /// The exit status, and all that it said.
    Fails(u32, String),
}

/// The last lines of what it said.
fn last(said: &str) -> String {
    let last: Vec<&str> = said.lines().rev().take(6).collect();
    last.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// Runs it to its end.
fn run(workload: &Workload, profile: &str, root: &Path) -> Result<End, Stop> {
    // Its output goes by one pipe, so that what it says last is the reason.
    let script = "mkdir -p /w/run && cd /w/run && exec 2>&1 && exec sh -eux /w/script";
    let mut task = Task::new("compat", &["/bin/sh", "-c", script])?;
    let config = task.side.join("config.toml");
    fs::write(&config, format!("profile = \"{profile}\"\n"))?;
    let config = config.display().to_string();
    task.shim.env.push(("CASEMATE_CONFIG".to_owned(), config));
    let w = task.side.join("upper/w");
    fs::create_dir_all(&w)?;
    fs::write(w.join("script"), &workload.text)?;
    for option in &mut task.rootfs[0].options {
        if option.starts_with("lowerdir=") {
            *option = format!("lowerdir={}", root.display());
        }
    }
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    task.spec["process"]["env"] = serde_json::json!([path, "HOME=/root", "LANG=C.UTF-8"]);
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let ended = task.rpc()?.wait(&task.id, LIMIT);
    let (status, said) = match ended {
        Ok(reply) => {
            // All of it: what says the reason is the last.
            task.rpc()?.delete(&task.id)?;
            (reply.exit_status, task.stdout.text(LIMIT)?)
        }
        Err(error) => {
            let said = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
            let _ = task.finish();
            return Err(Stop::Fail(format!("{error}: {}", last(&said))));
        }
    };
    task.finish()?;
    Ok(match status {
        0 => End::Works,
        status => End::Fails(status, said),
    })
}

fn main() -> ExitCode {
    match all() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compat: {error}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> Result<bool, Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    // `cargo test` without a set is not about these.
    let Some(set) = args.first() else {
        println!("compat: none of some, all and learned was asked for");
        return Ok(true);
    };
    if !rustix::process::geteuid().is_root() {
        println!("compat: skipped: needs root");
        return Ok(std::env::var_os("CI").is_none());
    }
    let made = Command::new(here().join("scripts/compat-root.sh"))
        .arg(set)
        .output()?;
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr);
        return Err(format!("scripts/compat-root.sh {set}: {}", why.trim()).into());
    }
    let root = PathBuf::from(String::from_utf8(made.stdout)?.trim());
    let workloads = workloads(set, args.get(1).map(String::as_str))?;
    let mut good = match set.as_str() {
        "learned" => learned::all(&workloads, &root)?,
        _ => measure(&workloads, &root)?,
    };
    skip::tell_unsteady();
    let left = World::get()?.close();
    if !left.is_empty() {
        println!("left on the host: {left:?}");
        good = false;
    }
    Ok(good)
}

/// What came of one workload under one profile.
struct Measured {
    works: bool,
    /// Whether it did as its script says.
    fine: bool,
    told: String,
    seconds: f32,
}

/// Runs it, and compares with its script.
fn one(workload: &Workload, profile: &str, root: &Path) -> Measured {
    let begun = Instant::now();
    let result = run(workload, profile, root);
    let seconds = begun.elapsed().as_secs_f32();
    let (fine, told) = match (&result, workload.known(profile)) {
        (Ok(End::Works), None) => (true, "works".to_owned()),
        (Ok(End::Works), Some(_)) => (false, "works, and its script says that it fails".to_owned()),
        (Ok(End::Fails(_, said)), Some(why)) if workload.is_known_failure(profile, said) => {
            (true, format!("fails, as is known: {why}"))
        }
        (Ok(End::Fails(status, said)), known) => {
            let other = known.map_or("", |_| ", and not for the reason that is known");
            let last = last(said);
            (
                false,
                format!("FAILED{other}: exit status {status}: {last}"),
            )
        }
        (Err(Stop::Fail(why) | Stop::Skip(why)), _) => (false, format!("FAILED: {why}")),
    };
    Measured {
        works: matches!(result, Ok(End::Works)),
        fine,
        told,
        seconds,
    }
}

/// The same, in CI twice if it must be.
fn steadily(workload: &Workload, profile: &str, root: &Path) -> Measured {
    let first = one(workload, profile, root);
    let name = format!("{} under {profile}", workload.name);
    match first.fine || !skip::once_more(&name, &first.told) {
        true => first,
        false => one(workload, profile, root),
    }
}

/// Runs each under each profile; whether each did as its script says. Writes the page.
fn measure(workloads: &[Workload], root: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let mut good = true;
    let mut results = BTreeMap::new();
    for workload in workloads {
        // Under all profiles at once: each in a pod of its own, and most of it waits.
        let measured = std::thread::scope(|scope| {
            PROFILES
                .map(|profile| scope.spawn(move || steadily(workload, profile, root)))
                .map(std::thread::ScopedJoinHandle::join)
        });
        for (profile, measured) in PROFILES.into_iter().zip(measured) {
            let measured = measured.map_err(|_| "a thread panicked")?;
            good &= measured.fine;
            let (name, told) = (&workload.name, measured.told);
            println!("{name:<9} {profile:<8} {:6.1} s  {told}", measured.seconds);
            results.insert((name.clone(), profile), measured.works);
        }
    }
    if std::env::var_os("CASEMATE_WRITE_DOCS").is_some_and(|set| !set.is_empty()) {
        let page = here().join("docs/compatibility.md");
        fs::write(page, document(workloads, &results, root)?)?;
    }
    Ok(good)
}

/// The version of a package of the root.
fn version(status: &str, package: &str) -> Option<String> {
    let start = format!("Package: {package}\n");
    let paragraph = status
        .split("\n\n")
        .find(|p| p.trim_start().starts_with(&start))?;
    let version = paragraph
        .lines()
        .find_map(|l| l.strip_prefix("Version: "))?;
    Some(version.to_owned())
}

fn document(
    workloads: &[Workload],
    results: &BTreeMap<(String, &str), bool>,
    root: &Path,
) -> Result<String, Box<dyn std::error::Error>> {
    let status = fs::read_to_string(root.join("var/lib/dpkg/status"))?;
    let mut page = String::from(
        "# What runs under which profile\n\nMade by `make compatibility` from a run of all \
         workloads of `tests/compat`, each a script\nwith a checkable end, on unchanged packages \
         of Debian 12, in the sandbox as containerd starts it.\n`make test` runs those marked * \
         under all three profiles, and fails if one doesn't do what\nthis page says.\n\n\
         | Workload | What | compat | default | strict |\n| --- | --- | --- | --- | --- |\n",
    );
    let mut notes = String::new();
    for workload in workloads {
        let star = if workload.header("set") == Some("some") {
            "*"
        } else {
            ""
        };
        let what = workload.header("what").unwrap_or_default();
        let packages = workload.header("packages").unwrap_or_default();
        let first = packages.split(' ').next().unwrap_or_default();
        let version = version(&status, first).unwrap_or_default();
        write!(
            page,
            "| {}{star} | {what} ({first} {version}) |",
            workload.name
        )?;
        for profile in PROFILES {
            let works = results.get(&(workload.name.clone(), profile)) == Some(&true);
            write!(page, " {} |", if works { "works" } else { "**fails**" })?;
            if let (false, Some(why)) = (works, workload.known(profile)) {
                writeln!(notes, "- {} with `{profile}`: {why}.", workload.name)?;
            }
        }
        page.push('\n');
    }
    if !notes.is_empty() {
        write!(page, "\n## Why not\n\n{notes}")?;
    }
    Ok(page)
}
