//! `casemate install` and `casemate uninstall`: a node's containerd learns of the
//! runtime, or forgets it, and the node is either as asked for or as it was.
//!
//! Each stage looks first and acts only where there is something to do. What is
//! changed is written down before ([`journal`]), so that the next run of either
//! command puts back what an interrupted one left.

mod binaries;
mod cluster;
mod config;
mod containerd;
mod cri;
mod effective;
mod facts;
pub mod files;
mod grpc;
mod journal;
#[cfg(feature = "kubernetes")]
mod kubernetes;
#[cfg(not(feature = "kubernetes"))]
#[path = "no_kubernetes.rs"]
mod kubernetes;
mod layout;
mod look;
mod pod;
mod proof;
mod stages;
pub mod task;
mod uninstall;

use std::path::PathBuf;

use clap::Args;

use cluster::Cluster;

pub use containerd::bounded;
pub use effective::Effective;
pub use facts::{Facts, Places, facts};
pub use proof::inside;
pub use stages::install;
pub use uninstall::uninstall;

/// Help texts' last part.
pub const INSTALL_EXAMPLES: &str = "\
Examples:
  casemate install --dry-run              what would be done here
  casemate install                        programs, containerd's configuration,
                                          restart if needed, proof
  casemate install --compat               also the handler casemate-compat
  casemate install --binaries-only        for ctr and nerdctl: no configuration
  casemate install --restart-command 'rc-service containerd restart'
  casemate install --host-root /host      from a container with the node's root
  casemate install --node worker-1        also label the node, with the pod's account;
                                          or --kubeconfig FILE

Programs go to /opt/casemate/VERSION; /opt/casemate/current leads to the newest.
Run it again to upgrade: pods go on with the version that they have. Whatever
fails, the node is put back as it was. Exit status: 0 done, 1 failed or refused.";

/// Help texts' last part.
pub const UNINSTALL_EXAMPLES: &str = "\
Examples:
  casemate uninstall --dry-run            what would be done here
  casemate uninstall                      refuses while sandboxes run
  casemate uninstall --force              running pods keep the programs they need;
                                          run it again to remove those

Labels of the node, as install --node has set them, go if Kubernetes can be asked;
casemate goes all the same. Exit status: 0 done or nothing to do, 1 failed or refused.";

/// Where things are on the node.
#[derive(Debug, Args)]
pub struct Node {
    /// Put DIR in front of every path below that isn't given: for trials beside
    /// a node's own containerd
    #[arg(long, value_name = "DIR", conflicts_with = "host_root")]
    root: Option<PathBuf>,
    /// The node's root file system, where this runs in a container
    #[arg(long, value_name = "DIR")]
    host_root: Option<PathBuf>,
    /// Refuse unless the node's /etc/machine-id is this one
    #[arg(long, value_name = "ID")]
    machine_id: Option<String>,
    /// Directory of the programs [default: /opt/casemate]
    #[arg(long, value_name = "DIR")]
    prefix: Option<PathBuf>,
    /// Directory of the installer's own record [default: /var/lib/casemate/install]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Directory, in containerd's PATH, of links to the programs [default: /usr/local/bin]
    #[arg(long, value_name = "DIR")]
    links: Option<PathBuf>,
    /// containerd's program [default: the one in PATH, or k3s's or rke2's]
    #[arg(long, value_name = "PROGRAM")]
    containerd: Option<PathBuf>,
    /// containerd's configuration [default: /etc/containerd/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// containerd's socket [default: /run/containerd/containerd.sock]
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// Name of the runtime handler; those of its classes are NAME-strict, NAME-compat
    #[arg(long, value_name = "NAME", default_value = "casemate")]
    handler: String,
}

/// How containerd is restarted.
#[derive(Debug, Args)]
pub struct Restarting {
    /// systemd's unit to restart [default: containerd, or k3s's or rke2's]
    #[arg(long, value_name = "UNIT")]
    unit: Option<String>,
    /// Command for sh that restarts containerd, in place of systemd
    #[arg(long, value_name = "COMMAND", conflicts_with = "unit")]
    restart_command: Option<String>,
    /// Leave the restart, and what can be seen only after it, to somebody else
    #[arg(long, conflicts_with_all = ["unit", "restart_command"])]
    no_restart: bool,
    /// How long containerd may take to come back
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

impl Restarting {
    /// The unit that systemd would restart.
    fn unit<'a>(&'a self, layout: &'a layout::Layout) -> &'a str {
        self.unit.as_deref().unwrap_or(&layout.unit)
    }
}

/// `casemate install`.
#[derive(Debug, Args)]
pub struct Install {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    restarting: Restarting,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Directory of the programs to install [default: those that this one carries, or
    /// else its own directory]
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// The programs alone: containerd's configuration stays as it is
    #[arg(long, conflicts_with = "name")]
    binaries_only: bool,
    /// Offer the class compat too, HANDLER-compat: its pods have the profile compat,
    /// whatever the node's configuration says of others
    #[arg(long)]
    compat: bool,
    /// Don't run a container to see that it can
    #[arg(long, conflicts_with = "name")]
    no_proof: bool,
}

/// `casemate uninstall`.
#[derive(Debug, Args)]
pub struct Uninstall {
    #[command(flatten)]
    node: Node,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    restarting: Restarting,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Also while sandboxes run; they go on, with their programs
    #[arg(long)]
    force: bool,
}
