//! pid 1 of a pod: root of the pod's user namespace and nothing on the host.
//!
//! It executes finished plans and decides nothing: no OCI, no JSON, no policy.
//! Single-threaded. Started by the shim from a read-only detached mount, with
//! its control socket as descriptor 3 and the lock of its id range as 4. Ends
//! when the shim's end of the socket closes; the kernel then ends the pod.

mod broker;
mod companion;
mod confine;
mod early;
mod error;
mod forker;
mod hook;
mod label;
mod launch;
mod learner;
mod passwd;
mod pause;
mod pod;
mod root;
mod spawn;

use std::io::Write;

use casemate_sys::process::exit_now;

fn main() {
    // For who looks after the node; the shim gives no arguments.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|arg| arg == "--version")
    {
        let version = env!("CARGO_PKG_VERSION");
        let told = writeln!(
            std::io::stdout(),
            "casemate-agent {version} (protocol {})",
            casemate_protocol::VERSION
        );
        exit_now(i32::from(told.is_err()));
    }
    // Nobody reads a pid-1 panic; abort is what the profile does anyway.
    exit_now(match pod::run() {
        Ok(()) => 0,
        Err(_) => 1,
    });
}
