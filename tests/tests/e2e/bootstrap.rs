//! 2–17: the command line, standard input, and the answers.

use std::fs;
use std::process::Command;
use std::time::Duration;

use casemate_tests::bundle::Task;
use casemate_tests::run::{Output, run};
use casemate_tests::shim::{Form, SHORT};
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{World, ensure, ensure_eq, procs};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::common::casemate_only;

crate::trials![
    c002_version,
    c003_info,
    c004_info_echoes_options,
    c005_info_features,
    c006_namespace_is_required,
    c007_bootstrap_params,
    c008_bootstrap_params_of_another,
    c009_any_is_not_bootstrap,
    c010_answer_for_containerd_2,
    c011_answer_for_containerd_1_7,
    c012_answer_for_containerd_1_6,
    c013_start_says_nothing_else,
    c014_start_closes_its_pipes,
    c015_unreadable_config,
    c016_socket_dir,
    c017_address,
];

fn shim(args: &[&str], stdin: &[u8]) -> Result<Output, Stop> {
    let mut command = Command::new(World::get()?.shim()?);
    command.args(args).env_clear().current_dir("/");
    Ok(run(&mut command, stdin, Duration::from_secs(5))?)
}

fn c002_version() -> Outcome {
    let output = shim(&["-v"], &[])?;
    ensure_eq!(output.code(), 0, "exit code");
    let text = output.out();
    ensure!(text.contains("containerd-shim-"), "no name in {text:?}");
    ensure!(text.contains(char::is_numeric), "no version in {text:?}");
    Ok(())
}

fn info(stdin: &[u8]) -> Result<RuntimeInfo, Stop> {
    let output = shim(&["-info"], stdin)?;
    ensure_fields(&output)?;
    Ok(RuntimeInfo::parse_from_bytes(&output.stdout)?)
}

fn ensure_fields(output: &Output) -> Outcome {
    ensure_eq!(output.code(), 0, "exit code of -info: {}", output.err());
    ensure!(output.stderr.is_empty(), "stderr {:?}", output.err());
    Ok(())
}

fn c003_info() -> Outcome {
    casemate_only()?;
    let info = info(&[])?;
    ensure_eq!(info.name, World::get()?.runtime(), "name");
    ensure!(!info.version.version.is_empty(), "no version");
    Ok(())
}

fn runc_options(value: &[u8]) -> Any {
    Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: value.to_vec(),
        ..Default::default()
    }
}

fn c004_info_echoes_options() -> Outcome {
    casemate_only()?;
    // no_pivot_root = true.
    let options = runc_options(&[1 << 3, 1]);
    let info = info(&options.write_to_bytes()?)?;
    ensure_eq!(info.options.into_option(), Some(options), "options");
    Ok(())
}

fn c005_info_features() -> Outcome {
    casemate_only()?;
    let features = info(&[])?.features.unwrap_or_default();
    ensure_eq!(
        features.type_url,
        "types.containerd.io/opencontainers/runtime-spec/1/features/Features",
        "type"
    );
    let json: Value = serde_json::from_slice(&features.value)?;
    let has = |list: &Value, word: &str| list.as_array().is_some_and(|l| l.contains(&json!(word)));
    ensure!(
        has(&json["linux"]["namespaces"], "user"),
        "no user namespaces: {json}"
    );
    ensure!(has(&json["mountOptions"], "rro"), "no rro: {json}");
    ensure_eq!(
        json["linux"]["mountExtensions"]["idmap"]["enabled"],
        true,
        "idmap"
    );
    Ok(())
}

/// `mountOptions` of the features that `-info` tells.
pub fn mount_options() -> Result<Vec<String>, Stop> {
    let features = info(&[])?.features.unwrap_or_default();
    let json: Value = serde_json::from_slice(&features.value)?;
    let list = json["mountOptions"].as_array().cloned().unwrap_or_default();
    Ok(list
        .iter()
        .filter_map(|option| option.as_str().map(str::to_owned))
        .collect())
}

fn c006_namespace_is_required() -> Outcome {
    for action in ["start", "delete"] {
        let output = shim(&["-id", "x", action], &[])?;
        ensure!(output.code() != 0, "{action} without -namespace succeeded");
        let text = output.err() + &output.out();
        ensure!(
            text.contains("namespace"),
            "{action}: {text:?} does not name the flag"
        );
        if World::get()?.is_casemate() {
            ensure_eq!(text.trim().lines().count(), 1, "lines of {text:?}");
        }
    }
    Ok(())
}

/// What containerd 2.3 writes to the standard input of `start`.
fn params(task: &Task, id: &str) -> BootstrapParams {
    BootstrapParams {
        instance_id: id.to_owned(),
        namespace: task.shim.namespace.clone(),
        containerd_version: "2.3.4".to_owned(),
        containerd_ttrpc_address: format!("unix://{}", task.shim.ttrpc),
        containerd_grpc_address: format!("unix://{}", task.shim.grpc),
        containerd_binary: "/usr/bin/containerd".to_owned(),
        ..Default::default()
    }
}

fn c007_bootstrap_params() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c007", &["/bin/true"])?;
    task.shim.stdin = params(&task, &task.id).write_to_bytes()?;
    let answer = task.boot()?;
    ensure_eq!(answer.form, Form::Protobuf, "form");
    ensure_eq!(
        (answer.version, answer.protocol.as_str()),
        (3, "ttrpc"),
        "version, protocol"
    );
    task.create()?;
    ensure_eq!(task.start_and_wait()?.exit_status, 0, "a task of it");
    task.events.wait_for("exit", SHORT)?;
    Ok(task.finish()?)
}

fn c008_bootstrap_params_of_another() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c008", &["/bin/true"])?;
    task.shim.stdin = params(&task, "someone-else").write_to_bytes()?;
    task.write_spec()?;
    let output = task.shim.run("start")?;
    ensure!(output.code() != 0, "start succeeded: {}", output.out());
    ensure!(
        procs::with_command(&task.id).is_empty(),
        "a process is left"
    );
    Ok(())
}

fn c009_any_is_not_bootstrap() -> Outcome {
    for value in [&[][..], &[1 << 3, 1][..]] {
        let mut task = Task::new("c009", &["/bin/true"])?;
        task.shim.stdin = runc_options(value).write_to_bytes()?;
        let answer = task.boot()?;
        ensure!(
            answer.form != Form::Protobuf,
            "taken for bootstrap parameters"
        );
        task.rpc()?.shutdown(&task.id)?;
        task.wait_gone(Duration::from_secs(3))?;
    }
    Ok(())
}

fn answer_for(name: &str, version: &str) -> Result<(Form, i64), Stop> {
    let mut task = Task::new(name, &["/bin/true"])?;
    task.spec["ociVersion"] = json!(version);
    let answer = task.boot()?;
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok((answer.form, answer.version))
}

fn c010_answer_for_containerd_2() -> Outcome {
    casemate_only()?;
    for version in ["1.2.0", "1.2.1", "1.3.0"] {
        ensure_eq!(
            answer_for("c010", version)?,
            (Form::Json, 3),
            "ociVersion {version}"
        );
    }
    Ok(())
}

fn c011_answer_for_containerd_1_7() -> Outcome {
    let (form, version) = answer_for("c011", "1.1.0")?;
    ensure!(
        form != Form::Protobuf && version == 2,
        "{form:?} version {version}"
    );
    Ok(())
}

fn c012_answer_for_containerd_1_6() -> Outcome {
    ensure_eq!(answer_for("c012", "1.0.2-dev")?, (Form::Bare, 2), "answer");
    Ok(())
}

fn c013_start_says_nothing_else() -> Outcome {
    let mut task = Task::new("c013", &["/bin/true"])?;
    task.shim.debug = true;
    for (name, value) in [("RUST_LOG", "trace"), ("RUST_BACKTRACE", "full")] {
        task.shim.env.push((name.to_owned(), value.to_owned()));
    }
    // `boot` reads both pipes as one answer and refuses anything beside it.
    ensure_eq!(task.boot()?.form, Form::Bare, "form");
    task.rpc()?.shutdown(&task.id)?;
    Ok(task.wait_gone(Duration::from_secs(3)).map(|_| ())?)
}

fn c014_start_closes_its_pipes() -> Outcome {
    let task = Task::new("c014", &["/bin/true"])?;
    task.write_spec()?;
    let output = task.shim.run("start")?;
    // `run` returns at the end of both pipes.
    ensure_eq!(output.code(), 0, "exit code: {}", output.err());
    ensure!(
        output.elapsed < Duration::from_secs(1),
        "end of pipes after {:?}",
        output.elapsed
    );
    let answer = casemate_tests::shim::Answer::parse(&output.stdout)?;
    let client = casemate_tests::shim::Client::connect(&answer.address, answer.version)?;
    let pid = client.shim(&task.id)?.shim_pid;
    ensure!(
        procs::identity(pid).is_some(),
        "the shim ended with its starter"
    );
    client.shutdown(&task.id)?;
    casemate_tests::run::until("the shim to end", Duration::from_secs(3), || {
        procs::identity(pid).is_none()
    })?;
    Ok(())
}

fn c015_unreadable_config() -> Outcome {
    for text in [None, Some("{"), Some("[1, 2"), Some("\0\0\0")] {
        let task = Task::new("c015", &["/bin/true"])?;
        if let Some(text) = text {
            fs::write(task.bundle().join("config.json"), text)?;
        }
        let output = task.shim.run("start")?;
        ensure!(output.code() != 0, "start with config {text:?} succeeded");
        let said = output.out() + &output.err();
        if World::get()?.is_casemate() {
            ensure_eq!(said.trim().lines().count(), 1, "lines of {said:?}");
            ensure!(
                said.contains("config.json"),
                "{said:?} does not name config.json"
            );
        }
        ensure!(
            procs::with_command(&task.id).is_empty(),
            "a process is left"
        );
        let socket = task.expected_address(&task.id);
        ensure!(
            !fs::exists(socket.trim_start_matches("unix://"))?,
            "a socket is left"
        );
    }
    Ok(())
}

fn c016_socket_dir() -> Outcome {
    casemate_only()?;
    let mut task = Task::new("c016", &["/bin/true"])?;
    let dir = World::get()?.dir().join("k");
    fs::create_dir_all(&dir)?;
    let mut params = params(&task, &task.id);
    params.socket_dir = Some(dir.display().to_string());
    task.shim.stdin = params.write_to_bytes()?;
    let answer = task.boot()?;
    ensure!(
        answer.socket().starts_with(&dir),
        "address {}",
        answer.address
    );
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok(())
}

fn c017_address() -> Outcome {
    let mut task = Task::new("c017", &["/bin/true"])?;
    let answer = task.boot()?;
    ensure_eq!(answer.address, task.expected_address(&task.id), "address");
    let written = fs::read_to_string(task.bundle().join("address"))?;
    ensure_eq!(written, answer.address, "<bundle>/address");
    task.rpc()?.shutdown(&task.id)?;
    task.wait_gone(Duration::from_secs(3))?;
    Ok(())
}
