//! 141, of learning: an agent whose learners say what they must not.

use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::operator::{ask, records};
use casemate_tests::pod::say;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq, procs};
use seccomp_profiles::Recording;
use seccomp_profiles::recording::{Container, LONGEST};
use serde_json::json;

use crate::common::{LONG, RUNNING, casemate_only, status};
use crate::hostile_agent::{in_case, lying_under, refused};

crate::trials![
    c141_learner_that_lies_of_itself,
    c141_learner_that_lies_of_its_container,
    c141_learner_that_never_ends,
];

/// A task whose learner lies as `word` says; not yet booted.
fn lying(word: &str) -> Result<Task, Stop> {
    let place = casemate_tests::World::get()?.dir().join("learned-of-liars");
    let config = format!(
        "[learn]\nallow = true\ndirectory = \"{}\"\n",
        place.display()
    );
    let mut task = lying_under(word, &config)?;
    task.spec["annotations"]["casemate.io/profile"] = "learn".into();
    Ok(task)
}

fn c141_learner_that_lies_of_itself() -> Outcome {
    casemate_only()?;
    for word in [
        "learner-without-pidfd",
        "learner-is-the-agent",
        "learner-is-no-process",
        "learner-failed",
    ] {
        in_case(word, refused(&mut lying(word)?))?;
    }
    Ok(())
}

/// A lie ends the pod: of whoever says so nothing can be believed any more.
fn c141_learner_that_lies_of_its_container() -> Outcome {
    casemate_only()?;
    for word in [
        "learner-garbage",
        "learner-oversize",
        "learner-ready-twice",
        "learner-no-call",
        "learner-no-count",
        "learner-no-arguments",
        "learner-no-port",
        "learner-a-path",
        "learner-colours",
        "learner-hangs-up",
    ] {
        let check = || -> Outcome {
            let mut task = lying(word)?;
            task.boot()?;
            // What it says may come before what Create waits for.
            if task.create().is_ok() {
                let started = task.rpc()?.start(&task.id).is_ok();
                let ended = task.rpc()?.wait(&task.id, Duration::from_secs(5))?;
                let status = ended.exit_status;
                // 255 is that of a start that failed: the pod may end in the middle of it.
                ensure!(status == 137 || !started && status == 255, "{status}");
                let all = records(&task, "broker_loss")?;
                ensure_eq!(all.len(), 1, "records: {all:?}");
            }
            ensure!(
                procs::identity(task.shim_pid()?).is_some(),
                "the shim has ended"
            );
            Ok(task.finish()?)
        };
        in_case(word, check())?;
    }
    Ok(())
}

fn c141_learner_that_never_ends() -> Outcome {
    casemate_only()?;
    let mut task = lying("learner-that-never-ends")?;
    task.boot()?;
    task.create()?;
    task.rpc()?.start(&task.id)?;
    let recording = || -> Result<Recording, Stop> {
        let told = ask(task.rpc()?, "Recording", &json!({}), SHORT)?;
        let text = told["recording"].to_string();
        ensure!(text.len() < LONGEST, "{} bytes", text.len());
        Recording::parse(&text).map_err(|e| Stop::Fail(e.to_string()))
    };
    let ports = |all: &Recording| {
        all.container(&task.id)
            .map_or(0, |c| c.ports_connected().len())
    };
    until("it to be heard", LONG, || {
        recording().is_ok_and(|all| ports(&all) == Container::PORTS)
    })?;
    let all = recording()?;
    let one = all
        .container(&task.id)
        .ok_or_else(|| Stop::Fail(format!("{all:?}")))?;
    ensure!(one.calls().count() < 700, "{} kinds", one.calls().count());
    ensure!(
        one.lost().ports > 0 && one.lost().calls > 0,
        "{:?}",
        one.lost()
    );
    // The rest of the pod is as it was.
    ensure_eq!(status(&task)?, RUNNING, "state");
    ensure_eq!(
        say(&task, "e", &["/bin/echo", "well"])?,
        "well\n",
        "an exec"
    );
    Ok(task.finish()?)
}
