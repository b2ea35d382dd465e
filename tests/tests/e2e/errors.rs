//! Errors that a client really gets: the code that containerd acts upon, and one
//! line that says what, of what, and why.

use casemate_spec::{FAILURES, RULES};
use casemate_tests::World;
use casemate_tests::bundle::Task;
use casemate_tests::image::catalog;
use casemate_tests::pod::insiders;
use casemate_tests::procs;
use casemate_tests::run::until;
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, fail};
use casemate_tests::world::RUNTIME;
use casemate_tests::{ensure, ensure_eq};
use containerd_shim_protos::api::{CheckpointTaskRequest, Empty, ExecProcessRequest};
use rustix::process::Signal;
use serde_json::json;
use ttrpc::Code;

use crate::common::{LONG, casemate_only};
use crate::hostile::one_line;

crate::trials![
    errors_have_their_code_and_one_line,
    errors_of_containerd_are_in_the_catalogue,
];

/// Fails unless the call failed with that code, in one line that has all `parts`.
fn is<T>(result: casemate_tests::Result<T>, code: Code, parts: &[&str]) -> Outcome {
    let Err(error) = result else {
        return fail(format!("no error, want {code:?} with {parts:?}"));
    };
    ensure_eq!(error.code(), Some(code), "code of {error}");
    let text = one_line(&error.to_string())?;
    for part in parts {
        ensure!(text.contains(part), "{code:?}: {text:?} lacks {part:?}");
    }
    Ok(())
}

fn errors_have_their_code_and_one_line() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("errors", &["/bin/probe", "sleep"])?;
    task.boot()?;
    let rpc = task.rpc()?.clone();
    let id = task.id.clone();
    // Unknown things.
    is(
        rpc.state("nobody"),
        Code::NOT_FOUND,
        &["container", "nobody", "not found"],
    )?;
    is(rpc.start("nobody"), Code::NOT_FOUND, &["nobody"])?;
    task.create()?;
    is(
        rpc.start_exec((&id, "none")),
        Code::NOT_FOUND,
        &["exec", "none", &id],
    )?;
    // An id that is taken.
    is(
        task.create(),
        Code::ALREADY_EXISTS,
        &["container", &id, "exists"],
    )?;
    // In the wrong state: not started, then running.
    let process = task.spec["process"].clone();
    rpc.exec((&id, "early"), &process, "", "")?;
    is(
        rpc.start_exec((&id, "early")),
        Code::FAILED_PRECONDITION,
        &["early", &id, "not running"],
    )?;
    rpc.start(&id)?;
    is(
        rpc.delete(&id),
        Code::FAILED_PRECONDITION,
        &["delete", &id, "running"],
    )?;
    is(
        rpc.start(&id),
        Code::FAILED_PRECONDITION,
        &["start", &id, "running"],
    )?;
    // A request that makes no sense: its field, its value, the way out.
    let empty = ExecProcessRequest {
        id: id.clone(),
        exec_id: "empty".to_owned(),
        ..Default::default()
    };
    is(
        rpc.call::<Empty>("Exec", &empty, SHORT),
        Code::INVALID_ARGUMENT,
        &["empty", "spec is empty"],
    )?;
    // Another container of the pod.
    let second = Task::new("second", &["/bin/true"])?;
    let mut request = second.create_request();
    let mut spec = second.spec.clone();
    spec["linux"]["rootfsPropagation"] = json!("shared");
    std::fs::write(second.bundle().join("config.json"), spec.to_string())?;
    is(
        rpc.call::<Empty>("Create", &request, SHORT),
        Code::INVALID_ARGUMENT,
        &[
            "propagation",
            "shared",
            "linux.rootfsPropagation",
            "Use private or slave.",
        ],
    )?;
    second.write_spec()?;
    request.rootfs.clear();
    request.rootfs.push(containerd_shim_protos::api::Mount {
        type_: "overlay".to_owned(),
        options: vec!["lowerdir=/nonexistent/layer".to_owned()],
        ..Default::default()
    });
    let broken = rpc.call::<Empty>("Create", &request, SHORT);
    is(
        broken,
        Code::UNKNOWN,
        &["/nonexistent/layer", "No such file"],
    )?;
    // What isn't offered.
    let checkpoint = CheckpointTaskRequest {
        id: id.clone(),
        path: "/tmp/x".to_owned(),
        ..Default::default()
    };
    is(
        rpc.call::<Empty>("Checkpoint", &checkpoint, SHORT),
        Code::UNIMPLEMENTED,
        &["checkpoint"],
    )?;
    // A pod that is lost.
    let (agent, _) = insiders(&task)?;
    procs::signal(agent, Signal::KILL);
    rpc.wait(&id, SHORT)?;
    until("the pod to be lost", SHORT, || {
        rpc.call::<Empty>("Create", &second.create_request(), SHORT)
            .err()
            .and_then(|e| e.code())
            == Some(Code::UNAVAILABLE)
    })?;
    is(
        rpc.call::<Empty>("Create", &second.create_request(), SHORT),
        Code::UNAVAILABLE,
        &["agent has ended", "made again"],
    )?;
    is(
        rpc.kill(&id, 9, false),
        Code::NOT_FOUND,
        &["already finished"],
    )?;
    Ok(task.finish()?)
}

/// What `ctr run` with these flags is told, in one line that docs/refusals.md has, and
/// that names `parts`.
fn told(n: usize, flags: &[&str], words: &[&str], parts: &[&str]) -> Outcome {
    let id = World::get()?.id(&format!("catalogue{n}"));
    let said = crate::daemon::ctr()?.run_task(RUNTIME, flags, catalog::BASE, &id, words, LONG)?;
    ensure!(said.code() != 0, "{flags:?} {words:?} is no error");
    let text = said.err();
    let line = one_line(text.trim())?;
    let rule = RULES.iter().find(|rule| line.contains(rule.what));
    match (rule, FAILURES.iter().any(|row| line.contains(row.words))) {
        (Some(rule), _) => ensure!(line.contains(rule.way_out), "no way out in {line}"),
        (None, true) => {}
        (None, false) => return fail(format!("not in the catalogue: {line}")),
    }
    for part in parts {
        ensure!(line.contains(part), "{line:?} lacks {part:?}");
    }
    Ok(())
}

fn errors_of_containerd_are_in_the_catalogue() -> Outcome {
    casemate_only()?;
    let _up = crate::daemon::hold()?;
    let mount = |text: &'static str| vec!["--mount", text];
    let asked: &[(Vec<&str>, &[&str], &[&str])] = &[
        (
            vec!["--privileged"],
            &["true"],
            &["securityContext.privileged"],
        ),
        (
            vec!["--net-host"],
            &["true"],
            &["linux.namespaces", "hostNetwork"],
        ),
        (
            vec!["--cap-add", "CAP_NET_ADMIN"],
            &["true"],
            &["CAP_NET_ADMIN", "process.capabilities"],
        ),
        (
            vec!["--device", "/dev/fuse"],
            &["true"],
            &["/dev/fuse", "linux.devices[0]"],
        ),
        (
            vec!["--annotation", "casemate.io/proflie=strict"],
            &["true"],
            &["casemate.io/proflie"],
        ),
        (
            vec!["--annotation", "casemate.io/egress=10.0.0.0"],
            &["true"],
            &["10.0.0.0", "egress"],
        ),
        (
            vec!["--annotation", "casemate.io/profile=compat"],
            &["true"],
            &["compat", "profile"],
        ),
        (
            vec!["--apparmor-profile", "none-such"],
            &["true"],
            &["none-such", "process.apparmorProfile"],
        ),
        (
            vec!["--rootfs-propagation", "rshared"],
            &["true"],
            &["rshared", "linux.rootfsPropagation"],
        ),
        (
            vec!["--with-ns", "pid:/proc/1/ns/pid"],
            &["true"],
            &["/proc/1/ns/pid", "type=pid"],
        ),
        (
            vec!["--cwd", "relative"],
            &["true"],
            &["relative", "process.cwd"],
        ),
        (
            vec!["--memory-limit", "1"],
            &["true"],
            &["linux.resources.memory.limit"],
        ),
        (
            mount("type=bind,src=/etc,dst=/mnt,options=rbind"),
            &["true"],
            &["/etc", "].source"],
        ),
        (
            mount("type=bind,src=/no/such,dst=/mnt,options=rbind"),
            &["true"],
            &["/no/such", "/mnt"],
        ),
        (
            mount("type=ext4,src=/dev/vda,dst=/mnt"),
            &["true"],
            &["ext4", "].type"],
        ),
        (
            mount("type=tmpfs,src=x,dst=/proc/x"),
            &["true"],
            &["/proc/x", "].destination"],
        ),
        (Vec::new(), &["no-such-program"], &["no-such-program"]),
        (Vec::new(), &["/no/such/program"], &["/no/such/program"]),
        (Vec::new(), &["/etc/passwd"], &["/etc/passwd"]),
    ];
    for (n, (flags, words, parts)) in asked.iter().enumerate() {
        told(n, flags, words, parts)?;
    }
    Ok(())
}
