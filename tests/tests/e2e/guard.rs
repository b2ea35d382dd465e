//! The guard of the network where the kernel has no nf_tables: `make vm-test` boots
//! one, from which its modules are withheld.

use casemate_netguard::GuardError;
use casemate_tests::bundle::Task;
use casemate_tests::ensure;
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::spec::annotate;

use crate::common::{casemate_only, output};
use crate::hostile::expect;
use crate::hostile_node::configure;

crate::trials![guard_without_nf_tables];

const ALLOW: &str = "[network]\nwithout_nftables = \"allow\"\n";

fn task(config: &str) -> Result<Task, Stop> {
    let mut task = Task::new("noguard", &["/bin/echo", "runs"])?;
    configure(&mut task, config)?;
    Ok(task)
}

fn runs(mut task: Task, warning: Option<&str>) -> Outcome {
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let said = output(&task)?;
    ensure!(said == "runs\n", "said {said:?}");
    let log = String::from_utf8_lossy(&task.log.so_far()).into_owned();
    let told = log.contains("isn't guarded");
    ensure!(told == warning.is_some(), "the log: {log}");
    if let Some(warning) = warning {
        ensure!(log.contains(warning), "no {warning:?} in the log: {log}");
    }
    Ok(task.finish()?)
}

/// Refused by name, with the way out; by leave it starts, and the log says so; a pod's
/// own lists are never left out.
fn guard_without_nf_tables() -> Outcome {
    casemate_only()?;
    match casemate_netguard::counters() {
        Err(GuardError::Missing(_)) => {}
        Err(e) => return Err(Stop::Fail(format!("neither there nor missing: {e}"))),
        Ok(_) => return skip("this kernel has nf_tables; make vm-test boots one without"),
    }
    expect(
        task("")?,
        &[
            "this kernel has no nf_tables",
            "CONFIG_NF_TABLES_INET",
            // The client shows it with quotes of its own around.
            "or set network.without_nftables",
        ],
    )?;
    runs(task(ALLOW)?, Some("network.without_nftables"))?;
    for key in ["egress", "ingress"] {
        let mut listed = task(ALLOW)?;
        annotate(&mut listed.spec, &format!("casemate.io/{key}"), "none");
        expect(
            listed,
            &[
                "this kernel has no nf_tables",
                "remove the pod's annotations casemate.io/egress",
            ],
        )?;
    }
    // Nothing to hold is no reason to refuse.
    runs(task("[network]\nmetadata = \"allow\"\n")?, None)
}
