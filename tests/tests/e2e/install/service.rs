//! Nodes as distributions have them: containerd as a service of a real systemd, and
//! SELinux that enforces. In virtual machines alone: `make vm-test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use casemate_tests::ctr::Ctr;
use casemate_tests::generation::Generation;
use casemate_tests::run::{Output, run, until};
use casemate_tests::skip::{Outcome, Stop, skip};
use casemate_tests::{ensure, ensure_eq, world};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::node::{Node, Tree, same, walk};
use crate::{lsm, trials};

trials! {
    install_by_systemd_and_back,
    install_by_systemd_goes_back,
    install_by_systemd_despite_its_start_limit,
    install_by_systemd_with_a_unit_that_is_broken,
    install_where_selinux_enforces,
}

/// Set where the machine itself is for the trials to install on.
const WHOLE: &str = "CASEMATE_TEST_NODE";
const LIMIT: Duration = Duration::from_secs(300);
const DROP_IN: &str = "/etc/systemd/system/containerd.service.d/trial.conf";
const UNIT: &str = "/etc/systemd/system/containerd.service";
const CONFIG: &str = "/etc/containerd/config.toml";
const SOCKET: &str = "/run/containerd/containerd.sock";

/// Of containerd, before and after.
const PLAIN: &str = "# the node's own
version = 2
disabled_plugins = [\"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.zfs\"]
[plugins.\"io.containerd.grpc.v1.cri\"]
  stream_server_address = \"127.0.0.1\"
  disable_apparmor = true # by hand
";

/// This machine's own containerd, as a service. There is one, so one trial has it.
struct Service {
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Service {
    /// Started, with more lines for its unit.
    fn start(unit: &str, service: &str) -> Result<Self, Stop> {
        static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
        if std::env::var_os(WHOLE).is_none() || !Path::new("/run/systemd/system").is_dir() {
            return skip("it needs a machine of its own with systemd as process 1");
        }
        let turn = TURN.lock().unwrap_or_else(|broken| broken.into_inner());
        let node = Self { _turn: turn };
        fs::create_dir_all("/etc/containerd")?;
        fs::write(CONFIG, PLAIN)?;
        // As Debian's and upstream's, but for what else this machine lacks.
        let text = format!(
            "[Unit]\nDefaultDependencies=no\n{unit}\n[Service]\nType=notify\n\
             ExecStart=/usr/bin/containerd\nDelegate=yes\nKillMode=process\nRestart=always\n\
             RestartSec=1\nLimitNOFILE=65536\nTasksMax=infinity\n\
             Environment=PATH=/usr/local/bin:/usr/bin:/bin\n\
             StandardOutput=append:/var/log/containerd.log\nStandardError=inherit\n{service}\n"
        );
        fs::create_dir_all("/var/log")?;
        fs::write(UNIT, text)?;
        systemctl(&["daemon-reload"])?.ok()?;
        systemctl(&["start", "containerd"])?.ok()?;
        node.answers()?;
        Ok(node)
    }

    fn drop_in(&self, text: &str) -> Outcome {
        fs::create_dir_all(Path::new(DROP_IN).parent().unwrap_or(Path::new("/")))?;
        fs::write(DROP_IN, text)?;
        systemctl(&["daemon-reload"])?.ok()?;
        Ok(())
    }

    fn answers(&self) -> Outcome {
        let ctr = Ctr::new(Path::new(SOCKET), world::NAMESPACE);
        until("containerd to answer", Duration::from_secs(120), || {
            ctr.run(&["version"], Duration::from_secs(20))
                .is_ok_and(|o| o.code() == 0)
        })?;
        Ok(())
    }

    /// containerd's process.
    fn pid(&self) -> Result<String, Stop> {
        let output = systemctl(&["show", "--value", "-p", "MainPID", "containerd"])?;
        Ok(output.ok()?.out().trim().to_owned())
    }

    fn tree(&self) -> Tree {
        let mut tree = Tree::new();
        for path in ["/etc/containerd", "/opt", "/usr/local", "/var/lib/casemate"] {
            walk(&PathBuf::from(path), &mut tree);
        }
        tree
    }

    /// Nothing is named to it: this is a node as it is.
    fn casemate(&self, verb: &str) -> Result<Output, Stop> {
        let mut command = Command::new(world::binaries().join("casemate"));
        Ok(run(command.arg(verb), &[], LIMIT)?)
    }

    /// It must fail with one line that has all these in it.
    fn refuses(&self, parts: &[&str]) -> Outcome {
        let ran = self.casemate("install")?;
        let (code, said) = (ran.code(), ran.err());
        ensure!(
            code == 1 && said.lines().count() == 1,
            "status {code}: {said} {}",
            ran.out()
        );
        for part in parts {
            ensure!(said.contains(part), "no {part:?} in {said}");
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = systemctl(&["stop", "containerd"]);
        for path in [UNIT, DROP_IN, CONFIG] {
            let _ = fs::remove_file(path);
        }
        let _ = systemctl(&["daemon-reload"]);
        let _ = systemctl(&["reset-failed", "containerd"]);
    }
}

fn systemctl(args: &[&str]) -> Result<Output, Stop> {
    Ok(run(Command::new("systemctl").args(args), &[], LIMIT)?)
}

fn install_by_systemd_and_back() -> Outcome {
    let node = Service::start("", "")?;
    let (before, first) = (node.tree(), node.pid()?);
    let said = node.casemate("install")?.ok()?.out();
    for part in [
        "restart: containerd is back, and has loaded the handler",
        "proof: a container ran in its sandbox, and is held as promised",
        "proof: a container of class strict ran",
    ] {
        ensure!(said.contains(part), "no {part:?} in {said}");
    }
    let second = node.pid()?;
    ensure!(first != second, "containerd is still process {first}");
    let said = node.casemate("install")?.ok()?.out();
    ensure!(said.contains("restart: not needed"), "again: {said}");
    ensure_eq!(node.pid()?, second, "containerd after the second install");
    node.casemate("uninstall")?.ok()?;
    ensure!(second != node.pid()?, "uninstall restarted nothing");
    node.answers()?;
    ensure_eq!(fs::read_to_string(CONFIG)?, PLAIN, "the configuration");
    same("after uninstall", &before, &node.tree())
}

/// containerd's service doesn't start with what was written.
fn install_by_systemd_goes_back() -> Outcome {
    let node = Service::start("", "")?;
    let before = node.tree();
    node.drop_in("[Service]\nExecStartPre=/bin/sh -c '! grep -rq casemate /etc/containerd'\n")?;
    node.refuses(&[
        "systemctl restart containerd: Job for containerd.service failed",
        "journalctl -u containerd has the reason",
        "the node is as it was, and containerd runs",
    ])?;
    node.answers()?;
    same("after the way back", &before, &node.tree())?;
    // And with the hindrance away it works.
    node.drop_in("")?;
    node.casemate("install")?.ok()?;
    node.casemate("uninstall")?.ok()?;
    same("after uninstall", &before, &node.tree())
}

/// Where no more starts are allowed than those that failed.
fn install_by_systemd_despite_its_start_limit() -> Outcome {
    let limit = "StartLimitIntervalSec=3600\nStartLimitBurst=2";
    let node = Service::start(limit, "RestartSec=100ms")?;
    let before = node.tree();
    node.drop_in("[Service]\nExecStartPre=/bin/sh -c '! grep -rq casemate /etc/containerd'\n")?;
    node.refuses(&["the node is as it was, and containerd runs"])?;
    node.answers()?;
    same("after the way back", &before, &node.tree())?;
    // Nor does the limit count against the next one, and its way back.
    node.refuses(&["the node is as it was, and containerd runs"])?;
    node.answers()
}

/// What no way back can mend, since it was so before.
fn install_by_systemd_with_a_unit_that_is_broken() -> Outcome {
    let node = Service::start("", "")?;
    let before = node.tree();
    node.drop_in("[Service]\nExecStart=\nExecStart=/no/such/containerd\n")?;
    node.refuses(&[
        "systemctl restart containerd: Job for containerd.service failed",
        "journalctl -u containerd has the reason",
        "its configuration is as it was, and it doesn't run with that either",
    ])?;
    same("after the way back", &before, &node.tree())
}

/// With a policy that lets containerd execute all but what is in one directory: refused
/// there, with the way out, which works.
fn install_where_selinux_enforces() -> Outcome {
    if !lsm::selinux_is_ours() {
        return skip("it needs a machine of its own with SELinux");
    }
    lsm::enforce()?;
    let node = Node::new(Generation::V1_6)?;
    let script = fs::read_to_string(node.dir.join("restart"))?;
    let label = "node_u:node_r:daemon_t:s0";
    let labelled = script.replace(
        "  setsid ",
        &format!("  sh -c 'printf %s {label} >/proc/self/attr/exec; exec setsid \"$@\"' sh "),
    );
    ensure!(labelled != script, "the script has no setsid");
    fs::write(node.dir.join("restart"), labelled)?;
    let opt = node.dir.join("opt");
    mount(
        "tmpfs",
        &opt,
        "tmpfs",
        MountFlags::empty(),
        Some(c"context=node_u:object_r:shut_t:s0"),
    )?;
    let outcome = refused_then_allowed(&node, label);
    unmount(&opt, UnmountFlags::DETACH)?;
    outcome
}

fn refused_then_allowed(node: &Node, label: &str) -> Outcome {
    node.up()?;
    let pid = fs::read_to_string(node.dir.join("pid"))?;
    let is = fs::read_to_string(format!("/proc/{}/attr/current", pid.trim()))?;
    ensure_eq!(
        is.trim_end_matches(['\0', '\n']),
        label,
        "containerd's label"
    );
    let before = node.tree();
    let patient = ["--timeout", "120"];
    node.refuses(
        "install",
        &patient,
        &[
            "prove: make a sandbox",
            "permission denied",
            "SELinux enforces here",
            "--prefix",
            "the node is as it was",
        ],
    )?;
    same("after a refusal", &before, &node.tree())?;
    let prefix = node.dir.join("usr/local/libexec/casemate");
    let prefix = prefix.display().to_string();
    let prefix = ["--prefix", &prefix, "--timeout", "120"];
    let said = node.must("install", &prefix)?;
    ensure!(
        said.contains("proof: a container of class strict ran"),
        "install: {said}"
    );
    node.must("uninstall", &prefix)?;
    same("after uninstall", &before, &node.tree())
}
