//! What a configuration comes to, as `containerd config dump` says, and what a
//! change of ours may change in it: the one handler, and nothing else.

use std::collections::BTreeMap;

use toml_edit::{DocumentMut, Item, Table, TableLike, Value};

use crate::error::{RunError, one_line};

/// Keys of the CRI plugin, newest first.
const CRI: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
/// Names that turn CRI off.
const CRI_NAMES: [&str; 4] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.runtime",
    "io.containerd.cri.v1.images",
    "cri",
];

/// A runtime handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// `runtime_type`.
    pub kind: String,
    /// `runtime_path`.
    pub path: String,
    /// `pod_annotations`.
    pub annotations: Vec<String>,
}

/// Handlers by name.
pub type Handlers = BTreeMap<String, Handler>;

/// The whole configuration.
pub struct Effective {
    doc: DocumentMut,
}

impl Effective {
    /// Reads what containerd has printed.
    pub fn parse(text: &str) -> Result<Self, RunError> {
        let doc = text.parse::<DocumentMut>().map_err(|error| {
            RunError::Refused(format!(
                "read containerd's config dump: {}",
                one_line(error.message())
            ))
        })?;
        Ok(Self { doc })
    }

    /// The version that this containerd writes.
    pub fn version(&self) -> i64 {
        self.doc
            .get("version")
            .and_then(Item::as_integer)
            .unwrap_or(1)
    }

    /// Whether CRI is off; by which name.
    pub fn without_cri(&self) -> Option<String> {
        let disabled = self.doc.get("disabled_plugins")?.as_array()?;
        disabled
            .iter()
            .filter_map(Value::as_str)
            .find(|name| CRI_NAMES.contains(name))
            .map(str::to_owned)
    }

    /// containerd's directory for what stays.
    pub fn root(&self) -> Option<&str> {
        self.doc.get("root")?.as_str()
    }

    /// The image that pods begin with.
    pub fn pause(&self) -> Option<&str> {
        let plugins = self.doc.get("plugins")?;
        let newer = plugins
            .get("io.containerd.cri.v1.images")
            .and_then(|images| images.get("pinned_images")?.get("sandbox"));
        let older = || {
            plugins
                .get("io.containerd.grpc.v1.cri")?
                .get("sandbox_image")
        };
        newer
            .or_else(older)?
            .as_str()
            .filter(|name| !name.is_empty())
    }

    /// Whether the handler has an `options` table with something in it.
    pub fn has_options(&self, name: &str) -> bool {
        self.runtimes()
            .and_then(|all| all.get(name)?.get("options")?.as_table_like())
            .is_some_and(|options| !options.is_empty())
    }

    fn runtimes(&self) -> Option<&dyn TableLike> {
        let plugins = self.doc.get("plugins")?;
        CRI.iter().find_map(|name| {
            plugins
                .get(name)?
                .get("containerd")?
                .get("runtimes")?
                .as_table_like()
        })
    }

    /// The handler of that name.
    pub fn handler(&self, name: &str) -> Option<Handler> {
        let table = self.runtimes()?.get(name)?;
        let text = |key: &str| {
            let value = table.get(key).and_then(Item::as_str);
            value.unwrap_or_default().to_owned()
        };
        Some(Handler {
            kind: text("runtime_type"),
            path: text("runtime_path"),
            annotations: table
                .get("pod_annotations")
                .and_then(Item::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Handlers that the other one doesn't have, whole.
    pub fn lost_in(&self, other: &Self) -> Vec<(String, Table)> {
        let kept = other.runtimes();
        self.runtimes()
            .into_iter()
            .flat_map(TableLike::iter)
            .filter(|(name, _)| kept.is_none_or(|kept| kept.get(name).is_none()))
            .filter_map(|(name, item)| Some((name.to_owned(), item.as_table()?.clone())))
            .collect()
    }

    /// Keys with different values here and there, apart from those handlers, from
    /// `imports` and from the file's version.
    pub fn differences(&self, other: &Self, handlers: &[String]) -> Vec<String> {
        let (here, there) = (self.flat(handlers), other.flat(handlers));
        let mut keys: Vec<&String> = here
            .iter()
            .filter(|(key, value)| there.get(*key) != Some(value))
            .map(|(key, _)| key)
            .chain(there.keys().filter(|key| !here.contains_key(*key)))
            .collect();
        keys.sort();
        keys.into_iter().cloned().collect()
    }

    fn flat(&self, handlers: &[String]) -> BTreeMap<String, String> {
        let mut flat = BTreeMap::new();
        flatten("", self.doc.as_table(), &mut flat);
        let ours: Vec<String> = handlers
            .iter()
            .map(|handler| format!(".containerd.runtimes.{handler}."))
            .collect();
        flat.retain(|key, _| {
            !ours.iter().any(|ours| key.contains(ours)) && key != "imports" && key != "version"
        });
        flat
    }
}

fn flatten(prefix: &str, table: &dyn TableLike, flat: &mut BTreeMap<String, String>) {
    for (key, item) in table.iter() {
        let name = if prefix.is_empty() {
            key.to_owned()
        } else {
            format!("{prefix}.{key}")
        };
        match item.as_table_like() {
            Some(inner) => flatten(&name, inner, flat),
            None => {
                flat.insert(name, item.to_string().trim().to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"
version = 2
imports = []
disabled_plugins = []
[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "a"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
"#;

    fn parse(text: &str) -> Effective {
        Effective::parse(text).unwrap()
    }

    #[test]
    fn another_handler_alone_is_no_difference() {
        let after = BEFORE.replace("imports = []", "imports = [\"x\"]")
            + "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.casemate]\n\
               runtime_type = \"io.containerd.casemate.v2\"\nruntime_path = \"/s\"\n\
               pod_annotations = [\"casemate.io/*\"]\n";
        let (before, after) = (parse(BEFORE), parse(&after));
        assert_eq!(
            before.differences(&after, &["casemate".to_owned()]),
            Vec::<String>::new()
        );
        assert!(before.lost_in(&after).is_empty());
        assert!(before.handler("casemate").is_none());
        let handler = after.handler("casemate").unwrap();
        assert_eq!(handler.path, "/s");
        assert_eq!(handler.annotations, ["casemate.io/*"]);
        // A handler whose name only begins so is somebody else's.
        assert!(!before.differences(&after, &["case".to_owned()]).is_empty());
    }

    #[test]
    fn what_else_is_changed_is_named() {
        let after = parse(&BEFORE.replace("\"a\"", "\"b\""));
        assert_eq!(
            parse(BEFORE).differences(&after, &["casemate".to_owned()]),
            ["plugins.io.containerd.grpc.v1.cri.sandbox_image"]
        );
    }

    #[test]
    fn a_lost_handler_is_found_with_all_it_had() {
        let after = parse("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.casemate]\n");
        let lost = parse(BEFORE).lost_in(&after);
        assert_eq!(lost.len(), 1);
        assert_eq!(lost[0].0, "runc");
        let option = &lost[0].1["options"]["SystemdCgroup"];
        assert_eq!(option.as_bool(), Some(true));
    }

    #[test]
    fn the_image_of_pods_is_found() {
        assert_eq!(parse(BEFORE).pause(), Some("a"));
        let newer = "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"b\"\n";
        assert_eq!(parse(newer).pause(), Some("b"));
        assert_eq!(parse("version = 3\n").pause(), None);
    }

    #[test]
    fn a_configuration_without_cri_is_seen() {
        let text = BEFORE.replace("disabled_plugins = []", "disabled_plugins = [\"cri\"]");
        assert_eq!(parse(&text).without_cri().as_deref(), Some("cri"));
        assert_eq!(parse(BEFORE).without_cri(), None);
    }
}
