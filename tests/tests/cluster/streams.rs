//! `kubectl` exec, attach, cp, logs, port-forward and debug.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use casemate_tests::run::run;
use casemate_tests::skip::{Outcome, Stop};
use casemate_tests::{ensure, ensure_eq};

use crate::installer::installed;
use crate::kube::{BUSYBOX, Class, Cluster, status, steady};
use crate::node::LIMIT;

crate::cluster_trials![
    exec_and_attach,
    copies,
    forwarded_ports,
    logs_follow,
    debug_containers
];

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  CLASS
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, 'echo hello >/tmp/index.html; httpd -p 8080 -h /tmp; exec sleep infinity']}
  - {name: echo, image: IMAGE, stdin: true, command: [sh, -c, 'while read -r line; do echo \"got $line\"; done']}
";

fn with_pod(name: &str, check: impl Fn(&Cluster, Class) -> Outcome) -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    for class in Class::BOTH {
        cluster.apply(class, &POD.replace("NAME", name))?;
        cluster.ready(class, name)?;
        check(&cluster, class).map_err(|stop| match stop {
            Stop::Fail(why) => Stop::Fail(format!("{class:?}: {why}")),
            skip @ Stop::Skip(_) => skip,
        })?;
        cluster.delete(class, name)?;
    }
    Ok(())
}

fn exec_and_attach() -> Outcome {
    with_pod("exec", |cluster, class| {
        let ns = class.namespace();
        let said = cluster.exec(class, "exec", "echo out; echo err >&2; exit 9")?;
        ensure_eq!(said.out(), "out\n", "output");
        ensure!(said.err().contains("err\n") && said.code() == 9, "{said:?}");
        let args = ["-n", ns, "exec", "-i", "exec", "--", "wc", "-c"];
        let said = cluster.must(&args, &"x".repeat(1_000_000))?;
        ensure_eq!(said.trim(), "1000000", "a million bytes of input");
        let said = cluster.exec_ok(class, "exec", "head -c 3000000 /dev/zero | tr '\\0' y")?;
        ensure_eq!(said.len(), 3_000_000, "bytes of output");
        // A terminal, with the size of ours.
        let inner = cluster.command(&[
            "-n",
            ns,
            "exec",
            "-it",
            "exec",
            "--",
            "sh",
            "-c",
            "tty; until stty size 2>/dev/null | grep 31; do sleep 0.1; done; exit 6",
        ]);
        let mut line = vec!["stty rows 31 cols 97 &&".to_owned()];
        line.push(inner.get_program().display().to_string());
        line.extend(inner.get_args().map(|arg| format!("'{}'", arg.display())));
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &line.join(" "), "/dev/null"]);
        let said = run(&mut terminal, &[], LIMIT)?;
        ensure!(
            said.out().contains("/dev/pts/0") && said.out().contains("31 97") && said.code() == 6,
            "terminal: {said:?}"
        );
        let args = ["-n", ns, "attach", "-i", "exec", "-c", "echo"];
        let mut attach = cluster.command(&args);
        attach
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut attach = attach.spawn()?;
        let mut answers = Vec::new();
        if let (Some(mut input), Some(output)) = (attach.stdin.take(), attach.stdout.take()) {
            use std::io::Write;
            let mut output = BufReader::new(output);
            for line in ["one", "two"] {
                writeln!(input, "{line}")?;
                let mut answer = String::new();
                output.read_line(&mut answer)?;
                answers.push(answer.trim().to_owned());
            }
        }
        let _ = attach.kill();
        let _ = attach.wait();
        ensure_eq!(answers, ["got one", "got two"], "attach");
        Ok(())
    })
}

fn copies() -> Outcome {
    with_pod("copy", |cluster, class| {
        let dir = tempfile::tempdir()?;
        let from = dir.path().join("from");
        std::fs::create_dir(&from)?;
        std::fs::write(from.join("a"), "a".repeat(500_000))?;
        std::fs::write(from.join("b"), "b")?;
        let ns = class.namespace();
        let (from, to) = (from.display().to_string(), dir.path().join("to"));
        let shown = to.display().to_string();
        cluster.must(&["-n", ns, "cp", "-c", "c", &from, "copy:/tmp/there"], "")?;
        cluster.must(&["-n", ns, "cp", "-c", "c", "copy:/tmp/there", &shown], "")?;
        ensure_eq!(std::fs::read_to_string(to.join("a"))?.len(), 500_000, "a");
        ensure_eq!(std::fs::read_to_string(to.join("b"))?, "b", "b");
        Ok(())
    })
}

fn forwarded_ports() -> Outcome {
    with_pod("forward", |cluster, class| {
        let args = [
            "-n",
            class.namespace(),
            "port-forward",
            "pod/forward",
            ":8080",
        ];
        let mut forward = cluster.command(&args);
        let mut forward = forward
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        // Kept, as it says more later.
        let mut output = forward.stdout.take().map(BufReader::new);
        if let Some(output) = &mut output {
            output.read_line(&mut line)?;
        }
        // "Forwarding from 127.0.0.1:PORT -> 8080"
        let address = line.split_whitespace().nth(2).unwrap_or_default();
        let url = format!("http://{address}/index.html");
        let mut pages = Vec::new();
        for _ in 0..3 {
            pages.push(cluster.node.curl(&[&url])?.out());
        }
        let _ = forward.kill();
        let _ = forward.wait();
        ensure_eq!(
            pages,
            ["hello\n", "hello\n", "hello\n"],
            "pages at {line:?}"
        );
        Ok(())
    })
}

fn logs_follow() -> Outcome {
    let cluster = installed()?;
    let _steady = steady();
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: talks}
spec:
  CLASS
  restartPolicy: Never
  containers:
  - {name: c, image: IMAGE, command: [sh, -c, 'for n in 1 2 3 4 5; do echo line $n; echo error $n >&2; sleep 0.3; done; printf unfinished']}
";
    for class in Class::BOTH {
        cluster.apply(class, pod)?;
        cluster.pod(class, "talks", "begun", |pod| {
            status(pod, "c")["started"] == true
                || status(pod, "c")["state"]["terminated"].is_object()
        })?;
        // Ends by itself when the container does.
        let said = cluster.must(&["-n", class.namespace(), "logs", "-f", "talks"], "")?;
        for n in 1..=5 {
            ensure!(
                said.contains(&format!("line {n}\n")) && said.contains(&format!("error {n}\n")),
                "{class:?}: {said}"
            );
        }
        ensure!(said.ends_with("unfinished"), "{class:?}: {said:?}");
        cluster.ended(class, "talks")?;
        cluster.delete(class, "talks")?;
    }
    Ok(())
}

/// With the profile that kubectl has by itself, which asks for SYS_PTRACE.
fn debug_containers() -> Outcome {
    with_pod("debug", |cluster, class| {
        let ns = class.namespace();
        let image = format!("--image={BUSYBOX}");
        for (name, more, script) in [
            ("plain", None, "wget -qO- http://127.0.0.1:8080/; ps"),
            (
                "target",
                Some("--target=c"),
                "wget -qO- http://127.0.0.1:8080/; ps",
            ),
        ] {
            let mut args = vec!["-n", ns, "debug", "debug", &image, "-c", name];
            args.extend(more);
            args.extend(["--", "sh", "-c", script]);
            cluster.must(&args, "")?;
            let pod = cluster.pod(class, "debug", "debugged", |pod| {
                status(pod, name)["state"]["terminated"].is_object()
                    || status(pod, name)["state"]["waiting"]["reason"] == "RunContainerError"
            })?;
            let end = &status(&pod, name)["state"];
            ensure_eq!(end["terminated"]["exitCode"], 0, "{name}: {end}");
            let said = cluster.logs(class, "debug", name)?;
            ensure!(said.contains("hello"), "{name}: {said}");
            ensure_eq!(
                said.contains("httpd"),
                name == "target",
                "{name}: processes of c: {said}"
            );
        }
        cluster.ready(class, "debug").map(drop)
    })
}
