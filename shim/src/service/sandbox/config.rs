//! The few fields of CRI's `runtime.v1.PodSandboxConfig` that make a pod, read
//! by hand: the whole schema is a hundred messages.
//!
//! Fields by number, as in Kubernetes' cri-api. One that isn't known is ignored
//! with a note, but not where it could be a limit or a hole: in the security
//! context and in the choice of namespaces it is refused.

use std::collections::BTreeMap;

use casemate_spec::annotations::PREFIX;
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;

use crate::error::ShimError;

/// What it is called in an `Any`.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// More of one kind than anybody has; a list grows with each byte of a request.
const MOST: usize = 4096;

/// CRI's enum `NamespaceMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The pod's own.
    #[default]
    Pod,
    /// One for each container.
    Container,
    /// The node's.
    Node,
}

/// One line of an id map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ids {
    /// First id on the host.
    pub host: u32,
    /// First id inside.
    pub inside: u32,
    /// How many.
    pub count: u32,
}

/// Maps of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Users {
    /// Of user ids.
    pub uids: Vec<Ids>,
    /// Of group ids.
    pub gids: Vec<Ids>,
}

/// `PodSandboxConfig`, cut down.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodConfig {
    /// `metadata`: name, uid, namespace.
    pub name: String,
    /// As above.
    pub uid: String,
    /// As above.
    pub namespace: String,
    /// `hostname`.
    pub hostname: String,
    /// `dns_config`: servers, searches, options.
    pub dns: [Vec<String>; 3],
    /// `annotations`, as far as they are ours.
    pub annotations: BTreeMap<String, String>,
    /// `linux.cgroup_parent`.
    pub cgroup_parent: String,
    /// `linux.sysctls`.
    pub sysctls: BTreeMap<String, String>,
    /// `namespace_options`.
    pub network: Mode,
    /// As above.
    pub pid: Mode,
    /// As above.
    pub ipc: Mode,
    /// `userns_options`, where its mode is `POD`.
    pub userns: Option<Users>,
    /// `selinux_options`: user, role, type, level.
    pub selinux: [String; 4],
    /// What was ignored, one line each.
    pub notes: Vec<String>,
}

/// Reads the options of a CreateSandbox. None: all of it is the default.
pub fn read(options: Option<&Any>) -> Result<PodConfig, ShimError> {
    let mut config = PodConfig::default();
    let Some(any) = options.filter(|any| !any.type_url.is_empty() || !any.value.is_empty()) else {
        return Ok(config);
    };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if name != TYPE {
        return Err(ShimError::InvalidArgument(format!(
            "CreateSandbox: options are {:?}; send {TYPE:?}, or none",
            any.type_url
        )));
    }
    pod(&any.value, &mut config).map_err(|why| {
        ShimError::InvalidArgument(format!("CreateSandbox: options ({TYPE}): {why}"))
    })?;
    Ok(config)
}

/// The value of one field.
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
    /// Of fixed size: CRI has none that count.
    Other,
}

impl Value {
    fn bytes(self, field: &str) -> Result<Vec<u8>, String> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(format!("{field} has the wrong type")),
        }
    }

    fn text(self, field: &str) -> Result<String, String> {
        String::from_utf8(self.bytes(field)?).map_err(|_| format!("{field} is not UTF-8"))
    }

    fn number(self, field: &str) -> Result<u32, String> {
        match self {
            Value::Number(number) => {
                u32::try_from(number).map_err(|_| format!("{field} is {number}, not 32 bits"))
            }
            _ => Err(format!("{field} has the wrong type")),
        }
    }

    fn mode(self, field: &str) -> Result<Mode, String> {
        match self.number(field)? {
            0 => Ok(Mode::Pod),
            1 => Ok(Mode::Container),
            2 => Ok(Mode::Node),
            other => Err(format!(
                "{field} is {other}; a pod can have POD (0), CONTAINER (1) or NODE (2)"
            )),
        }
    }
}

/// Calls `take` with each field of a message.
fn fields(
    what: &str,
    bytes: &[u8],
    mut take: impl FnMut(u32, Value) -> Result<(), String>,
) -> Result<(), String> {
    let broken = |error: protobuf::Error| format!("{what} is cut off or garbled: {error}");
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(broken)? {
        let (number, kind) = (tag >> 3, tag & 7);
        if number == 0 {
            return Err(format!("{what} is garbled: field 0"));
        }
        // Wire types of the encoding.
        let value = match kind {
            0 => Value::Number(input.read_raw_varint64().map_err(broken)?),
            1 => input.read_fixed64().map(|_| Value::Other).map_err(broken)?,
            2 => Value::Bytes(input.read_bytes().map_err(broken)?),
            5 => input.read_fixed32().map(|_| Value::Other).map_err(broken)?,
            other => return Err(format!("{what} is garbled: wire type {other}")),
        };
        take(number, value)?;
    }
    Ok(())
}

fn pod(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    fields("the message", bytes, |number, value| {
        match number {
            1 => metadata(&value.bytes("metadata")?, config)?,
            2 => config.hostname = value.text("hostname")?,
            4 => dns(&value.bytes("dns_config")?, config)?,
            8 => linux(&value.bytes("linux")?, config)?,
            9 => return Err("windows is set; this runtime has Linux pods only".to_owned()),
            7 => {
                let (key, to) = entry("annotations", &value.bytes("annotations")?)?;
                // Others are containerd's and CNI's; of ours each is told by name.
                if key.starts_with(PREFIX) {
                    if config.annotations.len() >= MOST {
                        return Err(format!("annotations has more than {MOST} of {PREFIX}"));
                    }
                    config.annotations.insert(key, to);
                }
            }
            // Logs, ports, labels: containerd's and CNI's.
            3 | 5 | 6 => {}
            other => config
                .notes
                .push(format!("field {other} is unknown; ignored")),
        }
        enough(config)
    })
}

fn enough(config: &PodConfig) -> Result<(), String> {
    if config.notes.len() > MOST {
        return Err(format!("more than {MOST} unknown fields"));
    }
    Ok(())
}

fn metadata(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    fields("metadata", bytes, |number, value| {
        match number {
            1 => config.name = value.text("metadata.name")?,
            2 => config.uid = value.text("metadata.uid")?,
            3 => config.namespace = value.text("metadata.namespace")?,
            _ => {}
        }
        Ok(())
    })
}

fn dns(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    fields("dns_config", bytes, |number, value| {
        let list = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
        let Some(list) = list.and_then(|n| config.dns.get_mut(n)) else {
            config
                .notes
                .push(format!("dns_config: field {number} is unknown; ignored"));
            return enough(config);
        };
        push(list, value.text("dns_config")?, "dns_config")
    })
}

fn push<T>(list: &mut Vec<T>, value: T, what: &str) -> Result<(), String> {
    if list.len() >= MOST {
        return Err(format!("{what} has more than {MOST} entries"));
    }
    list.push(value);
    Ok(())
}

fn linux(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    fields("linux", bytes, |number, value| {
        match number {
            1 => config.cgroup_parent = value.text("linux.cgroup_parent")?,
            2 => security(&value.bytes("linux.security_context")?, config)?,
            3 => {
                let (key, to) = entry("linux.sysctls", &value.bytes("linux.sysctls")?)?;
                if config.sysctls.len() >= MOST {
                    return Err(format!("linux.sysctls has more than {MOST} entries"));
                }
                config.sysctls.insert(key, to);
            }
            // Kubelet puts both into the pod's cgroup by itself.
            4 | 5 => {}
            other => config
                .notes
                .push(format!("linux: field {other} is unknown; ignored")),
        }
        enough(config)
    })
}

/// An entry of a map of texts.
fn entry(what: &str, bytes: &[u8]) -> Result<(String, String), String> {
    let (mut key, mut to) = (String::new(), String::new());
    fields(what, bytes, |number, value| {
        match number {
            1 => key = value.text(what)?,
            2 => to = value.text(what)?,
            other => return Err(format!("{what} is garbled: field {other} of an entry")),
        }
        Ok(())
    })?;
    Ok((key, to))
}

fn security(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    let what = "linux.security_context";
    fields(what, bytes, |number, value| {
        match number {
            1 => namespaces(&value.bytes("namespace_options")?, config)?,
            2 => selinux(&value.bytes("selinux_options")?, config)?,
            6 if value.number("privileged")? != 0 => config.notes.push(
                "privileged: the sandbox is made all the same; a container that asks for it \
                 is refused"
                    .to_owned(),
            ),
            // User, groups, rootfs and profiles of a pause process: there is none.
            3..=11 => {}
            other => {
                return Err(format!(
                    "{what}: field {other} is not known to this version; leave it unset"
                ));
            }
        }
        Ok(())
    })
}

fn namespaces(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    let what = "namespace_options";
    fields(what, bytes, |number, value| {
        match number {
            1 => config.network = value.mode("namespace_options.network")?,
            2 => config.pid = value.mode("namespace_options.pid")?,
            3 => config.ipc = value.mode("namespace_options.ipc")?,
            4 => {
                let target = value.text("namespace_options.target_id")?;
                if !target.is_empty() {
                    return Err(format!(
                        "namespace_options.target_id is {target:?}; only a container can have one"
                    ));
                }
            }
            5 => config.userns = userns(&value.bytes("userns_options")?)?,
            other => {
                return Err(format!(
                    "{what}: field {other} is not known to this version; leave it unset"
                ));
            }
        }
        Ok(())
    })
}

fn userns(bytes: &[u8]) -> Result<Option<Users>, String> {
    let what = "userns_options";
    let (mut mode, mut users) = (Mode::Pod, Users::default());
    fields(what, bytes, |number, value| match number {
        1 => {
            mode = value.mode("userns_options.mode")?;
            Ok(())
        }
        2 => push(
            &mut users.uids,
            ids(&value.bytes(what)?)?,
            "userns_options.uids",
        ),
        3 => push(
            &mut users.gids,
            ids(&value.bytes(what)?)?,
            "userns_options.gids",
        ),
        other => Err(format!(
            "{what}: field {other} is not known to this version; leave it unset"
        )),
    })?;
    match mode {
        Mode::Pod => Ok(Some(users)),
        Mode::Node => Ok(None),
        Mode::Container => Err("userns_options.mode is CONTAINER; it can be POD or NODE".into()),
    }
}

fn ids(bytes: &[u8]) -> Result<Ids, String> {
    let mut ids = Ids::default();
    fields("userns_options", bytes, |number, value| {
        let number_of = |value: Value| value.number("userns_options");
        match number {
            1 => ids.host = number_of(value)?,
            2 => ids.inside = number_of(value)?,
            3 => ids.count = number_of(value)?,
            other => return Err(format!("userns_options: field {other} of a map is unknown")),
        }
        Ok(())
    })?;
    Ok(ids)
}

fn selinux(bytes: &[u8], config: &mut PodConfig) -> Result<(), String> {
    fields("selinux_options", bytes, |number, value| {
        let part = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
        match part.and_then(|n| config.selinux.get_mut(n)) {
            Some(part) => *part = value.text("selinux_options")?,
            None => return Err(format!("selinux_options: field {number} is unknown")),
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field with a length: below 128 bytes all of it is one byte each.
    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, u8::try_from(value.len()).unwrap()];
        bytes.extend(value);
        bytes
    }

    fn number(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    fn options(value: Vec<u8>) -> Any {
        Any {
            type_url: TYPE.into(),
            value,
            ..Any::default()
        }
    }

    fn with_namespaces(inner: Vec<u8>) -> Any {
        options(field(8, &field(2, &field(1, &inner))))
    }

    #[test]
    fn the_fields_that_make_a_pod_are_read() {
        let sysctl = [field(1, b"net.a"), field(2, b"1")].concat();
        let map = [number(1, 100), number(3, 9)].concat();
        let userns = field(5, &[field(2, &map), field(3, &map)].concat());
        let namespaces = [number(1, 2), number(2, 1), number(3, 2), userns].concat();
        let linux = [
            field(1, b"/pods/a"),
            field(2, &field(1, &namespaces)),
            field(3, &sysctl),
        ]
        .concat();
        let dns = [field(1, b"10.0.0.1"), field(2, b"a.b"), field(3, b"x")].concat();
        let bytes = [
            field(
                1,
                &[field(1, b"n"), field(2, b"u"), field(3, b"s")].concat(),
            ),
            field(2, b"host"),
            field(4, &dns),
            field(6, b""),
            field(8, &linux),
            field(15, b"new"),
        ];
        let config = read(Some(&options(bytes.concat()))).unwrap();
        assert_eq!(
            (&*config.name, &*config.uid, &*config.namespace),
            ("n", "u", "s")
        );
        assert_eq!(config.hostname, "host");
        assert_eq!(config.dns.concat(), ["10.0.0.1", "a.b", "x"]);
        assert_eq!(config.cgroup_parent, "/pods/a");
        assert_eq!(config.sysctls["net.a"], "1");
        assert_eq!(
            (config.network, config.pid, config.ipc),
            (Mode::Node, Mode::Container, Mode::Node)
        );
        let ids = vec![Ids {
            host: 100,
            inside: 0,
            count: 9,
        }];
        let users = Users {
            uids: ids.clone(),
            gids: ids,
        };
        assert_eq!(config.userns, Some(users));
        assert_eq!(config.notes, ["field 15 is unknown; ignored"]);
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(read(None).unwrap(), PodConfig::default());
        assert_eq!(read(Some(&Any::default())).unwrap(), PodConfig::default());
    }

    #[test]
    fn what_could_be_a_hole_is_refused_by_name() {
        for (options, part) in [
            (with_namespaces(number(1, 3)), "namespace_options.network"),
            (with_namespaces(number(6, 1)), "field 6"),
            (with_namespaces(field(4, b"c")), "target_id"),
            (with_namespaces(field(5, &number(1, 1))), "userns_options"),
            (options(field(8, &field(2, &number(12, 1)))), "field 12"),
            (options(field(9, b"")), "windows"),
            (options(field(2, b"\xff")), "hostname is not UTF-8"),
            (options(vec![0x12]), "cut off"),
            (options(vec![0x12, 0x7f, 1]), "cut off"),
            (options(vec![0x0b]), "wire type 3"),
            (options(number(2, 1)), "hostname has the wrong type"),
        ] {
            let error = read(Some(&options)).unwrap_err().to_string();
            assert!(error.contains(part), "{error}; want {part}");
        }
        let other = Any {
            type_url: "x.Y".into(),
            ..Any::default()
        };
        let error = read(Some(&other)).unwrap_err().to_string();
        assert!(error.contains("\"x.Y\""), "{error}");
    }

    #[test]
    fn any_bytes_are_an_answer() {
        // A cheap stand-in for a fuzzer: every byte of a real message changed.
        let whole = with_namespaces([number(1, 2), field(5, &number(1, 2))].concat()).value;
        for place in 0..whole.len() {
            for byte in 0..=255u8 {
                let mut bytes = whole.clone();
                bytes[place] = byte;
                let _either = read(Some(&options(bytes)));
            }
        }
    }
}
