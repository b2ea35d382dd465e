//! `casemate doctor` on this node, and on the same node in bad states that are
//! really made: in namespaces, directories and files of each trial's own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::bundle::Task;
use casemate_tests::operator::{casemate, command};
use casemate_tests::run::{Output, run};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::world::binaries;
use casemate_tests::{World, ensure, ensure_eq};
use serde_json::Value;

use crate::common::{configure, ready};

crate::trials![
    doctor_of_a_node_that_is_well,
    doctor_of_containerd,
    doctor_of_programs,
    doctor_of_the_configuration,
    doctor_of_places,
    doctor_of_ids,
    doctor_of_the_kernel,
    doctor_says_it_to_people,
];

/// What a node is made of.
struct Node {
    dir: PathBuf,
}

impl Node {
    fn new(name: &str) -> Result<Self, Stop> {
        ready()?;
        let world = World::get()?;
        let dir = world.dir().join("s").join(world.id(name));
        fs::create_dir_all(dir.join("containerd"))?;
        let node = Self { dir };
        let shim = binaries().join("containerd-shim-casemate-v2");
        node.containerd(&shim, "")?;
        node.config("")?;
        Ok(node)
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// containerd's configuration, with the handler and `more` of it.
    fn containerd(&self, shim: &Path, more: &str) -> Outcome {
        let cri = "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.casemate";
        let text = format!(
            "version = 2\nroot = {:?}\n[{cri}]\nruntime_type = \"io.containerd.casemate.v2\"\n\
             runtime_path = {:?}\npod_annotations = [\"casemate.io/*\"]\n{more}",
            self.path("containerd"),
            shim.display().to_string()
        );
        Ok(fs::write(self.dir.join("containerd.toml"), text)?)
    }

    /// casemate's own.
    fn config(&self, text: &str) -> Outcome {
        Ok(fs::write(self.dir.join("config.toml"), text)?)
    }

    /// `casemate doctor` with these arguments, after a script in new namespaces.
    fn within(&self, flags: &[&str], script: &str, args: &[&str]) -> Result<Output, Stop> {
        let mut command = Command::new("unshare");
        command
            .args(flags)
            .args(["--", "sh", "-ec", &format!("{script}\nexec \"$0\" \"$@\"")])
            .arg(binaries().join("casemate"))
            .args(self.args(args))
            .env("D", &self.dir);
        self.finish(command)
    }

    fn args(&self, args: &[&str]) -> Vec<String> {
        let own = ["doctor", "--containerd-config"].map(str::to_owned);
        let mut all = Vec::from(own);
        all.push(self.path("containerd.toml"));
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        all
    }

    fn run(&self, args: &[&str]) -> Result<Output, Stop> {
        let all = self.args(args);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        self.finish(command(&all)?)
    }

    fn finish(&self, mut command: Command) -> Result<Output, Stop> {
        command.env("CASEMATE_CONFIG", self.path("config.toml"));
        Ok(run(&mut command, &[], SHORT)?)
    }

    fn json(&self) -> Result<Found, Stop> {
        Found::of(&self.run(&["--json"])?)
    }

    fn json_within(&self, flags: &[&str], script: &str) -> Result<Found, Stop> {
        Found::of(&self.within(flags, script, &["--json"])?)
    }
}

/// What doctor says.
struct Found {
    code: i32,
    all: Value,
}

impl Found {
    fn of(output: &Output) -> Result<Self, Stop> {
        let all = serde_json::from_str(&output.out())
            .map_err(|e| Stop::Fail(format!("{e}: {} {}", output.out(), output.err())))?;
        Ok(Self {
            code: output.code(),
            all,
        })
    }

    fn check(&self, id: &str) -> Result<&Value, Stop> {
        let checks = self.all["checks"].as_array();
        let found = checks.and_then(|all| all.iter().find(|check| check["id"] == id));
        found.ok_or_else(|| Stop::Fail(format!("no check {id}: {}", self.all)))
    }

    /// The check fails, with this in what was found and that in what mends it.
    fn fails(&self, id: &str, found: &str, mend: &str) -> Outcome {
        let check = self.check(id)?;
        let has = |key: &str, part: &str| check[key].as_str().is_some_and(|t| t.contains(part));
        ensure!(
            check["result"] == "failed" && has("found", found) && has("mend", mend),
            "{check}, want {found:?} and {mend:?}"
        );
        let required = check["level"] == "required";
        ensure_eq!(
            self.code == 1,
            required || self.others_fail(id),
            "exit code {}",
            self.code
        );
        ensure_eq!(self.all["ok"], Value::Bool(self.code == 0), "ok");
        Ok(())
    }

    fn others_fail(&self, id: &str) -> bool {
        let failed = self.failed("required");
        failed.iter().any(|other| other != id)
    }

    fn failed(&self, level: &str) -> Vec<String> {
        let checks = self.all["checks"].as_array().into_iter().flatten();
        checks
            .filter(|check| check["level"] == level && check["result"] == "failed")
            .filter_map(|check| check["id"].as_str().map(str::to_owned))
            .collect()
    }
}

fn doctor_of_a_node_that_is_well() -> Outcome {
    let node = Node::new("well")?;
    let found = node.json()?;
    ensure!(
        found.code == 0 && found.failed("required").is_empty(),
        "exit {}: {}",
        found.code,
        found.all
    );
    let checks = found.all["checks"].as_array().map_or(0, Vec::len);
    ensure!(checks >= 25, "{checks} checks");
    for id in ["namespaces", "idmapped-images", "nftables", "programs"] {
        ensure_eq!(found.check(id)?["result"], "ok", "{id}");
    }
    // Nobody listens at an address of the trial's own; that alone is no reason
    // to say that pods can't run.
    let away = node.path("nobody.sock");
    let found = Found::of(&node.run(&["--json", "--address", &away])?)?;
    found.fails("containerd-running", "nobody.sock", "start containerd")?;
    ensure_eq!(found.code, 0, "exit code");
    let strict = node.run(&["--strict", "--address", &away])?;
    ensure_eq!(strict.code(), 2, "exit code with --strict");
    Ok(())
}

fn doctor_of_containerd() -> Outcome {
    let node = Node::new("containerd")?;
    let shim = binaries().join("containerd-shim-casemate-v2");
    let found = Found::of(&node.run(&["--json", "--handler", "other"])?)?;
    found.fails("containerd-handler", "no handler other", "casemate install")?;

    let cri = "plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.casemate";
    node.containerd(&shim, &format!("[{cri}.options]\nSystemdCgroup = true\n"))?;
    node.json()?
        .fails("containerd-handler", "options table", "containerd.toml")?;

    let text = fs::read_to_string(node.path("containerd.toml"))?;
    fs::write(
        node.path("containerd.toml"),
        text.replace("casemate.io/*", "elsewhere.io/*"),
    )?;
    node.json()?
        .fails("pod-annotations", "elsewhere.io", "pod_annotations")?;

    fs::write(
        node.path("containerd.toml"),
        text.replace("io.containerd.casemate.v2", "io.containerd.runc.v2")
            .replace("containerd-shim-casemate-v2", "containerd-shim-runc-v2"),
    )?;
    node.json()?
        .fails("containerd-handler", "somebody else's", "--handler")?;

    fs::write(node.path("containerd.toml"), "version = 2\nroot = [\n")?;
    node.json()?
        .fails("containerd-handler", "can't read it", "containerd.toml")?;

    let none = node.path("no-such-program");
    let found = Found::of(&node.run(&["--json", "--containerd", &none])?)?;
    found.fails("containerd", "no-such-program", "--containerd")?;
    let old = node.dir.join("old");
    fs::write(&old, "#!/bin/sh\necho containerd x v1.5.9 y\n")?;
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755))?;
    let old = old.display().to_string();
    let found = Found::of(&node.run(&["--json", "--containerd", &old])?)?;
    found.fails("containerd", "too old", "")?;
    Ok(())
}

fn doctor_of_programs() -> Outcome {
    let node = Node::new("programs")?;
    let shim = binaries().join("containerd-shim-casemate-v2");
    let lone = node.dir.join("containerd-shim-casemate-v2");
    fs::copy(&shim, &lone)?;
    node.containerd(&lone, "")?;
    node.json()?
        .fails("programs", "casemate-agent", "casemate install")?;

    let agent = node.dir.join("casemate-agent");
    fs::write(&agent, "#!/bin/sh\necho casemate-agent 99.0.1\n")?;
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
    node.json()?.fails("programs", "99.0.1", "of one release")?;

    // As installed: a link in front, and both behind it.
    fs::remove_file(&lone)?;
    symlink(&shim, &lone)?;
    let found = node.json()?;
    ensure_eq!(found.check("programs")?["result"], "ok", "programs");

    node.containerd(&node.dir.join("nothing-there"), "")?;
    node.json()?
        .fails("programs", "no containerd-shim", "install")?;
    Ok(())
}

fn doctor_of_the_configuration() -> Outcome {
    let node = Node::new("config")?;
    node.config("proflie = \"strict\"\n")?;
    node.json()?
        .fails("config", "config.toml:1: proflie", "doctor --config")?;

    node.config(
        "profile = \"compat\"\n[log]\nlevel = \"debug\"\n[sandbox]\nallow_host_network = true\n",
    )?;
    let found = node.json()?;
    found.fails("loosened", "profile = \"compat\"", "config.toml")?;
    found.fails("loosened", "sandbox.allow_host_network", "config.toml")?;
    found.fails("debugging", "log.level", "config.toml")?;
    ensure_eq!(found.code, 0, "exit code");
    Ok(())
}

fn doctor_of_places() -> Outcome {
    let node = Node::new("places")?;
    let apart = ["--mount", "--propagation", "private"];
    let open = "mkdir -p /run/casemate && mount -t tmpfs -o mode=777 none /run/casemate";
    node.json_within(&apart, open)?
        .fails("run-directory", "mode", "go-w")?;
    let shut = "mkdir -p /run/casemate && mount -t tmpfs -o mode=700,ro none /run/casemate";
    node.json_within(&apart, shut)?
        .fails("run-directory", "Read-only", "remount,rw")?;

    // A file system that has no mapped ids.
    let overlay = "mount -t tmpfs none $D/containerd && cd $D/containerd && mkdir l u w m \
                   && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w o m && cd / \
                   && mount --bind $D/containerd/m $D/containerd";
    node.json_within(&apart, overlay)?
        .fails("idmapped-images", "containerd", "ext4")?;

    let none = "umount -R -l /sys/fs/cgroup";
    node.json_within(&apart, none)?
        .fails("cgroups", "", "mount -t cgroup2")?;
    Ok(())
}

fn doctor_of_ids() -> Outcome {
    let node = Node::new("ids")?;
    let apart = ["--mount", "--propagation", "private"];
    for (file, line) in [
        ("/etc/subuid", "eve:1879048000:65536"),
        ("/etc/passwd", "eve:x:1900000000:5::/:/bin/sh"),
    ] {
        fs::write(node.path("extra"), format!("{line}\n"))?;
        // What isn't there can't be covered.
        if !Path::new(file).exists() {
            continue;
        }
        let script = format!("mount --bind $D/extra {file}");
        node.json_within(&apart, &script)?
            .fails("ids", "eve", "ids.base")?;
    }
    // One range, and a pod that has it.
    let own = "[ids]\nbase = 1700000000\ncount = 1\n";
    node.config(own)?;
    let free = node.json()?;
    ensure_eq!(free.check("ids-free")?["result"], "ok", "ids-free");
    let mut task = Task::new("ids", &["/bin/probe", "sleep"])?;
    configure(&mut task, own)?;
    task.boot()?;
    task.create()?;
    let found = node.json()?;
    found.fails("ids-free", "0 of 1 ranges", "ids.count")?;
    ensure_eq!(found.code, 0, "exit code");
    Ok(task.finish()?)
}

fn doctor_of_the_kernel() -> Outcome {
    let node = Node::new("kernel")?;
    let inside = ["--user", "--map-root-user", "--mount"];
    let none = "echo 0 >/proc/sys/user/max_user_namespaces";
    node.json_within(&inside, none)?.fails(
        "namespaces",
        "a user namespace",
        "user.max_user_namespaces",
    )?;
    // A sandbox needs more than one of them.
    let few = "echo 1 >/proc/sys/user/max_user_namespaces";
    let found = node.json_within(&inside, few)?;
    found.fails(
        "namespace-limits",
        "user.max_user_namespaces = 1",
        "sysctl -w",
    )?;
    ensure_eq!(found.code, 1, "exit code");
    // One that may not make network namespaces can't have a guard.
    let alone = "echo 0 >/proc/sys/user/max_net_namespaces";
    node.json_within(&inside, alone)?
        .fails("nftables", "", "modprobe nf_tables")?;
    // As `kubectl debug node/…` has its shell, once it did `chroot /host`.
    let chroot =
        "mkdir \"$D/root\"; mount --rbind / \"$D/root\"; exec chroot \"$D/root\" \"$0\" \"$@\"";
    node.json_within(&["--mount"], chroot)?.fails(
        "namespaces",
        "a user namespace: Operation not permitted",
        "nsenter -t 1 -m -- casemate doctor",
    )?;
    Ok(())
}

fn doctor_says_it_to_people() -> Outcome {
    let node = Node::new("people")?;
    node.config("proflie = 1\n")?;
    let text = node.run(&[])?;
    ensure_eq!(text.code(), 1, "exit code");
    let text = text.out();
    for part in [
        "required\n",
        "optional\n",
        "advisory\n",
        "FAIL  config",
        "without: no pod starts",
        "mend:    casemate doctor --config",
        "this node can't run pods: 1 required",
    ] {
        ensure!(text.contains(part), "{part:?} is not in {text}");
    }
    ensure!(
        !text.contains('\x1b'),
        "colours without a terminal: {text:?}"
    );
    let wrong = casemate(&["doctor", "--strict", "--config"])?;
    if wrong.code() != 125 {
        return fail(format!("{}: {}", wrong.code(), wrong.err()));
    }
    Ok(())
}
