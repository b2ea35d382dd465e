//! Why a specification is refused: one row per reason, as data, so that
//! documents and metrics can list them.

/// A reason to refuse.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Stable name, for metrics and tests.
    pub id: &'static str,
    /// What is refused: the start of the message.
    pub what: &'static str,
    /// Why: for documents.
    pub why: &'static str,
    /// What the reader can do: the end of the message.
    pub way_out: &'static str,
}

macro_rules! rules {
    ($($name:ident = $id:literal, $what:literal, $why:literal, $way_out:literal;)*) => {
        $(pub(crate) static $name: Rule =
            Rule { id: $id, what: $what, why: $why, way_out: $way_out };)*
        /// Every rule, in order of subject.
        pub static RULES: &[&Rule] = &[$(&$name),*];
    };
}

rules! {
    HOST_NETWORK = "host-network",
        "the host's network is refused in this sandbox",
        "the node's network reaches its metadata service, kubelet and every local socket",
        "Remove hostNetwork, or set sandbox.allow_host_network in the node's configuration.";
    HOST_NETWORK_LISTS = "network-list-host",
        "lists of connections are refused on the host's network",
        "the host's network filters are the node's own, and nobody's else to change",
        "Remove hostNetwork, or the annotation.";
    NETWORK_LIST = "network-list",
        "this list of connections makes no sense",
        "a list that isn't understood would hold nothing",
        "Write none, or CIDR:port[/protocol] with commas between, as 10.0.0.0/8:443, [2001:db8::]/32:8000-8999/tcp or 192.0.2.7:*, cluster-dns for egress, and loopback:port, loopback:none or loopback:* for what the pod has with itself.";
    HOST_PID = "host-pid",
        "the host's processes are refused in this sandbox",
        "the host's /proc shows what the node and other pods run, and no setting changes that",
        "Remove hostPID (shareProcessNamespace works), or use another RuntimeClass.";
    HOST_IPC = "host-ipc",
        "the host's shared memory is refused in this sandbox",
        "shared memory is a way into the node's processes that use it, and no setting changes that",
        "Remove hostIPC, or use another RuntimeClass.";
    HOST_MOUNT = "host-mount-namespace",
        "a mount namespace that isn't the container's own is refused",
        "it holds the files of somebody else",
        "Ask for a new mount namespace, without a path.";
    CGROUP_PATH = "cgroup-namespace-path",
        "joining a cgroup namespace is refused",
        "each container has one of its own",
        "Remove the path.";
    TIME_NAMESPACE = "time-namespace",
        "these clocks are refused",
        "a container has a time namespace of its own or the host's, and the kernel knows two clocks that it can shift",
        "Ask for a time namespace without a path, and in linux.timeOffsets for monotonic and boottime only.";
    NAMESPACE_LIST = "namespace-list",
        "the list of namespaces makes no sense",
        "the OCI specification forbids it",
        "Name each namespace once, with an absolute path or none.";
    USER_NAMESPACE = "user-namespace",
        "this user namespace is refused",
        "a pod has the ids 0 to 65535, each mapped to one id of the host",
        "Let the kubelet choose the mapping, one line of 65536 ids from 0, or remove hostUsers: false: every pod has a user namespace of its own anyway.";
    USER_NAMESPACE_IDS = "user-namespace-ids",
        "these host ids of a user namespace are refused",
        "ids that somebody else has or could get are no isolation",
        "Move ids.base in the node's configuration or the kubelet's range (user kubelet in /etc/subuid) out of each other's way.";
    PRIVILEGED = "privileged",
        "privileged containers are refused in this sandbox",
        "a privileged container is root of the node",
        "Remove securityContext.privileged, or use another RuntimeClass.";
    ANNOTATION_KEY = "annotation-unknown",
        "there is no such annotation of casemate's",
        "what it was to tighten would silently not be tightened",
        "Correct it; there are casemate.io/profile, exec, service-account-token, egress, ingress and capabilities.";
    ANNOTATION_VALUE = "annotation-value",
        "this annotation makes no sense",
        "what it was to tighten would silently not be tightened",
        "Correct it, or remove it.";
    ANNOTATION_LOOSENS = "annotation-loosens",
        "this annotation would loosen what holds without it",
        "who writes a pod isn't who answers for the node, nor a container's author for the pod",
        "Remove it, ask for something tighter, or name its key in annotations.allow of the node's configuration (which lets pods loosen what the node says, and not containers what their pod says).";
    ANNOTATION_POD = "annotation-of-pod",
        "this annotation of a container can only be its pod's",
        "the containers of a pod share its network",
        "Put it on the pod, and pod_annotations = [\"casemate.io/*\"] into containerd's configuration of the runtime.";
    LEARN = "learn",
        "learning from a pod is refused on this node",
        "each call of it is looked at before it runs, and what it does is kept on the node",
        "Ask for another profile, or set learn.allow = true in the node's configuration.";
    SYSCTL = "sysctl",
        "this sysctl is refused",
        "it isn't separate for each pod, so it would change the node",
        "Use only net.*, kernel.shm*, kernel.msg*, kernel.sem and fs.mqueue.*, or set it on the node.";
    SYSCTL_UNSAFE = "sysctl-unsafe",
        "this sysctl isn't one of the safe ones",
        "it is the pod's own, and opens kernel code or takes memory of the node's all the same",
        "Use only those that Kubernetes calls safe, or name it in sysctls.allow of the node's configuration.";
    CAPABILITY = "capability",
        "these capabilities are refused in this sandbox",
        "what needs them would fail later, and for no visible reason",
        "Remove them from securityContext.capabilities.add, name them in capabilities.allow of the node's configuration, or set capabilities.beyond = \"drop\" there.";
    IMAGE_UNKNOWN = "image-unknown",
        "an image whose name isn't known is refused",
        "the node's configuration has rules about names of images",
        "Start it through CRI with a kubelet of 1.27 or later, which says the name; or remove the rules of [images] from the node's configuration.";
    IMAGE_DIGEST = "image-digest",
        "an image by tag is refused",
        "a tag is what its registry says today, a digest is the image",
        "Name it as NAME@sha256:DIGEST, or set images.require_digest = false in the node's configuration.";
    IMAGE_REGISTRY = "image-registry",
        "an image from this place is refused",
        "the node's configuration says where images come from",
        "Use one from there, or add its registry or repository to images.registries of the node's configuration.";
    HOST_PATH = "host-path",
        "this path of the node is refused as a volume",
        "its files run the node: who reads or changes them, or talks to a socket there, has it",
        "Mount only what is needed from elsewhere, or name the path in host_paths.allow of the node's configuration (not what host_paths.deny names).";
    HOST_PATH_SOCKET = "host-path-socket",
        "a socket of the node is refused as a volume",
        "behind a socket is a service of the node, which has the node's rights",
        "Use the service by the network, or name the socket or its directory in host_paths.allow of the node's configuration.";
    HOST_PATH_POD = "host-path-of-pod",
        "a path of the kubelet's that isn't this pod's is refused as a volume",
        "the kubelet's directory has the volumes, tokens and secrets of every pod",
        "Mount volumes by volumeMounts of the pod that has them; if the kubelet's --root-dir is elsewhere, set host_paths.kubelet in the node's configuration.";
    HOST_PATH_NOT_ALLOWED = "host-path-not-allowed",
        "this path of the node isn't one of those allowed as volumes",
        "the node's configuration has host_paths.only_allowed",
        "Use another kind of volume, or name the path in host_paths.allow of the node's configuration.";
    ROOTFS_PROPAGATION = "rootfs-propagation",
        "this propagation of the root is refused",
        "mounts made in the sandbox must not reach the host",
        "Use private or slave.";
    MOUNT_PROPAGATION = "mount-propagation",
        "this propagation of a mount is refused",
        "mounts made in the sandbox must not reach the host",
        "Use mountPropagation None or HostToContainer.";
    DEVICE = "device",
        "this device is refused",
        "a device is the kernel's driver, outside of every other limit",
        "Remove the device, or name its path on the node in devices.allow of the node's configuration.";
    HOOKS = "hooks",
        "this OCI hook is refused",
        "a hook is a program of the node that runs as its root whenever a specification says so",
        "Remove the hook, or name its path in hooks.allow of the node's configuration.";
    HOOK_FORM = "hook-form",
        "this OCI hook makes no sense",
        "what it was to set up would be missing",
        "Give a plain absolute path, arguments and NAME=value without NUL, and a timeout of 1 second or more.";
    HOOK_PAUSE = "hook-of-pause",
        "an OCI hook of the pod's sandbox container is refused",
        "nothing runs in that container, so that there is no moment for a hook",
        "Give the hook to a container of the pod.";
    SCHEDULING = "scheduling",
        "this scheduling is refused",
        "a process may be given less than others, and not more",
        "Use SCHED_OTHER, SCHED_BATCH or SCHED_IDLE with a nice value from 0 to 19, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE from 0 to 7, plain lists of processors, and no profile strict.";
    APPARMOR = "apparmor",
        "this AppArmor profile can't be applied on this node",
        "a confinement that was asked for would be missing",
        "Use the profile unconfined, load this one (apparmor_parser), or use a node with AppArmor.";
    SELINUX = "selinux",
        "this SELinux label can't be applied on this node",
        "a confinement that was asked for would be missing",
        "Remove seLinuxOptions, or use a node with SELinux whose policy has this label.";
    UNSUPPORTED = "unsupported-field",
        "this field is refused: casemate doesn't apply it",
        "what it was to change would silently not be changed",
        "Remove it, or use another RuntimeClass.";
    PLATFORM = "other-platform",
        "a section for another platform is refused",
        "casemate runs Linux containers",
        "Remove the section.";
    PERSONALITY = "personality",
        "this personality is refused",
        "foreign ABIs are closed in the sandbox",
        "Use the domain LINUX without flags, or another RuntimeClass.";
    SECCOMP_LISTENER = "seccomp-listener",
        "a seccomp listener is refused",
        "it hands the container's system calls to a process of the host",
        "Remove listenerPath, or use another RuntimeClass.";
    MOUNT_DESTINATION = "mount-destination",
        "this mount destination is refused",
        "it isn't a plain absolute path, or covers what the sandbox itself mounts",
        "Use an absolute path without .. that isn't under /proc.";
    MOUNT_TYPE = "mount-type",
        "this type of mount is refused",
        "a filesystem parses what the workload gives it in the kernel",
        "Use proc, sysfs, tmpfs, devpts, mqueue, bind or cgroup.";
    MOUNT_SOURCE = "mount-source",
        "this mount source is refused",
        "it isn't a plain absolute path, or shows the host's own state",
        "Mount only the directory that is needed, by its absolute path, or use another RuntimeClass.";
    MOUNT_OPTION = "mount-option",
        "this mount option is refused",
        "an option that isn't known could not be checked",
        "Remove the option.";
    MOUNT_IDMAP = "mount-idmap",
        "this id mapping of a mount is refused",
        "a mount is mapped as its pod is, or somebody else's files would be the pod's",
        "Map it as linux.uidMappings and linux.gidMappings map the pod, or leave its mapping out.";
    PATH = "path",
        "this path makes no sense",
        "a path is absolute and plain, or it could mean something else inside",
        "Use an absolute path without .. in it.";
    ID = "id",
        "this id is out of range",
        "a pod has the ids 0 to 65535",
        "Use an id below 65536 (securityContext.runAsUser, runAsGroup, supplementalGroups).";
    PROCESS = "process",
        "this process makes no sense",
        "the OCI specification or execve(2) forbids it",
        "Correct the field.";
    EXEC_DENIED = "exec-denied",
        "execs are refused in this container",
        "an exec is a program that neither the image nor the pod's author has chosen",
        "Set exec.policy in the node's configuration to record or allow, or remove the annotation casemate.io/exec; a probe can be HTTP, TCP or gRPC.";
    EXEC_CAPABILITIES = "exec-capabilities",
        "an exec with more capabilities than its container is refused",
        "who may exec in a container isn't who decided what it may do",
        "Leave process.capabilities out, or name only what the container's own process names.";
    EXEC_USER = "exec-user",
        "an exec as another user or group than the container's is refused",
        "who may exec in a container isn't who decided as whom it runs",
        "Use the container's own user and groups, or set exec.users = \"any\" in the node's configuration.";
    EXEC_TERMINAL = "exec-terminal",
        "an exec with a terminal is refused",
        "the node's configuration lets programs run in containers, and not people work there",
        "Leave the terminal out (kubectl exec without -t), or set exec.terminal = true in the node's configuration.";
    RESOURCES = "resources",
        "this limit makes no sense",
        "a limit that can't be applied would silently not be one",
        "Correct the field.";
}
