//! The command line as containerd writes it: Go `flag` style, one dash,
//! `-name value` or `-name=value`, bare booleans, then one action.

/// What the first word after the flags asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make or find the pod's shim and print its address.
    Start,
    /// Clean up after a container or a pod.
    Delete,
    /// The server itself; only `start` runs this, with the listening socket
    /// as descriptor 0 and the readiness pipe as descriptor 1.
    Serve,
}

/// The flags of every action.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-v`: print name and version.
    pub version: bool,
    /// `-info`: print `RuntimeInfo`.
    pub info: bool,
    /// `-debug`: log at debug level.
    pub debug: bool,
    /// `-namespace`: containerd namespace.
    pub namespace: String,
    /// `-address`: containerd's gRPC address; may be empty.
    pub address: String,
    /// `-publish-binary`: unused, events go over ttrpc.
    pub publish_binary: String,
    /// `-id`: container or pod id.
    pub id: String,
    /// `-bundle`: bundle path (`delete`).
    pub bundle: String,
    /// `-socket`: path of the listening socket (`serve`).
    pub socket: String,
    /// `-events`: ttrpc address for events (`serve`).
    pub events: String,
    /// `-class`: name of the pod's class (`serve`).
    pub class: String,
    /// What to do.
    pub action: Option<Action>,
}

/// A command line that can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagsError {
    /// No such flag.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// A flag at the end without its value.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// A boolean flag with something else behind `=`.
    #[error("invalid boolean value {value:?} for -{flag}: use true or false")]
    NotBool {
        /// Flag name.
        flag: String,
        /// What was given.
        value: String,
    },
    /// No such action.
    #[error("unknown action {0:?}: use start or delete")]
    Action(String),
    /// The action can't do without this flag.
    #[error("-{0} is required: containerd always passes it")]
    Missing(&'static str),
}

impl Flags {
    /// Parses everything behind the program's name.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Flags, FlagsError> {
        let mut flags = Flags::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix('-').filter(|name| !name.is_empty()) else {
                flags.action = Some(Action::parse(&arg)?);
                break;
            };
            if name == "-" {
                if let Some(word) = args.next() {
                    flags.action = Some(Action::parse(&word)?);
                }
                break;
            }
            let name = name.strip_prefix('-').unwrap_or(name);
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = boolean(name, value)?;
            } else if let Some(text) = flags.text(name) {
                *text = value
                    .or_else(|| args.next())
                    .ok_or_else(|| FlagsError::NoValue(name.to_owned()))?;
            } else {
                return Err(FlagsError::Unknown(name.to_owned()));
            }
        }
        Ok(flags)
    }

    /// Checks what every action needs.
    pub fn require(&self) -> Result<(), FlagsError> {
        if self.namespace.is_empty() {
            return Err(FlagsError::Missing("namespace"));
        }
        if self.id.is_empty() {
            return Err(FlagsError::Missing("id"));
        }
        Ok(())
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "v" | "version" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            "debug" => Some(&mut self.debug),
            _ => None,
        }
    }

    fn text(&mut self, name: &str) -> Option<&mut String> {
        match name {
            "namespace" => Some(&mut self.namespace),
            "address" => Some(&mut self.address),
            "publish-binary" => Some(&mut self.publish_binary),
            "id" => Some(&mut self.id),
            "bundle" => Some(&mut self.bundle),
            "socket" => Some(&mut self.socket),
            "events" => Some(&mut self.events),
            "class" => Some(&mut self.class),
            _ => None,
        }
    }
}

impl Action {
    fn parse(word: &str) -> Result<Action, FlagsError> {
        match word {
            "start" => Ok(Action::Start),
            "delete" => Ok(Action::Delete),
            "serve" => Ok(Action::Serve),
            _ => Err(FlagsError::Action(word.to_owned())),
        }
    }
}

fn boolean(flag: &str, value: Option<String>) -> Result<bool, FlagsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(FlagsError::NotBool {
            flag: flag.to_owned(),
            value: other.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagsError> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_lines_that_containerd_runs_are_understood() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(start.action, Some(Action::Start));
        assert_eq!(start.namespace, "k8s.io");
        assert_eq!(start.address, "/run/containerd/containerd.sock");
        assert_eq!(start.id, "abc");
        assert!(start.debug);
        let delete = parse("-namespace=n --id=a -bundle /b delete").unwrap();
        assert_eq!(delete.action, Some(Action::Delete));
        assert_eq!(delete.bundle, "/b");
        assert!(parse("-info").unwrap().info);
        assert!(parse("-v").unwrap().version);
        assert!(!parse("-debug=false start").unwrap().debug);
    }

    #[test]
    fn an_empty_value_is_a_value() {
        let args = ["-namespace", "n", "-address", "", "-id", "a", "start"];
        let flags = Flags::parse(args.map(str::to_owned)).unwrap();
        assert_eq!(flags.address, "");
        assert_eq!(flags.action, Some(Action::Start));
    }

    #[test]
    fn nonsense_is_named() {
        assert_eq!(parse("-x start"), Err(FlagsError::Unknown("x".into())));
        assert_eq!(parse("-id"), Err(FlagsError::NoValue("id".into())));
        assert_eq!(parse("run"), Err(FlagsError::Action("run".into())));
        assert!(matches!(
            parse("-debug=maybe start"),
            Err(FlagsError::NotBool { .. })
        ));
        let missing = parse("-id a start").unwrap().require();
        assert_eq!(missing, Err(FlagsError::Missing("namespace")));
        let missing = parse("-namespace a start").unwrap().require();
        assert_eq!(missing, Err(FlagsError::Missing("id")));
    }
}
