//! `containerd-shim-casemate-v2`: what containerd runs, and what then serves
//! the pod. The work is in the modules; this only dispatches.

mod bootstrap;
mod error;
mod events;
mod host;
mod io;
mod log;
mod plan;
mod pod;
mod record;
mod sandbox;
mod service;

use std::io::Write;
use std::process::ExitCode;

use bootstrap::flags::{Action, Flags};
use bootstrap::{delete, info, server, start};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With stderr closed there is nobody to tell.
            let _lost = writeln!(
                std::io::stderr(),
                "containerd-shim-casemate-v2: {}",
                error::one_line(&error)
            );
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let program = args.next().unwrap_or_default();
    let flags = Flags::parse(args).map_err(|error| error.to_string())?;
    if flags.version {
        let version = env!("CARGO_PKG_VERSION");
        return writeln!(
            std::io::stdout(),
            "containerd-shim-casemate-v2 {version} ({})",
            info::RUNTIME
        )
        .map_err(|error| format!("print the version: {error}"));
    }
    if flags.info {
        return info::run();
    }
    flags.require().map_err(|error| error.to_string())?;
    match flags.action {
        Some(Action::Start) => start::run(&flags, &program),
        Some(Action::Delete) => delete::run(&flags, &program),
        Some(Action::Serve) => server::run(&flags),
        None => Err("no action: use start or delete".to_owned()),
    }
}
