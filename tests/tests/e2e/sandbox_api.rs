//! 140: the sandbox API, call by call.

use std::fs;
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::sandbox_api::{self as api, Pod, field, number, with_namespaces};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, fail};
use casemate_tests::{Failure, ensure, ensure_eq, procs};
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::sandbox_api::{
    PingRequest, PlatformRequest, PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse,
    SandboxStatusRequest, StopSandboxRequest,
};
use rustix::process::Signal;
use ttrpc::Code;

use crate::common::{casemate_only, expect_code, expect_text};

crate::trials![
    c140_off_by_default,
    c140_life_of_a_sandbox,
    c140_status_and_metrics,
    c140_made_as_the_configuration_says,
    c140_loss_of_the_agent,
    c140_connection_outlives_the_answer,
    c140_wrong_requests,
    c140_a_refused_pod_may_be_made_again,
    c140_delete_with_the_shim_dead,
    c140_a_specification_in_the_bundle,
];

const CALLS: [&str; 9] = [
    "CreateSandbox",
    "StartSandbox",
    "Platform",
    "StopSandbox",
    "WaitSandbox",
    "SandboxStatus",
    "PingSandbox",
    "ShutdownSandbox",
    "SandboxMetrics",
];

fn c140_off_by_default() -> Outcome {
    casemate_only()?;
    let task = Task::sleeping("c140off")?;
    // Field 1 is the sandbox' id in all nine.
    let ask = PingRequest {
        sandbox_id: task.id.clone(),
        ..Default::default()
    };
    for call in CALLS {
        let answer = || task.rpc()?.of_sandbox().call::<Empty>(call, &ask, SHORT);
        expect_code(call, answer(), Code::UNIMPLEMENTED)?;
        expect_text(call, answer(), "sandbox.api = true")?;
    }
    task.finish()?;
    // A bundle of the sandbox API is refused before anything is made.
    let pod = Pod::new("c140offstart", "")?;
    let output = pod.task.shim.run("start")?;
    ensure!(output.code() != 0, "start succeeded");
    for part in ["config.json", "sandbox.api = true"] {
        ensure!(
            output.err().contains(part),
            "{:?}; want {part}",
            output.err()
        );
    }
    Ok(())
}

/// containerd's client may find the end of a connection before an answer that came first:
/// a shim that has answered ShutdownSandbox stays for a moment.
fn c140_connection_outlives_the_answer() -> Outcome {
    casemate_only()?;
    let mut open = 0;
    for _ in 0..5 {
        let (pod, _) = Pod::ready("c140last", Vec::new())?;
        pod.shutdown()?;
        std::thread::sleep(Duration::from_millis(10));
        let answered = match ping(&pod) {
            Ok(_) => true,
            // Whatever the shim says, if it is the shim.
            Err(Failure::Rpc { source, .. }) => matches!(source, ttrpc::Error::RpcStatus(_)),
            Err(error) => return Err(error.into()),
        };
        open += u32::from(answered);
        pod.task.wait_gone(Duration::from_secs(5))?;
    }
    // On a busy machine not each time.
    ensure!(open > 0, "the connection ended with the answer, each time");
    Ok(())
}

fn ping(pod: &Pod) -> casemate_tests::Result<Empty> {
    let ask = PingRequest {
        sandbox_id: pod.id().to_owned(),
        ..Default::default()
    };
    pod.api()?.call("PingSandbox", &ask, SHORT)
}

fn c140_life_of_a_sandbox() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::booted("c140life")?;
    ensure_eq!(pod.task.answer()?.version, 3, "version told at start");
    expect_code("start first", pod.start(), Code::FAILED_PRECONDITION)?;
    expect_code("ping first", ping(&pod), Code::FAILED_PRECONDITION)?;
    pod.stop(0)?;

    let request = pod.request(api::config("web-0", ""))?;
    pod.create(&request)?;
    expect_code("create twice", pod.create(&request), Code::ALREADY_EXISTS)?;
    ensure_eq!(pod.status()?.state, "SANDBOX_NOTREADY", "before start");
    let started = pod.start()?;
    ensure!(started.pid > 0, "no pid");
    ensure!(started.created_at.is_some(), "no time of creation");
    let agent = procs::identity(started.pid);
    ensure!(agent.is_some(), "pid {} isn't there", started.pid);
    ensure_eq!(
        fs::read_link(format!("/proc/{}/ns/net", started.pid))?,
        fs::read_link(&request.netns_path)?,
        "network namespace"
    );
    expect_code("start twice", pod.start(), Code::FAILED_PRECONDITION)?;
    ping(&pod)?;
    let ask = PlatformRequest {
        sandbox_id: pod.id().to_owned(),
        ..Default::default()
    };
    let platform: PlatformResponse = pod.api()?.call("Platform", &ask, SHORT)?;
    let platform = platform.platform.unwrap_or_default();
    ensure_eq!(
        (&*platform.os, &*platform.architecture),
        ("linux", "amd64"),
        "platform"
    );

    let waiters = [pod.waiter()?, pod.waiter()?, pod.waiter()?];
    std::thread::sleep(Duration::from_millis(200));
    ensure!(
        waiters.iter().all(|waiter| !waiter.is_finished()),
        "wait returned before the end"
    );
    let begun = Instant::now();
    pod.stop(0)?;
    for waiter in waiters {
        let Ok(answer) = waiter.join() else {
            return fail("a waiter panicked");
        };
        let answer = answer?;
        ensure_eq!(answer.exit_status, 0, "status of an ordered stop");
        ensure!(answer.exited_at.is_some(), "no time of the end");
    }
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(5), "stop and wait took {took:?}");
    ensure!(procs::identity(started.pid) != agent, "the agent lives on");
    let status = pod.status()?;
    ensure_eq!(
        (&*status.state, status.pid),
        ("SANDBOX_NOTREADY", 0),
        "after stop"
    );
    ensure!(
        status.created_at.is_some() && status.exited_at.is_some(),
        "times after stop"
    );
    pod.stop(0)?;
    expect_code("ping after stop", ping(&pod), Code::UNAVAILABLE)?;
    expect_code("start after stop", pod.start(), Code::FAILED_PRECONDITION)?;
    expect_code(
        "create after stop",
        pod.create(&request),
        Code::ALREADY_EXISTS,
    )?;
    let late = pod.waiter()?.join();
    ensure!(matches!(late, Ok(Ok(_))), "wait after the end");
    Ok(pod.finish()?)
}

fn metrics(pod: &Pod) -> casemate_tests::Result<SandboxMetricsResponse> {
    let ask = SandboxMetricsRequest {
        sandbox_id: pod.id().to_owned(),
        ..Default::default()
    };
    pod.api()?.call("SandboxMetrics", &ask, SHORT)
}

fn c140_status_and_metrics() -> Outcome {
    casemate_only()?;
    let (pod, pid) = Pod::ready("c140status", api::config("web-0", ""))?;
    let status = pod.status()?;
    ensure_eq!(
        (&*status.sandbox_id, &*status.state, status.pid),
        (pod.id(), "SANDBOX_READY", pid),
        "status"
    );
    ensure!(status.exited_at.is_none(), "an end while it is ready");
    let info = api::info(&status)?;
    ensure_eq!(info["pid"], pid, "info: {info}");
    ensure_eq!(info["sandboxState"], "ready", "info: {info}");
    let ask = SandboxStatusRequest {
        sandbox_id: pod.id().to_owned(),
        ..Default::default()
    };
    let terse: containerd_shim_protos::sandbox_api::SandboxStatusResponse =
        pod.api()?.call("SandboxStatus", &ask, SHORT)?;
    ensure!(terse.info.is_empty(), "info without being asked for");

    let metric = metrics(&pod)?.metrics.unwrap_or_default();
    ensure_eq!(metric.id, pod.id(), "whose metrics");
    ensure!(metric.timestamp.is_some(), "no time of the metrics");
    let data = metric.data.unwrap_or_default();
    ensure!(
        matches!(
            &*data.type_url,
            "io.containerd.cgroups.v1.Metrics" | "io.containerd.cgroups.v2.Metrics"
        ),
        "type of the metrics: {}",
        data.type_url
    );
    ensure!(!data.value.is_empty(), "empty metrics");
    pod.stop(0)?;
    expect_code("metrics after stop", metrics(&pod), Code::UNAVAILABLE)?;
    Ok(pod.finish()?)
}

fn c140_made_as_the_configuration_says() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::booted("c140config")?;
    let parent = format!("/casemate-test/{}-pod", pod.id());
    let request = pod.request(api::config("web-0", &parent))?;
    pod.create(&request)?;
    let pid = pod.start()?.pid;
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let place = format!("{parent}/{}", pod.id());
    ensure!(
        cgroup.lines().any(|line| line.ends_with(&place)),
        "the agent isn't in {place}: {cgroup}"
    );
    let inside = |what: &[&str]| -> casemate_tests::Result<String> {
        let pid = pid.to_string();
        let mut command = std::process::Command::new("nsenter");
        command
            .args(["--target", &pid, "--net", "--uts"])
            .args(what);
        Ok(casemate_tests::run::run(&mut command, &[], SHORT)?
            .ok()?
            .out())
    };
    ensure_eq!(inside(&["hostname"])?.trim(), "web-0", "host name");
    let timeout = inside(&["cat", "/proc/sys/net/ipv4/tcp_fin_timeout"])?;
    ensure_eq!(timeout.trim(), "77", "sysctl");
    ensure_eq!(
        fs::read_to_string("/proc/sys/net/ipv4/tcp_fin_timeout")?.trim(),
        "60",
        "control: the host's own"
    );
    // The pod's numbers are those of its parent, which covers containers too.
    let metric = metrics(&pod)?.metrics.unwrap_or_default();
    ensure!(
        !metric.data.unwrap_or_default().value.is_empty(),
        "metrics of the pod's cgroup"
    );
    let id = pod.id().to_owned();
    pod.shutdown()?;
    pod.task.wait_gone(Duration::from_secs(5))?;
    // The parent is kubelet's to remove; nobody made it before us here.
    for dir in casemate_tests::leaks::cgroups_with(&id).iter().rev() {
        ensure!(dir.ends_with("-pod"), "left: {dir}");
        fs::remove_dir(dir)?;
    }
    Ok(pod.task.expect_clean(Duration::from_secs(2))?)
}

fn c140_loss_of_the_agent() -> Outcome {
    casemate_only()?;
    let (pod, pid) = Pod::ready("c140loss", Vec::new())?;
    let waiter = pod.waiter()?;
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    procs::signal(pid, Signal::KILL);
    let Ok(answer) = waiter.join() else {
        return fail("the waiter panicked");
    };
    ensure_eq!(answer?.exit_status, 137, "status of a lost sandbox");
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(5), "wait took {took:?}");
    ensure_eq!(pod.status()?.state, "SANDBOX_NOTREADY", "state");
    expect_code("ping", ping(&pod), Code::UNAVAILABLE)?;
    pod.stop(0)?;
    Ok(pod.finish()?)
}

fn c140_wrong_requests() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::booted("c140wrong")?;
    let good = pod.request(api::config("web-0", ""))?;
    let with = |options: Vec<u8>| {
        let mut request = good.clone();
        request.options.mut_or_insert_default().value = options;
        request
    };
    let of_type = |name: &str| {
        let mut request = good.clone();
        request.options.mut_or_insert_default().type_url = name.to_owned();
        request
    };
    let host = |options: &[u8]| {
        let mut request = with(with_namespaces(options));
        request.netns_path = String::new();
        request
    };
    let bad = Code::INVALID_ARGUMENT;
    let mut other_id = good.clone();
    other_id.sandbox_id = "another".to_owned();
    let mut no_id = good.clone();
    no_id.sandbox_id = String::new();
    let mut other_bundle = good.clone();
    other_bundle.bundle_path = "/tmp".to_owned();
    let mut no_netns = good.clone();
    no_netns.netns_path = "/nonexistent/netns".to_owned();
    let mut not_netns = good.clone();
    not_netns.netns_path = "/proc/self/ns/uts".to_owned();
    for (what, request, code, part) in [
        ("another id", &other_id, bad, "sandbox_id"),
        ("no id", &no_id, bad, "sandbox_id"),
        ("another bundle", &other_bundle, bad, "bundle_path"),
        (
            "no such netns",
            &no_netns,
            Code::UNKNOWN,
            "/nonexistent/netns",
        ),
        ("no netns", &not_netns, Code::UNKNOWN, "network namespace"),
        ("garbage", &with(vec![0xff; 40]), bad, "PodSandboxConfig"),
        ("cut off", &with(vec![0x42, 0x10, 1]), bad, "cut off"),
        (
            "deep garbage",
            &with(field(8, &field(2, b"\x0a"))),
            bad,
            "cut off",
        ),
        (
            "another type",
            &of_type("runtime.v1.Nothing"),
            bad,
            "runtime.v1.Nothing",
        ),
        ("windows", &with(field(9, b"")), bad, "windows"),
        ("network NODE", &host(&number(1, 2)), bad, "hostNetwork"),
        ("pid NODE", &host(&number(2, 2)), bad, "hostPID"),
        ("ipc NODE", &host(&number(3, 2)), bad, "hostIPC"),
        (
            "NODE with a netns",
            &with(with_namespaces(&number(1, 2))),
            bad,
            "netns_path",
        ),
        (
            "unknown mode",
            &host(&number(1, 9)),
            bad,
            "namespace_options.network",
        ),
        ("unknown namespace", &host(&number(9, 1)), bad, "field 9"),
        (
            "sysctl of the node",
            &with(field(
                8,
                &field(3, &[field(1, b"kernel.panic"), field(2, b"1")].concat()),
            )),
            bad,
            "kernel.panic",
        ),
        (
            "cgroup outside",
            &with(field(8, &field(1, b"/a/../../b"))),
            bad,
            "cgroupsPath",
        ),
        (
            "two lines of DNS",
            &with(field(4, &field(1, b"1.1.1.1\nnameserver 2.2.2.2"))),
            bad,
            "dns_config",
        ),
        (
            "a long host name",
            &with(field(2, &[b'a'; 100])),
            bad,
            "hostname",
        ),
    ] {
        expect_code(what, pod.create(request), code)?;
        expect_text(what, pod.create(request), part)?;
    }
    for call in CALLS.iter().filter(|call| **call != "CreateSandbox") {
        let ask = StopSandboxRequest {
            sandbox_id: "another".to_owned(),
            ..Default::default()
        };
        let answer = pod.api()?.call::<Empty>(call, &ask, SHORT);
        expect_code(call, answer, Code::NOT_FOUND)?;
    }
    for call in [
        "StartSandbox",
        "WaitSandbox",
        "SandboxStatus",
        "PingSandbox",
        "SandboxMetrics",
    ] {
        let ask = PingRequest {
            sandbox_id: pod.id().to_owned(),
            ..Default::default()
        };
        let answer = pod.api()?.call::<Empty>(call, &ask, SHORT);
        expect_code(call, answer, Code::FAILED_PRECONDITION)?;
    }
    let app = pod.container("c140early", &["/bin/true"], std::process::id())?;
    expect_code("a container first", app.create(), Code::FAILED_PRECONDITION)?;
    // All of it left a shim that serves, and nothing else.
    pod.create(&good)?;
    pod.start()?;
    Ok(pod.finish()?)
}

fn c140_a_refused_pod_may_be_made_again() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::booted("c140again")?;
    // Fails late: with the agent's cgroup made, and its network entered.
    let mut late = pod.request(field(
        8,
        &field(
            3,
            &[field(1, b"net.ipv4.no_such_key"), field(2, b"1")].concat(),
        ),
    ))?;
    late.netns_path = String::new();
    expect_text("no such sysctl", pod.create(&late), "no_such_key")?;
    let good = pod.request(Vec::new())?;
    pod.create(&good)?;
    pod.start()?;
    Ok(pod.finish()?)
}

fn c140_delete_with_the_shim_dead() -> Outcome {
    casemate_only()?;
    let (pod, pid) = Pod::ready("c140delete", api::config("web-0", ""))?;
    let app = pod.container("c140deleteapp", &["/bin/probe", "sleep"], pid)?;
    app.create()?;
    app.rpc()?.start(&app.id)?;
    let all = procs::family(pod.task.shim_pid()?);
    procs::signal(pod.task.shim_pid()?, Signal::KILL);
    pod.task.wait_gone(Duration::from_secs(2))?;
    let reply = pod.task.shim.delete()?;
    ensure_eq!(reply.exit_status, 137, "reply");
    ensure!(
        !all.iter().any(|process| procs::alive(*process)),
        "processes live after delete"
    );
    pod.task.expect_clean(Duration::from_secs(1))?;
    app.expect_clean(Duration::from_secs(1))?;
    pod.task.shim.delete()?;
    Ok(())
}

fn c140_a_specification_in_the_bundle() -> Outcome {
    casemate_only()?;
    let mut pod = Pod::new("c140spec", "sandbox.api = true\n")?;
    pod.task.spec["hostname"] = "from-the-spec".into();
    pod.task.spec["process"]["args"] = serde_json::json!(["/pause"]);
    pod.task.boot()?;
    let mut request = pod.request(api::config("web-0", ""))?;
    expect_text("both", pod.create(&request), "config.json")?;
    request.options.take();
    request.netns_path = String::new();
    pod.create(&request)?;
    let pid = pod.start()?.pid;
    let mut command = std::process::Command::new("nsenter");
    command.args(["--target", &pid.to_string(), "--uts", "hostname"]);
    let name = casemate_tests::run::run(&mut command, &[], SHORT)?
        .ok()?
        .out();
    ensure_eq!(name.trim(), "from-the-spec", "host name");
    Ok(pod.finish()?)
}
