//! The node's configuration: one TOML file and the drop-ins beside it.
//!
//! Every key has a default that is safe; a key that doesn't exist is an error,
//! because a misspelt one would otherwise be a policy that isn't there.

mod annotations;
mod broker;
mod diagnose;
mod exec;
mod host_paths;
mod images;
mod learn;
mod network;
mod profiles;
mod schema;
mod secrets;
mod sysctls;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::caps;
use crate::error::{ConfigError, one_line};
use crate::paths::plain_absolute;

pub use annotations::Annotations;
pub use broker::Broker;
pub use diagnose::{Diagnosis, Problem, diagnose};
pub use exec::{Exec, ExecPolicy, ExecUsers};
pub use host_paths::HostPaths;
pub use images::Images;
pub use learn::Learn;
pub use network::{Metadata, Network, WithoutNftables};
pub use profiles::Profiles;
pub use schema::schema;
pub use secrets::{Secrets, Token};
pub use sysctls::Sysctls;

/// Where the configuration is unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/casemate/config.toml";

/// Ids a pod's containers have: 0..65536 inside.
pub const POD_IDS: u32 = 65536;

/// The node's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How much is asked of a workload.
    pub profile: Profile,
    /// Host ids that pods get.
    pub ids: Ids,
    /// How sandboxes are made, and what they may share with the host.
    pub sandbox: Sandbox,
    /// What to do without when the kernel or the node lacks it.
    pub fallback: Fallback,
    /// The most that the policy grants.
    pub capabilities: Capabilities,
    /// Devices of the node that containers may have.
    pub devices: Devices,
    /// Programs of the node that a specification may have run.
    pub hooks: Hooks,
    /// Binds of the host's files.
    pub volumes: Volumes,
    /// Networks of pods.
    pub network: Network,
    /// Volumes with secrets, and core dumps.
    pub secrets: Secrets,
    /// Which of the kernel's ways to take.
    pub kernel: Kernel,
    /// The shim's own log.
    pub log: Log,
    /// What annotations of pods may do.
    pub annotations: Annotations,
    /// What becomes of execs.
    pub exec: Exec,
    /// Which of the node's files may be mounted.
    pub host_paths: HostPaths,
    /// Which images may run.
    pub images: Images,
    /// Sysctls that a pod may set beside the safe ones.
    pub sysctls: Sysctls,
    /// What becomes of calls that a profile refuses.
    pub broker: Broker,
    /// Recordings of what pods do.
    pub learn: Learn,
    /// Profiles that the node has beside the shipped ones.
    pub profiles: Profiles,
}

/// Which of the kernel's ways to take, where it has several.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kernel {
    /// Take the ways that kernels before 6.17 need on newer ones too. As
    /// strict, and slower: for tests, and against a bug in the newer ways.
    pub older_ways: bool,
}

/// Binds of the host's files.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Volumes {
    /// What to do where the kernel can't map ids.
    pub without_idmap: WithoutIdmap,
}

/// What becomes of a volume whose file system can't map ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutIdmap {
    /// It is refused.
    Refuse,
    /// Read-only ones, and those in memory, are shown as they are.
    #[default]
    ReadOnly,
    /// All are shown as they are.
    PassThrough,
}

/// How much is asked of a workload; the tightest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// As `default`, with less of the kernel.
    Strict,
    /// no_new_privs always.
    #[default]
    Default,
    /// Honours `allowPrivilegeEscalation`.
    Compat,
}

impl Profile {
    /// As the configuration has it, and of the filter that comes with it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Default => "default",
            Self::Compat => "compat",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        [Self::Strict, Self::Default, Self::Compat]
            .into_iter()
            .find(|p| p.name() == name)
    }

    /// Whether no_new_privs is set whatever the specification says.
    #[must_use]
    pub fn forces_no_new_privs(self) -> bool {
        self != Self::Compat
    }
}

/// Host ids that pods get: `count` ranges, `size` apart, from `base`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ids {
    /// First id of the first range.
    pub base: u32,
    /// How many ranges: the most pods at a time.
    pub count: u32,
    /// From one range to the next. A pod uses one id for its agent and 65536
    /// for its containers.
    pub size: u32,
}

impl Default for Ids {
    fn default() -> Self {
        // Above what kubelet hands out by default (from 65536, 110 pods) and
        // what subuid(5) tools give to users (from 100000 or 524288).
        Self {
            base: 0x7000_0000,
            count: 2048,
            size: 131_072,
        }
    }
}

/// How sandboxes are made, and what they may share with the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sandbox {
    /// `hostNetwork: true` is accepted.
    pub allow_host_network: bool,
    /// containerd may make pods by its sandbox API (`sandboxer = "shim"`).
    pub api: bool,
    /// The agent's binary; unset is `casemate-agent` beside the shim's.
    pub agent_path: Option<PathBuf>,
}

impl Sandbox {
    /// The agent's binary, for a shim at `shim`.
    #[must_use]
    pub fn agent_path(&self, shim: &Path) -> PathBuf {
        self.agent_path
            .clone()
            .unwrap_or_else(|| shim.with_file_name("casemate-agent"))
    }
}

/// What to do without when the kernel or the node lacks it. Everything else
/// that is lacking makes a pod fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fallback {
    /// Start without Landlock where the kernel has none.
    pub without_landlock: bool,
    /// Where the node's root may not lower oom_score_adj, use the lowest
    /// value it may, and warn.
    pub without_oom_score_adj: bool,
}

impl Default for Fallback {
    fn default() -> Self {
        Self {
            without_landlock: false,
            without_oom_score_adj: true,
        }
    }
}

/// The most that the policy grants, whatever a specification asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capabilities {
    /// The list, as a mask.
    #[serde(serialize_with = "write_mask", deserialize_with = "read_mask")]
    pub allow: u64,
    /// What becomes of a specification that asks for more.
    pub beyond: Beyond,
}

/// What becomes of capabilities that are asked for and not granted, those aside
/// that container engines write into every specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Beyond {
    /// The container doesn't start.
    #[default]
    Refuse,
    /// It starts without them.
    Drop,
}

/// What container engines grant to everybody, but for the default of `allow`.
const ENGINES_MORE: [&str; 4] = ["CAP_NET_RAW", "CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP"];

/// What container engines grant to everybody.
pub(crate) fn engine_capabilities() -> u64 {
    let names = DEFAULT_CAPS.iter().chain(&ENGINES_MORE);
    names
        .filter_map(|n| caps::number(n))
        .fold(0, |m, n| m | 1 << n)
}

/// The fourteen that container engines grant, without those that open kernel
/// code to a workload that seldom needs it: `NET_RAW` (packet sockets),
/// `MKNOD`, `AUDIT_WRITE` and `SETFCAP`.
const DEFAULT_CAPS: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
];

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            allow: DEFAULT_CAPS
                .iter()
                .filter_map(|n| caps::number(n))
                .fold(0, |m, n| m | 1 << n),
            beyond: Beyond::default(),
        }
    }
}

fn read_mask<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
    let mut mask = 0;
    for name in Vec::<String>::deserialize(input)? {
        let Some(n) = caps::number(&name) else {
            return Err(serde::de::Error::custom(format!(
                "{} is not a capability; use names as in capabilities(7), such as CAP_CHOWN",
                one_line(&name)
            )));
        };
        mask |= 1 << n;
    }
    Ok(mask)
}

fn write_mask<S: Serializer>(mask: &u64, output: S) -> Result<S::Ok, S::Error> {
    output.collect_seq(caps::names(*mask))
}

/// Devices of the node that containers may have, beside the default ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Devices {
    /// Their paths on the node.
    pub allow: Vec<String>,
}

/// Programs of the node that a specification may have run as OCI hooks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    /// Paths on the node; one that ends with `/` stands for all below it.
    pub allow: Vec<String>,
    /// The most seconds that one may take.
    pub timeout: u32,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            timeout: 30,
        }
    }
}

impl Hooks {
    /// Whether the program at the plain path `path` may be run.
    #[must_use]
    pub fn allows(&self, path: &str) -> bool {
        self.allow
            .iter()
            .any(|a| a == path || (a.ends_with('/') && path.starts_with(a.as_str())))
    }
}

/// The shim's own log.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// The least severe that is written.
    pub level: Level,
}

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// What may surprise.
    Warn,
    /// Steps of a pod's life.
    #[default]
    Info,
    /// Each request.
    Debug,
    /// Everything.
    Trace,
}

impl Config {
    /// Reads `path`, then `config.d/*.toml` beside it in order of name; a
    /// later file wins, key by key. Files that don't exist are empty.
    ///
    /// # Errors
    /// A file that can't be read, isn't TOML, has a key that doesn't exist or
    /// a value that makes no sense.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut merged = match fs::read_to_string(path) {
            Ok(text) => table(path, &text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => toml::Table::new(),
            Err(e) => return Err(unreadable(path, &e)),
        };
        for path in drop_ins(&path.with_file_name("config.d"))? {
            let text = fs::read_to_string(&path).map_err(|e| unreadable(&path, &e))?;
            merge(&mut merged, table(&path, &text)?);
        }
        let config = typed(path, merged)?;
        config.check()?;
        Ok(config)
    }

    /// As [`Config::read`], of one text; `path` is for messages.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config = typed(path, table(path, text)?)?;
        config.check()?;
        Ok(config)
    }

    /// Whether the values make sense together.
    ///
    /// # Errors
    /// The first that doesn't.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Ids { base, count, size } = self.ids;
        let invalid = |field, value: u32, reason: String| {
            Err(ConfigError::Invalid {
                field,
                value: value.to_string(),
                reason,
            })
        };
        if base < POD_IDS {
            return invalid(
                "ids.base",
                base,
                format!(
                    "overlaps the host's own ids, which are below {POD_IDS}; use {} or more",
                    POD_IDS
                ),
            );
        }
        if count == 0 {
            return invalid(
                "ids.count",
                count,
                "no pod could start; use 1 or more".into(),
            );
        }
        if size <= POD_IDS {
            return invalid(
                "ids.size",
                size,
                format!(
                    "a pod needs {} ids, one of them for its agent; use that or more",
                    POD_IDS + 1
                ),
            );
        }
        // The last id, 2^32-1, means "no id" to the kernel (chown(2)).
        let end = u64::from(base) + u64::from(count) * u64::from(size);
        if end > u64::from(u32::MAX) {
            let most = (u64::from(u32::MAX) - u64::from(base)) / u64::from(size);
            return invalid(
                "ids.count",
                count,
                format!(
                    "ids.base + ids.count * ids.size = {end} is beyond 32 bits; use {most} or less"
                ),
            );
        }
        let kubelet = vec![self.host_paths.kubelet.clone()];
        let learned = vec![self.learn.directory.display().to_string()];
        let lists = [
            ("learn.directory", &learned),
            ("host_paths.kubelet", &kubelet),
            ("devices.allow", &self.devices.allow),
            ("hooks.allow", &self.hooks.allow),
            ("host_paths.allow", &self.host_paths.allow),
            ("host_paths.deny", &self.host_paths.deny),
            ("host_paths.read_only", &self.host_paths.read_only),
        ];
        for (field, list) in lists {
            for path in list {
                // A directory's own / aside, it must be the path itself.
                let plain = plain_absolute(path).unwrap_or_default();
                let bare = path.strip_suffix('/').unwrap_or(path);
                let directory = bare.len() != path.len();
                if plain != bare || bare.is_empty() || (directory && field != "hooks.allow") {
                    return Err(ConfigError::Invalid {
                        field,
                        value: one_line(path),
                        reason: "not a plain absolute path; write it whole, without . and .."
                            .into(),
                    });
                }
            }
        }
        self.network.check()?;
        self.profiles.check()?;
        if !(1..=3600).contains(&self.hooks.timeout) {
            return invalid(
                "hooks.timeout",
                self.hooks.timeout,
                "not within 1 and 3600 seconds".into(),
            );
        }
        match &self.sandbox.agent_path {
            Some(path) if !path.is_absolute() => Err(ConfigError::Invalid {
                field: "sandbox.agent_path",
                value: one_line(&path.display().to_string()),
                reason: "not an absolute path; start it with /".into(),
            }),
            _ => Ok(()),
        }
    }
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(dir, &e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| unreadable(dir, &e))?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn unreadable(path: &Path, error: &io::Error) -> ConfigError {
    ConfigError::Read {
        path: one_line(&path.display().to_string()),
        reason: error.to_string(),
    }
}

/// The table in `text`, checked alone so that an error names its own file.
fn table(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    let table: toml::Table = toml::from_str(text).map_err(|e: toml::de::Error| {
        let before = e
            .span()
            .and_then(|s| text.get(..s.start))
            .unwrap_or_default();
        ConfigError::Parse {
            path: one_line(&path.display().to_string()),
            field: format!("line {}", before.matches('\n').count() + 1),
            reason: one_line(e.message()),
        }
    })?;
    typed(path, table.clone())?;
    Ok(table)
}

fn typed(path: &Path, table: toml::Table) -> Result<Config, ConfigError> {
    serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|e| ConfigError::Parse {
        path: one_line(&path.display().to_string()),
        field: one_line(&e.path().to_string()),
        // The list of names that exist is the way out: not cut.
        reason: e.inner().message().replace('\n', " "),
    })
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}
