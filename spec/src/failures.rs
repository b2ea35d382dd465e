//! What else than a rule keeps a container from starting, as a pod's author reads it: for
//! documents. The words are those of the program that says them; a test looks for them
//! there.

/// A kind of failure.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// What its message has, without names and values.
    pub words: &'static str,
    /// When it comes.
    pub when: &'static str,
    /// What the reader can do.
    pub way_out: &'static str,
}

macro_rules! failures {
    ($($words:literal, $when:literal, $way_out:literal;)*) => {
        /// All that is told so, in the order in which a container is made.
        pub static FAILURES: &[Failure] =
            &[$(Failure { words: $words, when: $when, way_out: $way_out }),*];
    };
}

failures! {
    "take an id range: all ",
        "as many pods as `ids.count` has ranges live on the node",
        "For the operator: raise `ids.count`, or run fewer pods there.";
    "this kernel has no Landlock",
        "the node lacks a lock",
        "For the operator: `casemate doctor` says how to turn it on, or `fallback.without_landlock`.";
    "guard the pod's network: ",
        "the node has no nf_tables, or not all of it",
        "For the operator: a kernel that has it, or `network.without_nftables`. An annotation `egress` or `ingress` needs it.";
    "isn't supported (linux.namespaces[type=",
        "a namespace is somebody else's than the pod's, or its pod has gone",
        "Let CRI make the pod; start a target container before those that join it.";
    "containers of a pod share the pod's ids",
        "`hostUsers` isn't the same for the pod and its container",
        "Leave it to the kubelet.";
    "its file system has no id-mapped mounts on this kernel",
        "containerd keeps images on a file system that can't map ids",
        "For the operator: ext4, xfs or btrfs below containerd's root (`casemate doctor`).";
    "need Linux 6.7, or an image with fewer",
        "an image has more than about 80 layers, on an older kernel",
        "Squash the image, or a newer node.";
    "refuse the image:",
        "the image has a symbolic link or a file where `/dev` or another directory has to be",
        "Mend the image.";
    "mount source ",
        "a volume's path isn't on the node",
        "Make it; with `hostPath`, `type: DirectoryOrCreate` does.";
    "has no id-mapped mounts on this kernel, and ",
        "a writable volume's file system can't map ids (NFS, overlay…)",
        "`readOnly: true`, another volume, or `volumes.without_idmap` by the operator ([volumes.md](volumes.md)).";
    "make mount target",
        "the root is read-only, or the image's, and lacks a place for a mount",
        "Have the directory in the image, or mount elsewhere.";
    "above those of containerd, which takes CAP_SYS_RESOURCE",
        "a limit (`ulimits`) is higher than containerd's own",
        "Lower it; or the operator raises that of containerd's unit.";
    "set process.oomScoreAdj to ",
        "containerd may not lower that score",
        "For the operator: CAP_SYS_RESOURCE for containerd, or `fallback.without_oom_score_adj`.";
    "linux.seccomp: ",
        "the pod's own seccomp profile can't be compiled",
        "Correct the profile, or `RuntimeDefault`.";
    "has gone from ",
        "the profile that the node's configuration or the annotation names was removed meanwhile",
        "For the operator: put it back; `casemate profile list`.";
    "is not in force and the process was killed",
        "AppArmor or SELinux didn't take the label",
        "For the operator: the kernel's log has the module's reason.";
    "the kernel takes 6 MiB at most",
        "arguments and environment are too large",
        "Put it into a file, on a volume.";
    "the container's forker is gone",
        "it was killed, most likely as the memory limit is too low for anything to start (`100m` is a tenth of a byte, `100Mi` is meant)",
        "Raise `resources.limits.memory`; the kernel's log has whom it killed.";
    "change to process.cwd",
        "`workingDir` isn't a directory of the root, or not for this user",
        "Correct `workingDir`, or the image.";
    "executable file not found in $PATH",
        "the program isn't in the image, or not in `PATH`",
        "Correct `command`; a path helps where `PATH` is odd.";
    "start process",
        "the program can't be executed: permission, architecture, or no interpreter of that name (`#!`, a dynamic loader)",
        "Correct the image, or `command`.";
    "the pod's agent has ended",
        "the pod was lost: its agent was killed",
        "Kubernetes makes it again; `casemate events` and the kernel's log say more.";
    "the shim is shutting down",
        "the pod is on its way out",
        "Nothing: it is made again.";
    "nothing runs in the sandbox container",
        "an exec names the pod's sandbox in place of a container",
        "Name the container.";
}
