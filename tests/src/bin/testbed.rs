//! The test bed as a command: `testbed run -- CMD…` shows a container on a
//! private containerd; `testbed sbom` writes a list of all components, `testbed image`
//! the installer's image, `testbed conformance` the list of what the trials showed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use casemate_tests::daemon::Daemon;
use casemate_tests::error::file;
use casemate_tests::image::{catalog, installer};
use casemate_tests::{Failure, Result, conformance, leaks, results, run, world};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

/// Private containerd, local image, one container.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Runs a command in a container and then removes everything.
    Run {
        /// Runtime name as containerd knows it.
        #[arg(long, default_value = world::RUNTIME)]
        runtime: String,
        /// The command; without one, a script that shows what holds it.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Writes docs/conformance.md from the results of `make e2e`.
    Conformance,
    /// Writes the installer's image as an OCI layout. SOURCE_DATE_EPOCH is the time of its
    /// files, or 1970.
    Image {
        /// Directory with the programs.
        #[arg(long)]
        from: PathBuf,
        /// Directory to write.
        #[arg(long)]
        output: PathBuf,
    },
    /// Writes a CycloneDX 1.5 list of the components of all our binaries.
    Sbom {
        /// Where to.
        #[arg(long)]
        output: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Args::parse().action {
        Action::Run { runtime, command } => show(&runtime, &command),
        Action::Conformance => conformance().map(|()| 0),
        Action::Image { from, output } => image(&from, &output).map(|()| 0),
        Action::Sbom { output } => sbom(&output).map(|()| 0),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("testbed: {error}");
            ExitCode::from(125)
        }
    }
}

/// containerd namespace of the shown container.
const NAMESPACE: &str = "casemate-run";

fn conformance() -> Result<()> {
    let results = results::read(&conformance::results())?;
    let path = conformance::document();
    let text = conformance::List::read()?.render(&results);
    fs::write(&path, text).map_err(file("write", &path))?;
    println!("{}: from {} trials", path.display(), results.len());
    Ok(())
}

fn image(from: &Path, output: &Path) -> Result<()> {
    let time = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().map_err(|error| {
            Failure::Unexpected(format!("SOURCE_DATE_EPOCH={text}: {error}: give seconds"))
        })?,
        Err(_) => 0,
    };
    let digest = installer::write(&installer::image(from, time)?, output)?;
    println!("{}: {} {digest}", output.display(), installer::name());
    Ok(())
}

/// What a newcomer sees: every wall around the workload, from inside.
const TOUR: &str = r#"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
say "user ids: inside, on the host, how many"
cat /proc/self/uid_map
say "capabilities, no_new_privs, seccomp"
grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp)' /proc/self/status
say "namespaces"
for n in /proc/self/ns/*; do printf '  %-18s %s\n' "${n##*/}" "$(readlink $n)"; done
say "mounts"
while read -r source target type options rest; do
  printf '  %-28s %-9s %s\n' "$target" "$type" "$options"
done < /proc/self/mounts
say "process 1 and all that can be seen"
tr '\0\n' '  ' < /proc/1/cmdline | cut -c1-40; echo
echo "  pids:" /proc/[0-9]*
say "network interfaces"
ls /sys/class/net
echo made-by-root-inside > /by-root
"#;

fn show(runtime: &str, command: &[String]) -> Result<u8> {
    let dir = tempfile::Builder::new()
        .prefix("cmrun")
        .tempdir_in("/tmp")
        .map_err(file("make a directory in", Path::new("/tmp")))?;
    world::set_mode(dir.path(), 0o711)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}:/usr/sbin:/sbin", world::binaries().display());
    let daemon = Daemon::start(&dir.path().join("d"), &path)?;
    let result = container(&daemon, dir.path(), runtime, command);
    daemon.stop();
    let mark = format!("cmrun{}", std::process::id());
    let _ = run::until("a clean host", Duration::from_secs(5), || {
        leaks::with_mark(&mark).is_empty()
    });
    leaks::remove_namespace_cgroups(NAMESPACE);
    let mut left = leaks::with_mark(&mark);
    left.extend(leaks::mounts_with(&dir.path().display().to_string()));
    if left.is_empty() {
        eprintln!("\ncontainerd stopped; nothing left behind");
    } else {
        eprintln!("\nleft behind:\n  {}", left.join("\n  "));
    }
    result
}

fn container(daemon: &Daemon, dir: &Path, runtime: &str, command: &[String]) -> Result<u8> {
    let ctr = daemon.ctr(NAMESPACE);
    ctr.import(&catalog::base(None)?, dir)?;
    let id = format!("cmrun{}", std::process::id());
    let tour = command.is_empty();
    let words: Vec<&str> = if tour {
        vec!["/bin/sh", "-c", TOUR]
    } else {
        command.iter().map(String::as_str).collect()
    };
    // Kept after its end when there is a disk to look at.
    let mut args = vec!["run"];
    if !tour {
        args.push("--rm");
    }
    args.extend(["--runtime", runtime, catalog::BASE, &id]);
    args.extend(words);
    println!("ctr run --rm --runtime {runtime} {} {id}", catalog::BASE);
    let status = ctr
        .command(&args)
        .stdin(if tour {
            Stdio::null()
        } else {
            Stdio::inherit()
        })
        .status()
        .map_err(|source| Failure::Spawn {
            program: "ctr".to_owned(),
            source,
        })?;
    if tour {
        disk(daemon)?;
        ctr.clear();
    }
    Ok(u8::try_from(status.code().unwrap_or(125)).unwrap_or(125))
}

/// Owners of what the container wrote, as the snapshot on disk has them.
fn disk(daemon: &Daemon) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    println!("\n\x1b[1mowner on disk of a file that root inside wrote\x1b[0m");
    let snapshots = daemon
        .root()
        .join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let entries = fs::read_dir(&snapshots).map_err(file("list", &snapshots))?;
    for entry in entries.flatten() {
        if let Ok(meta) = fs::metadata(entry.path().join("fs/by-root")) {
            println!("uid {} gid {}  /by-root", meta.uid(), meta.gid());
        }
    }
    Ok(())
}

/// The crates that go into the shim, the agent and the command, from
/// `cargo metadata`; build and test dependencies are left out.
fn sbom(output: &Path) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--format-version", "1", "--locked"]);
    // As `make build` has them.
    command.args(["--features", "casemate/kubernetes"]);
    command.args([
        "--filter-platform",
        &format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
    ]);
    let answer = run::run(&mut command, &[], Duration::from_secs(60))?.ok()?;
    let wrong = |e: serde_json::Error| Failure::Unexpected(format!("cargo metadata: {e}"));
    let data: Value = serde_json::from_slice(&answer.stdout).map_err(wrong)?;
    let empty = Vec::new();
    let list = |value: &Value| value.as_array().unwrap_or(&empty).clone();
    let nodes = list(&data["resolve"]["nodes"]);
    let packages = list(&data["packages"]);
    let shipped = ["casemate", "casemate-agent", "containerd-shim-casemate-v2"];
    let mut queue: Vec<String> = packages
        .iter()
        .filter(|p| {
            p["source"].is_null()
                && list(&p["targets"]).iter().any(|t| {
                    shipped.iter().any(|name| t["name"] == *name)
                        && list(&t["kind"]).contains(&json!("bin"))
                })
        })
        .filter_map(|p| p["id"].as_str().map(str::to_owned))
        .collect();
    let mut known: Vec<String> = Vec::new();
    while let Some(id) = queue.pop() {
        // A procedural macro and what it needs run in the compiler, not in the
        // binaries.
        let macros = packages.iter().any(|p| {
            p["id"] == *id
                && list(&p["targets"])
                    .iter()
                    .any(|t| list(&t["kind"]).contains(&json!("proc-macro")))
        });
        if macros || known.contains(&id) {
            continue;
        }
        for dependency in nodes
            .iter()
            .filter(|n| n["id"] == *id)
            .flat_map(|n| list(&n["deps"]))
        {
            // `kind` is null for what is linked in, "build" or "dev" otherwise.
            if list(&dependency["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null())
                && let Some(next) = dependency["pkg"].as_str()
            {
                queue.push(next.to_owned());
            }
        }
        known.push(id);
    }
    let mut components: Vec<Value> = packages
        .iter()
        .filter(|p| known.iter().any(|id| p["id"] == **id))
        .map(|p| {
            let (name, version) = (&p["name"], &p["version"]);
            let url = format!(
                "pkg:cargo/{}@{}",
                name.as_str().unwrap_or_default(),
                version.as_str().unwrap_or_default()
            );
            let kind = if p["source"].is_null() {
                "application"
            } else {
                "library"
            };
            json!({
                "type": kind, "name": name, "version": version, "purl": url, "bom-ref": url,
                "licenses": [{"expression": p["license"]}]
            })
        })
        .collect();
    components.sort_by_key(|c| c["purl"].to_string());
    let count = components.len();
    let bom = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "application", "name": "casemate"}},
        "components": components
    });
    fs::write(output, format!("{bom:#}\n")).map_err(file("write", output))?;
    println!("{}: {count} components", output.display());
    Ok(())
}
