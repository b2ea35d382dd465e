//! `casemate metrics`: numbers of living pods for Prometheus, gathered when
//! somebody asks and at no other time.

mod gather;
mod serve;
mod text;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{RunError, Step};
use crate::operator;
use crate::out;

pub use gather::pss;

/// The page, as it is now.
pub async fn render() -> Result<String, RunError> {
    Ok(gather::gather().await?.render())
}

/// Help text.
pub const EXAMPLES: &str = "\
Examples:
  casemate metrics                                  once, to standard output
  casemate metrics --listen 127.0.0.1:9464          for Prometheus, at /metrics
  casemate metrics --textfile /var/lib/node_exporter/casemate.prom

The last writes a new file and renames it, as textfile collectors want it. A shim that
doesn't answer within a second has casemate_sandbox_up 0 and holds up nobody. Who may
connect to the address may read names of pods: choose it accordingly. docs/metrics.md
has all names. Exit status: 0, or 125 if casemate itself failed.";

/// Where to.
#[derive(Debug, Args)]
pub struct Metrics {
    /// Answer GET /metrics at this address, until ended
    #[arg(long, value_name = "IP:PORT", conflicts_with = "textfile", value_parser = address)]
    listen: Option<SocketAddr>,
    /// Write them to this file
    #[arg(long, value_name = "FILE")]
    textfile: Option<PathBuf>,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "give an address and a port, as 127.0.0.1:9464 or [::]:9464".to_owned())
}

/// Gathers and tells.
pub fn run(options: &Metrics) -> Result<i32, RunError> {
    operator::needs_root("metrics")?;
    if let Some(address) = options.listen {
        operator::block_on(serve::serve(address))?;
        return Ok(0);
    }
    let text = operator::block_on(render())?;
    match &options.textfile {
        Some(path) => replace(path, &text)?,
        None => out::say(text)?,
    }
    Ok(0)
}

/// Writes a file that readers see whole, as it was or as it is.
fn replace(path: &Path, text: &str) -> Result<(), RunError> {
    let shown = path.display();
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut new = tempfile::Builder::new()
        .prefix(".casemate-metrics-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .step("write", shown)?;
    new.write_all(text.as_bytes())
        .step("write", path.display())?;
    new.persist(path)
        .map_err(|e| e.error)
        .step("write", path.display())?;
    Ok(())
}
