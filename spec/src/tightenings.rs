//! What is changed in a specification rather than refused. Nothing is changed without
//! a row here: whoever decides names the row, and the page of them is made of the rows.

/// One way in which a specification is changed.
#[derive(Debug)]
pub struct Tightening {
    /// The field.
    pub field: &'static str,
    /// What becomes of it.
    pub what: &'static str,
    /// Why.
    pub why: &'static str,
    /// How to have it as written; empty: not at all.
    pub way: &'static str,
    /// The shim's log says so, as somebody may miss something.
    pub told: bool,
}

macro_rules! tightenings {
    ($($name:ident = $field:literal, $what:literal, $why:literal, $way:literal, $told:literal;)*) => {
        $(pub(crate) const $name: &Tightening = &Tightening {
            field: $field, what: $what, why: $why, way: $way, told: $told,
        };)*
        /// All of them.
        pub const TIGHTENINGS: &[&Tightening] = &[$($name),*];
    };
}

tightenings! {
    NO_NEW_PRIVS = "process.noNewPrivileges",
        "set in spite of false",
        "set-uid programs and file capabilities give what the policy withholds",
        "profile = \"compat\" in the node's configuration", false;
    CAPABILITIES = "process.capabilities",
        "those beyond the policy are dropped, where the configuration doesn't have them refused",
        "what isn't granted can't be used",
        "capabilities.allow", true;
    EXEC_LIMIT = "process.rlimits[].hard",
        "of an exec: lowered to its container's",
        "an exec gets no more than its container",
        "Raise the container's limit.", false;
    CORE_LIMIT = "process.rlimits[].hard",
        "a limit of core files is replaced by none",
        "a core file has all that the process' memory holds, and a handler of the node's would get it",
        "secrets.core_dumps = true", false;
    EXEC_POLICY = "process.scheduler.policy",
        "of an exec: lowered to its container's",
        "an exec gets no more than its container",
        "", false;
    EXEC_IO = "process.ioPriority.class",
        "of an exec: lowered to its container's",
        "an exec gets no more than its container",
        "", false;
    SECCOMP = "linux.seccomp",
        "stacked on the sandbox's own profile: what either refuses is refused",
        "a specification may be looser than the sandbox",
        "A looser profile in the node's configuration.", false;
    UTS = "linux.namespaces[].type",
        "a uts namespace is made though none is asked for",
        "else the host's name would be shown, and could be set",
        "", false;
    MOUNT_OPTIONS = "mounts[].options",
        "nosuid and nodev in place of suid and dev",
        "devices and set-uid programs of a volume are somebody else's",
        "", true;
    TOKEN = "mounts[].source",
        "a service account's token is withheld: an empty directory is there instead",
        "the pod's annotation or the node's configuration says so",
        "secrets.service_account_token, or the annotation casemate.io/service-account-token", false;
    MASKED_ANYWAY = "linux.maskedPaths",
        "empty, and the usual paths are masked all the same",
        "they show the node's memory, keys and hardware",
        "", true;
    MASKED = "linux.maskedPaths",
        "the usual paths that aren't in it are added",
        "they show the node's memory, keys and hardware",
        "", false;
    READ_ONLY_ANYWAY = "linux.readonlyPaths",
        "empty, and the usual paths are read-only all the same",
        "they change the node",
        "", true;
    READ_ONLY = "linux.readonlyPaths",
        "the usual paths that aren't in it are added",
        "they change the node",
        "", false;
    DEVICE_RULES = "linux.resources.devices[].allow",
        "leave for a device that the sandbox doesn't have is dropped",
        "there is no such device in its /dev, and none can be made",
        "devices.allow", true;
    HOST_PATH_READ_ONLY = "mounts[].options",
        "a volume of the node's programs, logs of pods, time zone or certificates is read-only",
        "who can change the node's programs has the node",
        "host_paths.allow, or host_paths.read_only without it", true;
}
