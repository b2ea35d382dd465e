//! What several of these trials use.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::world::{binaries, probe};

/// For what takes its time on a busy machine.
pub const LONG: Duration = Duration::from_secs(60);

/// Makes the list of trials of a module out of function names.
#[macro_export]
macro_rules! trials {
    ($($name:ident),+ $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(casemate_tests::skip::trial(stringify!($name), $name)),+]
        }
    };
}

/// Skips where a pod can't be made.
pub fn ready() -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root");
    }
    let shim = "containerd-shim-casemate-v2";
    if ["casemate", "casemate-agent", shim]
        .iter()
        .any(|name| !binaries().join(name).is_file())
        || probe().is_err()
    {
        return skip(format!(
            "programs are missing in {}: make quick",
            binaries().display()
        ));
    }
    Ok(())
}

/// Gives the task's shim a configuration of its own.
pub fn configure(task: &mut Task, text: &str) -> Result<PathBuf, Stop> {
    let path = task.side.join("config.toml");
    fs::write(&path, text)?;
    let variable = ("CASEMATE_CONFIG".to_owned(), path.display().to_string());
    task.shim.env.push(variable);
    Ok(path)
}
