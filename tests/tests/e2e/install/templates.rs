//! Distributions that make containerd's configuration themselves, k3s and rke2: real
//! containerds, with what is made of the templates as those make it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use casemate_tests::generation::Generation;
use casemate_tests::run::run;
use casemate_tests::skip::Outcome;
use casemate_tests::{ensure, ensure_eq};

use super::node::{Node, same};
use crate::trials;

trials! {
    install_by_the_template_of_k3s,
    install_by_the_template_of_rke2,
}

/// Where a distribution has its things.
struct Distribution {
    /// Its directory.
    data: &'static str,
    /// containerd below it.
    program: &'static str,
    /// A unit of its own that may be there, and the one that is restarted else.
    units: [&'static str; 2],
}

fn install_by_the_template_of_k3s() -> Outcome {
    by_template(&Distribution {
        data: "var/lib/rancher/k3s",
        program: "data/current/bin/containerd",
        units: ["k3s-agent", "k3s"],
    })
}

fn install_by_the_template_of_rke2() -> Outcome {
    by_template(&Distribution {
        data: "var/lib/rancher/rke2",
        program: "bin/containerd",
        units: ["rke2-agent", "rke2-server"],
    })
}

/// What both do at each start: containerd's configuration is made of a template if there
/// is one, and of their own, which the template may ask for. Neither program, socket nor
/// configuration are named to the installer.
fn by_template(which: &Distribution) -> Outcome {
    for (generation, template) in [
        (Generation::V1_7, "config.toml.tmpl"),
        (Generation::V2_1, "config-v3.toml.tmpl"),
    ] {
        let mut node = Node::new(generation)?;
        let data = node.dir.join(which.data);
        let etc = data.join("agent/etc/containerd");
        fs::create_dir_all(&etc)?;
        let program = data.join(which.program);
        fs::create_dir_all(program.parent().unwrap_or(&data))?;
        symlink(node.containerd(), &program)?;
        node.is_found = true;
        // Both have the socket in the same place.
        let socket = node.dir.join("run/k3s/containerd");
        fs::create_dir_all(&socket)?;
        symlink(&socket, node.dir.join("run/containerd"))?;
        renders(&node, &etc, template)?;
        node.up()?;
        unit_is_restarted(&node, which)?;
        let before = node.tree();

        let said = node.must("install", &[])?;
        ensure!(
            said.contains(template)
                && said.contains(&program.display().to_string())
                && said.contains("restart: containerd is back, and has loaded the handler")
                && said.contains("proof: a container of class strict ran"),
            "install: {said}"
        );
        ensure!(
            node.dump()?.contains("runtimes.casemate-strict]"),
            "no handler after a restart"
        );
        let said = node.must("install", &[])?;
        ensure!(said.contains("restart: not needed"), "again: {said}");
        node.must("uninstall", &[])?;
        same("after uninstall", &before, &node.tree())?;

        // A template of the operator's own keeps what it has.
        let path = etc.join(template);
        let mine = "# mine\n{{ template \"base\" . }}\n";
        fs::write(&path, mine)?;
        node.must("install", &[])?;
        let with = fs::read_to_string(&path)?;
        ensure!(with.starts_with(mine), "{}: {with}", path.display());
        node.must("uninstall", &[])?;
        ensure_eq!(fs::read_to_string(&path)?, mine, "the operator's template");
    }
    Ok(())
}

/// Has the node's containerd be started as the distribution does.
fn renders(node: &Node, etc: &Path, template: &str) -> Outcome {
    let own = node.dir.join("own.toml");
    // Theirs names runc, which containerd up to 1.7 forgets when there is another.
    let runc = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
                runtime_type = \"io.containerd.runc.v2\"\n";
    let mut text = fs::read_to_string(node.config())?;
    if node.generation == Generation::V1_7 {
        text.push_str(runc);
    }
    fs::write(&own, text)?;
    fs::remove_file(node.config())?;
    let (own, etc, config) = (own.display(), etc.display(), node.config());
    let render = format!(
        "if [ -e {etc}/{template} ]; then\n\
         sed -e '/{{{{ template \"base\" . }}}}/{{r {own}' -e 'd}}' {etc}/{template}\n\
         else cat {own}; fi >{etc}/config.toml\ncp {etc}/config.toml {}\n",
        config.display()
    );
    let script = fs::read_to_string(node.dir.join("restart"))?;
    fs::write(node.dir.join("restart"), format!("{render}{script}"))?;
    Ok(())
}

/// Which of its services would be restarted: the one that this node has.
fn unit_is_restarted(node: &Node, which: &Distribution) -> Outcome {
    let [other, usual] = which.units;
    let dir = node.dir.join("etc/systemd/system");
    fs::create_dir_all(&dir)?;
    for (file, unit) in [(None, usual), (Some(other), other)] {
        if let Some(file) = file {
            fs::write(dir.join(format!("{file}.service")), "")?;
        }
        let mut command = node.bare("install", &["--dry-run"]);
        let said = run(&mut command, &[], Duration::from_secs(60))?.ok()?.out();
        let want = format!("restart: would run systemctl restart {unit}\n");
        ensure!(said.contains(&want), "no {want:?} in {said}");
    }
    Ok(())
}
