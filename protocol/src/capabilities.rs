//! Capabilities of the agent, the forkers and learners, as bits of capabilities(7):
//! what they keep, and what the shim promises of them.

const fn cap(n: u32) -> u64 {
    1 << n
}
const CHOWN: u64 = cap(0);
const DAC_OVERRIDE: u64 = cap(1);
const DAC_READ_SEARCH: u64 = cap(2);
const FOWNER: u64 = cap(3);
const FSETID: u64 = cap(4);
const KILL: u64 = cap(5);
const SETGID: u64 = cap(6);
const SETUID: u64 = cap(7);
const SETPCAP: u64 = cap(8);
const SYS_CHROOT: u64 = cap(18);
const SYS_PTRACE: u64 = cap(19);
/// Mounts, namespaces; a filter without no_new_privs (seccomp(2)).
pub const SYS_ADMIN: u64 = cap(21);

/// Modes of files don't bind who has one of these.
pub const FILES: u64 = DAC_OVERRIDE | DAC_READ_SEARCH;

/// What the agent and the assembling child use: mounts and namespaces
/// (SYS_ADMIN, SYS_CHROOT), targets in an image of any owner (CHOWN, DAC_*,
/// FOWNER, FSETID), ids (SET*ID, SETPCAP for securebits), reaping (KILL).
pub const AGENT: u64 = CHOWN
    | DAC_OVERRIDE
    | DAC_READ_SEARCH
    | FOWNER
    | FSETID
    | KILL
    | SETGID
    | SETUID
    | SETPCAP
    | SYS_CHROOT
    | SYS_ADMIN;

/// What the forker itself needs, beside what its children may have: the ids
/// of processes it forks.
pub const FORKER: u64 = SETGID | SETUID;

/// A learner reads its callers' memory: SYS_PTRACE, and DAC_READ_SEARCH to open it.
pub const LEARNER: u64 = DAC_READ_SEARCH | SYS_PTRACE;
