//! Plans: what a container and a process are made of, in finished form. No
//! name is left to look up, no policy to decide.

use serde::{Deserialize, Serialize};

/// How the agent sets up the pod and locks itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPlan {
    /// Host name; empty: as it is.
    pub hostname: String,
    /// NIS domain name; empty: as it is.
    pub domainname: String,
    /// Kernel parameters of the pod's own IPC namespace: path below /proc/sys, value.
    pub sysctls: Vec<(String, String)>,
    /// The agent's own filter (`struct sock_filter` array).
    pub filter: Vec<u8>,
}

/// How the container's tree is assembled, and how its forker locks itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchPlan {
    /// Directory of this container below the staging mount.
    pub staging: String,
    /// Mounts in the order of the spec; targets are resolved inside the root.
    pub mounts: Vec<Mount>,
    /// Paths hidden from the container.
    pub masked: Vec<String>,
    /// Paths made read-only.
    pub readonly: Vec<String>,
    /// The root file system itself is read-only.
    pub readonly_root: bool,
    /// The most capabilities any process of this container may ever have.
    pub bounding: u64,
    /// casemate's own filter (`struct sock_filter` array).
    pub filter: Vec<u8>,
    /// Restrict with Landlock.
    pub landlock: bool,
    /// Let Landlock check reads and truncation too: every open then walks its
    /// path a second time.
    pub landlock_reads: bool,
    /// Set no_new_privs, for all processes of the container.
    pub no_new_privs: bool,
    /// Made if missing: the working directory of init, as runc does.
    pub cwd: String,
    /// Take the ways that older kernels need although this one knows better.
    pub older_kernel: bool,
    /// Bind a terminal for the user with this id at /dev/console; init gets it.
    pub console: Option<u32>,
    /// Make a time namespace, and wait for [`crate::ToForker::Proceed`] before
    /// its first process is born: until then its clocks can be set.
    pub time_namespace: bool,
    /// Wait for [`crate::ToForker::Proceed`] before the change of root.
    pub wait_before_root: bool,
    /// What to run then.
    pub hooks: Vec<HookPlan>,
    /// Processes install filters of their own without no_new_privs: so the
    /// forker keeps CAP_SYS_ADMIN, of the container's user namespace (seccomp(2)).
    pub own_filters: bool,
    /// Join the pid namespace that comes with the plan, rather than make one.
    pub joins_pids: bool,
    /// The network isn't the pod's own: keep abstract sockets to the container, with
    /// Landlock.
    pub shares_network: bool,
    /// In its place a filter that asks a listener about what it refuses, and about
    /// what the specification's own filter does; empty: none asks.
    pub asks: Vec<u8>,
    /// Ports, from the first to the last, that TCP connects to, by Landlock's rules
    /// for ports (ABI 4); `None`: all.
    pub connect_ports: Option<Vec<(u16, u16)>>,
    /// The same for ports that TCP listens on.
    pub listen_ports: Option<Vec<(u16, u16)>>,
    /// A second filter, which refuses nothing and asks about what is to be written
    /// down; empty: nothing is. [`LaunchPlan::filter`] is beside it then, and
    /// [`LaunchPlan::asks`] isn't: a process can have one listener.
    pub learns: Vec<u8>,
    /// A hook's last filter, before it executes: takes back the calls that the others
    /// let run for the forker's mark; empty: there are none.
    pub closes: Vec<u8>,
}

/// What of a container's calls is written down. Numbers of calls and of arguments.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LearnPlan {
    /// The learner's own filter (`struct sock_filter` array).
    pub filter: Vec<u8>,
    /// Calls of which some arguments tell kinds apart: which, and which bits of
    /// their low halves. At most three of a call.
    pub kinds: Vec<(u32, Vec<(u8, u32)>)>,
    /// Calls with an argument that leads to a path, and, where it is not the working
    /// directory, the argument that says what a relative one starts from.
    pub paths: Vec<(u32, u8, Option<u8>)>,
    /// Calls with an argument that leads to socket addresses, and in which form.
    pub addresses: Vec<(u32, u8, AddressForm)>,
}

/// What an argument leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressForm {
    /// An address that is to be the caller's own; the next argument is its length.
    Own,
    /// Another's; the next argument is its length.
    Other,
    /// A message with another's address (`struct msghdr`, sendmsg(2)).
    Message,
    /// As many of them as the next argument says (`struct mmsghdr`, sendmmsg(2)).
    Messages,
}

/// How refused calls are answered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerPlan {
    /// Finds the rule that a call meets (`struct sock_filter` array): the verdict
    /// is `SECCOMP_RET_TRACE` with its number. Interpreted, and never installed.
    pub program: Vec<u8>,
    /// Error number to answer, by number of the rule; 0 is EPERM.
    pub errnos: Vec<u16>,
    /// Calls of which some arguments are told, and which: a bit for each.
    pub classes: Vec<(u32, u8)>,
    /// The specification's own filter (`struct sock_filter` array), whose errors go
    /// before those of the rules; empty: it has none. Interpreted like `program`.
    pub own: Vec<u8>,
}

/// How the first process of the pod's pid namespace locks itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausePlan {
    /// Its filter (`struct sock_filter` array).
    pub filter: Vec<u8>,
}

/// A program of the node, to be run where the container is assembled, behind
/// the container's locks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// What it is called in messages.
    pub name: String,
    /// Arguments, the first of which is its name.
    pub args: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Seconds it may take.
    pub timeout: u32,
}

/// One mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute path in the container.
    pub target: String,
    /// What is mounted there.
    pub source: MountSource,
    /// `MOUNT_ATTR_*` bits, for what the agent's side makes itself.
    pub attributes: u64,
    /// What is mounted below its source later arrives in the container.
    pub receives: bool,
}

/// Where a mount comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// Made by the shim, found under this name in the container's staging directory.
    Staged {
        /// Entry name.
        name: String,
        /// It is a directory (a missing target is made of the same kind).
        directory: bool,
        /// With all mounts below it.
        recursive: bool,
    },
    /// A new file system of a type that the pod may make: proc, tmpfs, devpts,
    /// mqueue, cgroup2.
    New {
        /// File system type.
        fstype: String,
        /// `key=value` or flags for fsconfig(2).
        options: Vec<(String, Option<String>)>,
    },
}

/// A limit of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// `RLIMIT_*`.
    pub resource: u32,
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// A process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Arguments; the first names the binary.
    pub args: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// User id in the container.
    pub uid: u32,
    /// Group id in the container.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Permitted capabilities.
    pub permitted: u64,
    /// Effective capabilities.
    pub effective: u64,
    /// Inheritable capabilities.
    pub inheritable: u64,
    /// Ambient capabilities.
    pub ambient: u64,
    /// Limits at or below those of the forker.
    pub limits: Vec<Limit>,
    /// A new terminal of this size (0×0: unset) instead of the descriptors.
    pub terminal: Option<TerminalSize>,
    /// The last filter, stacked on the container's: the spec's own, and without the
    /// calls that the container's lets run for the forker's mark.
    pub filter: Vec<u8>,
    /// Flags of seccomp(2) for it.
    pub filter_flags: u32,
    /// Policy and nice value for sched_setattr(2).
    pub scheduler: Option<(u32, i32)>,
    /// Value for ioprio_set(2).
    pub io_priority: Option<u16>,
    /// Processors to stay on; empty: as the cgroup has it.
    pub cpus: Vec<u16>,
    /// The binary, with nothing added to the environment; empty: as the first
    /// argument and PATH name it.
    pub path: String,
    /// Keep CAP_SYS_ADMIN, of the container's user namespace, up to the
    /// installation of the filter: see [`LaunchPlan::own_filters`].
    pub keep_for_filter: bool,
    /// Capabilities of the container's bounding set that this process lacks.
    pub drop_bounding: u64,
    /// Set no_new_privs, where the container as a whole does without.
    pub no_new_privs: bool,
    /// AppArmor profile to take on with execve; empty: none.
    pub apparmor: String,
    /// SELinux label to take on with execve; empty: none.
    pub selinux: String,
}
