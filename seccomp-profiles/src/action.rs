//! What a filter answers to one call, and its two spellings: text and `SECCOMP_RET_*`.

use std::fmt;

use crate::errno;

/// `SECCOMP_RET_KILL_PROCESS` (linux/seccomp.h).
pub const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_DATA: u32 = 0xffff;

/// A verdict, see "Return values" of seccomp(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// The call runs.
    Allow,
    /// The call runs and is written to the audit log.
    Log,
    /// The call does not run; the caller sees this error number.
    Errno(u16),
    /// A listener decides, see seccomp_unotify(2).
    Notify,
    /// The tracer decides; without one the call fails with `ENOSYS`.
    Trace(u16),
    /// `SIGSYS` is sent to the calling thread.
    Trap,
    /// The calling thread dies.
    KillThread,
    /// The whole process dies.
    KillProcess,
}

/// `action` text that is none of `allow`, `log`, `notify`, `trace`, `kill`, `errno(NAME)`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "read action: \"{text}\" is no action; write allow, log, notify, trace, kill or errno(NAME), such as errno(EPERM)"
)]
pub struct UnknownAction {
    /// The text as found.
    pub text: String,
}

impl Action {
    /// The 32-bit value that a filter returns for this verdict.
    #[must_use]
    pub fn to_ret(self) -> u32 {
        match self {
            Self::Allow => RET_ALLOW,
            Self::Log => RET_LOG,
            Self::Errno(number) => RET_ERRNO | u32::from(number),
            Self::Notify => RET_USER_NOTIF,
            Self::Trace(data) => RET_TRACE | u32::from(data),
            Self::Trap => RET_TRAP,
            Self::KillThread => RET_KILL_THREAD,
            Self::KillProcess => RET_KILL_PROCESS,
        }
    }

    /// The verdict that the kernel reads in a filter's return value. As in the
    /// kernel, an action it does not know kills the process.
    #[must_use]
    pub fn from_ret(ret: u32) -> Self {
        let data = u16::try_from(ret & RET_DATA).unwrap_or(u16::MAX);
        match ret & !RET_DATA {
            RET_ALLOW => Self::Allow,
            RET_LOG => Self::Log,
            RET_ERRNO => Self::Errno(data),
            RET_USER_NOTIF => Self::Notify,
            RET_TRACE => Self::Trace(data),
            RET_TRAP => Self::Trap,
            RET_KILL_THREAD => Self::KillThread,
            _ => Self::KillProcess,
        }
    }
}

impl std::str::FromStr for Action {
    type Err = UnknownAction;

    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        let known = match text {
            "allow" => Some(Self::Allow),
            "log" => Some(Self::Log),
            "notify" => Some(Self::Notify),
            "trace" => Some(Self::Trace(0)),
            "kill" => Some(Self::KillProcess),
            _ => text
                .strip_prefix("errno(")
                .and_then(|rest| rest.strip_suffix(')'))
                .and_then(|name| match name {
                    // Success in appearance.
                    "0" => Some(0),
                    name => errno::value(name),
                })
                .map(Self::Errno),
        };
        known.ok_or_else(|| UnknownAction {
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::Log => f.write_str("log"),
            Self::Notify => f.write_str("notify"),
            Self::KillProcess => f.write_str("kill"),
            Self::KillThread => f.write_str("kill thread"),
            Self::Trap => f.write_str("trap"),
            Self::Trace(0) => f.write_str("trace"),
            Self::Trace(data) => write!(f, "trace({data})"),
            Self::Errno(number) => match errno::name(*number) {
                Some(name) => write!(f, "errno({name})"),
                None => write!(f, "errno({number})"),
            },
        }
    }
}

impl<'de> serde::Deserialize<'de> for Action {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
