//! nerdctl, a real one, with containerds of several generations: networks are made by its
//! OCI hooks, streams and logs by its own programs. `make nerdctl-test` builds it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use casemate_tests::daemon::{Daemon, NODE_CONFIG};
use casemate_tests::generation::{self, Generation, Netns};
use casemate_tests::image::catalog;
use casemate_tests::image::catalog::BASE;
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{self, Outcome, Stop, fail, skip};
use casemate_tests::world::{NAMESPACE, probe, set_mode};
use casemate_tests::{World, ensure, ensure_eq, procs};
use libtest_mimic::Trial;

use crate::limits::cgroup;

const LIMIT: Duration = Duration::from_secs(30);
/// For a page of a web server.
const ASK: &str = "GET / HTTP/1.0\r\n\r\n";

type Test = fn(&Nerdctl) -> Outcome;

/// Each trial has a daemon of its own, with a network in place of the node's.
const TESTS: [(&str, Test); 6] = [
    ("runs_and_tells_the_exit_code", runs),
    ("limits_users_and_mounts", limits),
    ("life_of_a_service", life),
    ("terminal", terminal),
    ("networks_and_ports", networks),
    ("refusals_say_the_way_out", refusals),
];

pub fn trials() -> Vec<Trial> {
    let generations = [Generation::V1_7, Generation::V2_1, Generation::V2_3];
    let mut all = Vec::new();
    for generation in generations {
        for (name, test) in TESTS {
            let name = format!("nerdctl{}_{name}", generation.tag());
            all.push(skip::trial(&name, move || {
                let nerdctl = Nerdctl::new(generation)?;
                let outcome = test(&nerdctl);
                nerdctl.end();
                outcome
            }));
        }
    }
    all
}

/// nerdctl, its containerd, and all that it writes.
struct Nerdctl {
    dir: PathBuf,
    daemon: Daemon,
    netns: Netns,
    path: String,
}

impl Nerdctl {
    /// With leave for its hooks.
    fn new(generation: Generation) -> Result<Self, Stop> {
        let programs = generation::daemons().join("nerdctl/bin");
        if !programs.join("nerdctl").exists() || !programs.join("iptables").exists() {
            return skip("no nerdctl here: make nerdctl-test builds it from its Go module");
        }
        if generation.binaries().is_none() {
            return skip(generation.missing());
        }
        let world = World::get()?;
        let mark = world.id("nd").replace(world.mark(), "");
        let dir = world.dir().join(mark.trim_start_matches('-'));
        fs::create_dir_all(dir.join("bin"))?;
        // A hook's program must be out of others' reach.
        fs::copy(programs.join("nerdctl"), dir.join("bin/nerdctl"))?;
        set_mode(&dir.join("bin/nerdctl"), 0o755)?;
        let netns = Netns::make(&format!("{}{mark}", world.mark()))?;
        let daemon = generation.start(&dir, &world.path(), &world.shim()?, &netns)?;
        let leave = format!(
            "[hooks]\nallow = [\"{}\"]\n",
            dir.join("bin/nerdctl").display()
        );
        let drop_ins = dir.join(NODE_CONFIG).with_file_name("config.d");
        fs::write(drop_ins.join("nerdctl.toml"), leave)?;
        let ctr = daemon.ctr(NAMESPACE);
        ctr.import(&catalog::base(Some(&probe()?))?, world.dir())?;
        Ok(Self {
            path: format!("{}:{}", programs.display(), world.path()),
            dir,
            daemon,
            netns,
        })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns.path().display()))
            .arg(self.dir.join("bin/nerdctl"))
            .arg("--address")
            .arg(self.daemon.address())
            .args(["--namespace", NAMESPACE, "--cgroup-manager", "cgroupfs"])
            .arg("--data-root")
            .arg(self.dir.join("nerdctl"))
            .arg("--cni-path")
            .arg(generation::daemons().join("cni/bin"))
            .arg("--cni-netconfpath")
            .arg(self.dir.join("networks"))
            .args(args)
            .env("PATH", &self.path);
        command
    }

    fn say(&self, args: &[&str]) -> Result<Output, Stop> {
        Ok(run(&mut self.command(args), b"", LIMIT)?)
    }

    /// What it says, which must work.
    fn must(&self, args: &[&str]) -> Result<String, Stop> {
        Ok(self.say(args)?.ok()?.out().trim().to_owned())
    }

    /// `nerdctl run --rm`, in a sandbox.
    fn run(&self, flags: &[&str], args: &[&str], stdin: &[u8]) -> Result<Output, Stop> {
        let runtime = World::get()?.runtime();
        let all = [&["run", "--rm", "--runtime", runtime], flags, &[BASE], args].concat();
        Ok(run(&mut self.command(&all), stdin, LIMIT)?)
    }

    /// A shell's output, which must work.
    fn shell(&self, flags: &[&str], script: &str) -> Result<String, Stop> {
        let output = self.run(flags, &["/bin/sh", "-c", script], b"")?;
        Ok(output.ok()?.out().trim().to_owned())
    }

    /// A container that goes on.
    fn begin(&self, name: &str, flags: &[&str], script: &str) -> Outcome {
        let runtime = World::get()?.runtime();
        let head = ["run", "-d", "--name", name, "--runtime", runtime];
        let tail = [BASE, "/bin/sh", "-c", script];
        self.must(&[&head[..], flags, &tail].concat()).map(drop)
    }

    fn inspect(&self, name: &str, what: &str) -> Result<String, Stop> {
        self.must(&["inspect", "--format", what, name])
    }

    fn pid(&self, name: &str) -> Result<u32, Stop> {
        let text = self.inspect(name, "{{.State.Pid}}")?;
        text.parse()
            .map_err(|_| Stop::Fail(format!("{name}: no pid: {text}")))
    }

    /// Everything of it is gone, also what its hooks left running.
    fn end(&self) {
        let all = self.must(&["ps", "-aq"]).unwrap_or_default();
        for id in all.lines() {
            let _ = self.say(&["rm", "-f", id]);
        }
        self.daemon.stop();
    }
}

fn runs(nerdctl: &Nerdctl) -> Outcome {
    let output = nerdctl.run(
        &[],
        &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"],
        b"",
    )?;
    ensure_eq!(output.code(), 7, "exit code: {}", output.err());
    ensure_eq!(output.out(), "out\n", "standard output");
    ensure!(output.err().contains("err\n"), "{}", output.err());
    let output = nerdctl.run(&["-i"], &["/bin/cat"], b"through\n")?;
    ensure_eq!(output.ok()?.out(), "through\n", "standard input");
    let flags = ["-e", "GIVEN=yes", "-w", "/tmp", "--hostname", "named"];
    let said = nerdctl.shell(&flags, "echo $GIVEN $PWD $(hostname) $(cat /etc/hostname)")?;
    ensure_eq!(said, "yes /tmp named named", "environment, directory, name");
    // It is a sandbox, and no other runtime.
    let said = nerdctl.shell(
        &[],
        "cat /proc/self/uid_map; grep Seccomp: /proc/self/status",
    )?;
    let outside = said.split_whitespace().nth(1).unwrap_or_default();
    ensure!(outside != "0" && said.contains('2'), "{said}");
    let output = nerdctl.run(&[], &["/no/such/program"], b"")?;
    ensure!(
        output.code() != 0 && output.err().contains("/no/such/program"),
        "{}",
        output.err()
    );
    Ok(())
}

fn limits(nerdctl: &Nerdctl) -> Outcome {
    let flags = ["--memory", "64m", "--cpus", "0.5", "--pids-limit", "40"];
    nerdctl.begin("limited", &flags, "exec sleep 600")?;
    let pid = nerdctl.pid("limited")?;
    for (controller, file, old, want) in [
        ("memory", "memory.max", "memory.limit_in_bytes", "67108864"),
        ("cpu", "cpu.max", "cpu.cfs_quota_us", "50000"),
        ("pids", "pids.max", "pids.max", "40"),
    ] {
        let dir = cgroup(pid, controller)?;
        let file = [file, old].into_iter().find(|file| dir.join(file).exists());
        let text = fs::read_to_string(dir.join(file.unwrap_or_default()))?;
        ensure!(text.starts_with(want), "{controller}: {text}");
    }
    nerdctl.must(&["update", "--memory", "96m", "limited"])?;
    nerdctl.must(&["rm", "-f", "limited"])?;

    let said = nerdctl.shell(
        &["--user", "1000:2000"],
        "id -u; id -g; touch /no || echo no",
    )?;
    ensure_eq!(said, "1000\n2000\nno", "the user");
    let flags = ["--read-only", "--tmpfs", "/scratch"];
    let said = nerdctl.shell(&flags, "touch /x || echo no; touch /scratch/x && echo yes")?;
    ensure_eq!(said, "no\nyes", "a read-only root");

    let shared = nerdctl.dir.join("shared");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("from-the-node"), "hello\n")?;
    set_mode(&shared, 0o777)?;
    let bind = format!("{}:/shared", shared.display());
    let script = "cat /shared/from-the-node; echo back >/shared/from-inside";
    ensure_eq!(nerdctl.shell(&["-v", &bind], script)?, "hello", "a bind");
    let back = fs::read_to_string(shared.join("from-inside"))?;
    ensure_eq!(back, "back\n", "what was written inside");
    let bind = format!("{bind}:ro");
    let said = nerdctl.shell(&["-v", &bind], "touch /shared/no || echo no")?;
    ensure_eq!(said, "no", "a read-only bind");
    nerdctl.shell(&["-v", "kept:/data"], "echo kept >/data/file")?;
    let said = nerdctl.shell(&["-v", "kept:/data"], "cat /data/file")?;
    ensure_eq!(said, "kept", "a volume");
    nerdctl.must(&["volume", "rm", "kept"])?;
    Ok(())
}

fn life(nerdctl: &Nerdctl) -> Outcome {
    let script = "echo begun; trap 'echo told; exit 3' TERM; while :; do sleep 0.1; done";
    nerdctl.begin("web", &[], script)?;
    until("the log to have it", LIMIT, || {
        nerdctl
            .must(&["logs", "web"])
            .is_ok_and(|log| log == "begun")
    })?;
    ensure_eq!(
        nerdctl.must(&["exec", "web", "/bin/sh", "-c", "echo in; id -u"])?,
        "in\n0",
        "exec"
    );
    let code = nerdctl
        .say(&["exec", "web", "/bin/sh", "-c", "exit 5"])?
        .code();
    // Whatever it was: nerdctl tells the number in words alone.
    ensure_eq!(code, 1, "exit code of an exec that failed");
    let said = nerdctl.must(&[
        "exec",
        "-e",
        "A=b",
        "-u",
        "1000",
        "web",
        "/bin/sh",
        "-c",
        "echo $A; id -u",
    ])?;
    ensure_eq!(said, "b\n1000", "an exec as somebody else");
    ensure!(nerdctl.must(&["top", "web"])?.contains("while"), "top");
    let stats = nerdctl.must(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.PIDs}} {{.MemUsage}}",
        "web",
    ])?;
    ensure!(
        stats.starts_with("web ") && !stats.contains(" 0B /"),
        "stats: {stats}"
    );
    let is = |wanted: &str| -> Outcome {
        let status = nerdctl.inspect("web", "{{.State.Status}}")?;
        ensure_eq!(status, wanted, "status");
        Ok(())
    };
    is("running")?;
    nerdctl.must(&["pause", "web"])?;
    is("paused")?;
    nerdctl.must(&["unpause", "web"])?;
    nerdctl.must(&["stop", "web"])?;
    ensure_eq!(
        nerdctl.inspect("web", "{{.State.ExitCode}}")?,
        "3",
        "exit code"
    );
    // Its logger may stop at the exit before it has read the last line, which is in a pipe
    // that is its own.
    let log = nerdctl.must(&["logs", "web"])?;
    ensure!(
        ["begun\ntold", "begun"].contains(&log.as_str()),
        "log: {log}"
    );
    // Once more, with the same address and name.
    nerdctl.must(&["start", "web"])?;
    is("running")?;
    let pid = nerdctl.pid("web")?;
    nerdctl.must(&["kill", "web"])?;
    ensure_eq!(nerdctl.must(&["wait", "web"])?, "137", "wait after a kill");
    nerdctl.must(&["rm", "web"])?;
    ensure!(procs::identity(pid).is_none(), "process {pid} is left");
    ensure!(
        nerdctl.must(&["ps", "-aq"])?.is_empty(),
        "it is still there"
    );
    Ok(())
}

fn terminal(nerdctl: &Nerdctl) -> Outcome {
    let runtime = World::get()?.runtime();
    let script = "test -t 0 && test -t 1 && echo terminal; read line; echo got $line";
    let inner = nerdctl.command(&[
        "run",
        "--rm",
        "-it",
        "--runtime",
        runtime,
        BASE,
        "/bin/sh",
        "-c",
        script,
    ]);
    // script(1) gives it a terminal.
    let mut line = String::new();
    for word in std::iter::once(inner.get_program()).chain(inner.get_args()) {
        line += &format!("'{}' ", word.to_string_lossy().replace('\'', "'\\''"));
    }
    let mut command = Command::new("script");
    command
        .args(["-qec", &line, "/dev/null"])
        .env("PATH", &nerdctl.path);
    let output = run(&mut command, b"typed\n", LIMIT)?.ok()?.out();
    for part in ["terminal", "got typed"] {
        ensure!(output.contains(part), "no {part:?} in {output:?}");
    }
    Ok(())
}

fn networks(nerdctl: &Nerdctl) -> Outcome {
    let said = nerdctl.shell(&["--network", "none"], "ls /sys/class/net")?;
    ensure_eq!(said, "lo", "interfaces without a network");
    let serve = "mkdir /tmp/www; echo served >/tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www";
    nerdctl.begin("web", &["-p", "18080:80"], serve)?;
    let address = nerdctl.inspect("web", "{{.NetworkSettings.IPAddress}}")?;
    ensure!(address.starts_with("10.4.0."), "address: {address}");
    // By nc, as a static wget needs parts of the C library that aren't there.
    let get = |address: &str, port: &str| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", nerdctl.netns.path().display()));
        let nc = ["nc", "-w", "5", address, port];
        command.arg(catalog::busybox()?).args(nc);
        run(&mut command, ASK.as_bytes(), Duration::from_secs(10))
    };
    for (address, port) in [(address.as_str(), "80"), ("127.0.0.1", "18080")] {
        until(&format!("{address}:{port}"), LIMIT, || {
            get(address, port).is_ok_and(|said| said.out().ends_with("served\n"))
        })
        .map_err(|e| Stop::Fail(format!("{e}: {:?}", get(address, port).map(|s| s.err()))))?;
    }
    ensure!(nerdctl.must(&["port", "web"])?.contains("18080"), "port");
    // So do its neighbours, which have its name in their hosts.
    let script = format!("grep -w web /etc/hosts; printf '{ASK}' | nc -w 5 {address} 80");
    let said = nerdctl.shell(&[], &script)?;
    ensure!(
        said.starts_with(&address) && said.ends_with("served"),
        "a neighbour: {said}"
    );
    nerdctl.must(&["rm", "-f", "web"])?;
    nerdctl.begin("web", &["-p", "18080:80"], serve)?;
    nerdctl.must(&["rm", "-f", "web"])?;
    Ok(())
}

/// Each is refused with one line that says what, and what to do.
fn refusals(nerdctl: &Nerdctl) -> Outcome {
    for (flags, parts) in [
        (
            &["--privileged"][..],
            &["privileged containers are refused"][..],
        ),
        (
            &["--cap-add", "NET_ADMIN"],
            &["NET_ADMIN", "these capabilities are refused"],
        ),
        (
            &["--cap-add", "SYS_ADMIN"],
            &["SYS_ADMIN", "these capabilities are refused"],
        ),
        (&["--network", "host"], &["the host's network is refused"]),
        (&["--pid", "host"], &["the host's processes are refused"]),
        (&["--ipc", "host"], &["the host's shared memory is refused"]),
        (
            &["--device", "/dev/kmsg"],
            &["this device is refused", "/dev/kmsg"],
        ),
        (&["-v", "/etc:/x"], &["/etc", "refused as a volume"]),
        (&["--sysctl", "kernel.msgmax=9000"], &["kernel.msgmax"]),
    ] {
        let output = nerdctl.run(flags, &["/bin/true"], b"")?;
        let said = output.err();
        ensure!(output.code() != 0, "{flags:?}: it ran");
        for part in parts {
            ensure!(said.contains(part), "{flags:?}: no {part:?} in {said}");
        }
    }
    // What takes nothing away from the sandbox.
    for flags in [
        &["--cap-drop", "ALL"][..],
        &["--security-opt", "seccomp=unconfined"],
        &["--security-opt", "no-new-privileges"],
        &["--init=false", "--shm-size", "8m"],
        &["--ulimit", "nofile=100:100"],
        &["--sysctl", "net.ipv4.ip_unprivileged_port_start=80"],
    ] {
        let output = nerdctl.run(flags, &["/bin/true"], b"")?;
        ensure_eq!(output.code(), 0, "{flags:?}: {}", output.err());
    }
    // Without leave for its hooks nothing runs, and the message says which leave.
    let drop_ins = nerdctl.dir.join(NODE_CONFIG).with_file_name("config.d");
    fs::remove_file(drop_ins.join("nerdctl.toml"))?;
    let output = nerdctl.run(&["--network", "none"], &["/bin/true"], b"")?;
    if output.code() == 0 {
        return fail("nerdctl's hooks ran without leave");
    }
    for part in ["hooks", "nerdctl", "allow"] {
        ensure!(
            output.err().contains(part),
            "no {part:?} in {}",
            output.err()
        );
    }
    Ok(())
}
