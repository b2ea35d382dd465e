//! The text of containerd's configuration, with and without a handler of ours.
//! Everything else in it stays as it is, comments and order included.

use std::path::{Component, Path, PathBuf};

use casemate_spec::Class;
use toml_edit::{Array, DocumentMut, Item, Key, Table, TableLike, Value, value};

use super::effective::{Handler, Handlers};
use crate::error::{RunError, one_line};

/// Annotations of pods that the shim is to see.
const ANNOTATIONS: &str = "casemate.io/*";
const MARK: &str = "# Made by `casemate install`; `casemate uninstall` takes it away.\n";
/// Around what is added to a template, which is no TOML.
const BEGIN: &str = "# begin: casemate install\n";
const END: &str = "# end: casemate install\n";

/// A class's handler as this release of containerd needs it.
pub fn handler(release: (u32, u32), class: Class, shim: &Path) -> Handler {
    Handler {
        // 2.0 to 2.2 ask only runtimes of runc's type what they can do, and would
        // refuse recursively read-only volumes to any other.
        kind: match release {
            (2, 0..=2) => "io.containerd.runc.v2".to_owned(),
            _ => kind(class),
        },
        path: shim.display().to_string(),
        annotations: vec![ANNOTATIONS.to_owned()],
    }
}

/// The runtime's name, of which containerd makes that of the program.
pub fn kind(class: Class) -> String {
    format!("io.containerd.casemate{}.v2", class.suffix())
}

/// A configuration file.
pub struct Config {
    doc: DocumentMut,
    /// For messages.
    path: PathBuf,
}

impl Config {
    /// Reads it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RunError> {
        let doc = text.parse::<DocumentMut>().map_err(|error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map_or(1, |before| before.matches('\n').count() + 1);
            RunError::Refused(format!(
                "read {}: line {line}: {}; mend it first",
                path.display(),
                one_line(error.message())
            ))
        })?;
        Ok(Self {
            doc,
            path: path.to_owned(),
        })
    }

    /// A new one, for a containerd that had none.
    pub fn new(version: i64, path: &Path) -> Self {
        let mut doc = DocumentMut::new();
        doc.insert("version", value(version));
        if let Some(mut key) = doc.key_mut("version") {
            key.leaf_decor_mut().set_prefix(MARK);
        }
        Self {
            doc,
            path: path.to_owned(),
        }
    }

    /// The text.
    pub fn text(&self) -> String {
        self.doc.to_string()
    }

    /// The version of the file: 1 where it says nothing.
    pub fn version(&self) -> i64 {
        let said = self.doc.get("version").and_then(Item::as_integer);
        said.filter(|version| *version > 0).unwrap_or(1)
    }

    /// The key that CRI's settings have here.
    fn plugin(&self) -> &'static str {
        let full = plugin(self.version());
        let has_full = self
            .doc
            .get("plugins")
            .is_some_and(|plugins| plugins.get(full).is_some());
        // Version 1 knows short names, too.
        if self.version() == 1 && !has_full {
            "cri"
        } else {
            full
        }
    }

    /// Adds the handlers, and those others.
    pub fn add(&mut self, handlers: &Handlers, others: &[(String, Table)]) -> Result<(), RunError> {
        let keys = ["plugins", self.plugin(), "containerd", "runtimes"];
        let mut place: &mut dyn TableLike = self.doc.as_table_mut();
        for key in keys {
            let item = place.entry(key).or_insert_with(|| {
                let mut table = Table::new();
                table.set_implicit(true);
                Item::Table(table)
            });
            place = item.as_table_like_mut().ok_or_else(|| {
                RunError::Refused(format!(
                    "edit {}: {key} is no table; mend it first",
                    self.path.display()
                ))
            })?;
        }
        for (name, table) in others {
            let mut table = table.clone();
            unplaced(&mut table);
            table.decor_mut().set_prefix(format!(
                "\n# containerd's default, which goes when there is another handler.\n{MARK}"
            ));
            place.insert(name, Item::Table(table));
        }
        for (name, handler) in handlers {
            place.insert(name, Item::Table(table(handler)));
        }
        Ok(())
    }

    /// Takes the handler away; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let keys = ["plugins", self.plugin(), "containerd", "runtimes"];
        let mut place: &mut dyn TableLike = self.doc.as_table_mut();
        for key in keys {
            match place.get_mut(key).and_then(Item::as_table_like_mut) {
                Some(inner) => place = inner,
                None => return false,
            }
        }
        place.remove(name).is_some()
    }

    fn imports(&self) -> impl Iterator<Item = &str> {
        let list = self.doc.get("imports").and_then(Item::as_array);
        list.into_iter().flatten().filter_map(Value::as_str)
    }

    /// Whether `file` is read through `imports`.
    pub fn reads(&self, file: &Path) -> bool {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        self.imports().any(|pattern| {
            let pattern = clean(&dir.join(pattern));
            pattern.parent() == file.parent()
                && matches(name(&pattern).as_bytes(), name(file).as_bytes())
        })
    }

    /// Adds to `imports`.
    pub fn import(&mut self, pattern: &str) -> Result<(), RunError> {
        let path = self.path.display().to_string();
        let item = self
            .doc
            .entry("imports")
            .or_insert_with(|| value(Array::new()));
        match item.as_array_mut() {
            Some(list) => list.push(pattern),
            None => {
                return Err(RunError::Refused(format!(
                    "edit {path}: imports is no list; mend it first"
                )));
            }
        }
        Ok(())
    }

    /// Takes from `imports`; whether it was there.
    pub fn unimport(&mut self, pattern: &str) -> bool {
        let Some(list) = self.doc.get_mut("imports").and_then(Item::as_array_mut) else {
            return false;
        };
        let before = list.len();
        list.retain(|entry| entry.as_str() != Some(pattern));
        let found = list.len() != before;
        if found && list.is_empty() {
            self.doc.remove("imports");
        }
        found
    }

    /// Without `imports`: what the file itself comes to.
    pub fn alone(mut self) -> String {
        self.doc.remove("imports");
        self.text()
    }

    /// The same from any directory: for a look at what containerd makes of it.
    pub fn detached(mut self) -> String {
        let dir = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        if let Some(list) = self.doc.get_mut("imports").and_then(Item::as_array_mut) {
            for entry in list.iter_mut() {
                if let Some(path) = entry.as_str() {
                    *entry = dir.join(path).display().to_string().into();
                }
            }
        }
        self.text()
    }
}

fn plugin(version: i64) -> &'static str {
    match version {
        ..=2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    }
}

/// Without position and indentation of the text that it comes from.
fn unplaced(table: &mut Table) {
    table.set_position(None);
    table.decor_mut().clear();
    for (mut key, item) in table.iter_mut() {
        key.leaf_decor_mut().clear();
        if let Some(inner) = item.as_table_mut() {
            unplaced(inner);
        }
    }
}

fn table(handler: &Handler) -> Table {
    let mut table = Table::new();
    table.decor_mut().set_prefix(format!("\n{MARK}"));
    table.insert("runtime_type", value(handler.kind.as_str()));
    table.insert("runtime_path", value(handler.path.as_str()));
    let annotations: Array = handler.annotations.iter().map(String::as_str).collect();
    table.insert("pod_annotations", value(annotations));
    table
}

/// A file of its own with the handlers, for a file of that version to import.
pub fn drop_in(version: i64, handlers: &Handlers) -> String {
    let version_line = match version {
        // Else it would be higher than that of a file that says none.
        1 => String::new(),
        version => format!("version = {version}\n\n"),
    };
    format!(
        "{MARK}{version_line}{}",
        sections(plugin(version), handlers)
    )
}

fn sections(plugin: &str, handlers: &Handlers) -> String {
    let plugin = Key::new(plugin);
    let sections: Vec<String> = handlers
        .iter()
        .map(|(name, handler)| {
            let mut table = table(handler);
            table.decor_mut().clear();
            format!(
                "[plugins.\"{}\".containerd.runtimes.{name}]\n{table}",
                plugin.get()
            )
        })
        .collect();
    sections.join("\n")
}

/// A template of k3s' or rke2's with the handlers: the given one, or their own.
pub fn template(text: Option<&str>, version: i64, handlers: &Handlers) -> String {
    let base = match text {
        Some(text) => untemplate(text),
        None => format!("{MARK}{{{{ template \"base\" . }}}}\n"),
    };
    let gap = if base.ends_with('\n') { "\n" } else { "\n\n" };
    format!(
        "{base}{gap}{BEGIN}{}{END}",
        sections(plugin(version), handlers)
    )
}

/// The template without what was added.
pub fn untemplate(text: &str) -> String {
    match (text.find(BEGIN), text.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            let before = text.get(..begin).unwrap_or_default();
            let after = text.get(end + END.len()..).unwrap_or_default();
            format!("{}{after}", before.strip_suffix('\n').unwrap_or(before))
        }
        _ => text.to_owned(),
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Without `.` and `..`, by the text alone, as containerd does it.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    clean
}

/// Whether the name fits a pattern with stars; other wildcards fit nothing.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            matches(rest, text) || text.split_first().is_some_and(|(_, t)| matches(pattern, t))
        }
        (Some((a, pattern)), Some((b, text))) => a == b && matches(pattern, text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Handlers {
        let shim = Path::new("/opt/casemate/current/bin/shim");
        let of = |class: Class| {
            let name = format!("casemate{}", class.suffix());
            (name, handler((1, 7), class, shim))
        };
        [of(Class::Node), of(Class::Strict)].into()
    }

    fn config(text: &str) -> Config {
        Config::parse(text, Path::new("/etc/containerd/config.toml")).unwrap()
    }

    #[test]
    fn only_what_is_added_changes() {
        let text = "# mine\nversion = 2 # two\n\n[plugins]\n  # cri\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    sandbox_image = 'x' # pause\n\n    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n      runtime_type = \"io.containerd.runc.v2\"\n\n[debug]\n  level = \"info\"\n# end\n";
        let mut with = config(text);
        with.add(&ours(), &[]).unwrap();
        let with = with.text();
        for line in text.lines() {
            assert!(with.contains(line), "{line} is gone from {with}");
        }
        let header = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.casemate]\n";
        assert!(with.contains(header), "{with}");
        let mut without = config(&with);
        assert!(without.remove("casemate") && without.remove("casemate-strict"));
        assert!(!without.remove("casemate"));
        assert_eq!(without.text(), text);
    }

    #[test]
    fn the_plugin_has_the_name_that_the_version_gives_it() {
        for (text, plugin) in [
            ("version = 3\n", "\"io.containerd.cri.v1.runtime\""),
            ("version = 2\n", "\"io.containerd.grpc.v1.cri\""),
            ("", "cri"),
            ("[plugins.cri]\nsandbox_image = 'x'\n", "cri"),
            (
                "[plugins.\"io.containerd.grpc.v1.cri\"]\nx = 1\n",
                "\"io.containerd.grpc.v1.cri\"",
            ),
        ] {
            let mut config = config(text);
            config.add(&ours(), &[]).unwrap();
            let with = config.text();
            let header = format!("[plugins.{plugin}.containerd.runtimes.casemate]");
            assert!(with.contains(&header), "{text}: {with}");
            assert!(config.remove("casemate") && config.remove("casemate-strict"));
            assert_eq!(config.text(), text);
        }
    }

    #[test]
    fn an_inline_table_takes_it_too() {
        let mut config = config(
            "version = 2\nplugins.\"io.containerd.grpc.v1.cri\" = {containerd = {runtimes = {}}}\n",
        );
        config.add(&ours(), &[]).unwrap();
        let again = config_of(&config.text());
        assert!(again.contains("runtime_path"), "{again}");
    }

    fn config_of(text: &str) -> String {
        config(text).text()
    }

    #[test]
    fn what_is_no_table_is_told() {
        let error = config("version = 2\nplugins = 3\n")
            .add(&ours(), &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("plugins is no table"), "{error}");
        let error = Config::parse("a = 1\nb = \n", Path::new("/c.toml"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.starts_with("read /c.toml: line 2: "), "{error}");
    }

    #[test]
    fn each_class_has_a_handler_of_its_own() {
        let text = drop_in(3, &ours());
        let read = text.parse::<DocumentMut>().unwrap();
        let runtimes = &read["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"];
        for (name, kind) in [
            ("casemate", "io.containerd.casemate.v2"),
            ("casemate-strict", "io.containerd.casemate-strict.v2"),
        ] {
            assert_eq!(
                runtimes[name]["runtime_type"].as_str(),
                Some(kind),
                "{text}"
            );
        }
        let shim = Path::new("/s");
        let kind = |release| handler(release, Class::Strict, shim).kind;
        assert_eq!(kind((2, 1)), "io.containerd.runc.v2");
        assert_eq!(kind((2, 3)), "io.containerd.casemate-strict.v2");
    }

    #[test]
    fn imports_grow_and_shrink_back() {
        for text in [
            "version = 2\n[debug]\n",
            "imports = [\"/a/*.toml\"]\nversion = 2\n",
            "imports = [\n  \"a.toml\", # one\n  \"b.toml\",\n]\nversion = 2\n",
        ] {
            let mut config = config(text);
            assert!(!config.reads(Path::new("/etc/containerd/conf.d/casemate.toml")));
            config
                .import("/etc/containerd/conf.d/casemate*.toml")
                .unwrap();
            let with = config.text();
            let mut again = self::config(&with);
            assert!(
                again.reads(Path::new("/etc/containerd/conf.d/casemate.toml")),
                "{with}"
            );
            assert!(again.unimport("/etc/containerd/conf.d/casemate*.toml"));
            assert_eq!(again.version(), 2, "{}", again.text());
        }
    }

    #[test]
    fn a_pattern_reads_what_containerd_would_read() {
        let file = Path::new("/etc/containerd/conf.d/casemate.toml");
        for (pattern, reads) in [
            ("/etc/containerd/conf.d/*.toml", true),
            ("conf.d/*.toml", true),
            ("./x/../conf.d/case*mate.t*", true),
            ("conf.d/casemate.toml", true),
            ("*.toml", false),
            ("/etc/containerd/conf.d/*.conf", false),
            ("/etc/containerd/conf.d/", false),
        ] {
            let config = config(&format!("imports = [\"{pattern}\"]\n"));
            assert_eq!(config.reads(file), reads, "{pattern}");
        }
    }

    #[test]
    fn a_template_gets_a_part_and_loses_it() {
        for text in [
            "{{ template \"base\" . }}\n",
            "{{ template \"base\" . }}\n[debug]\n  level = \"info\"",
        ] {
            let with = template(Some(text), 3, &ours());
            assert!(
                with.contains("cri.v1.runtime\".containerd.runtimes.casemate]\n"),
                "{with}"
            );
            assert_eq!(template(Some(&with), 3, &ours()), with);
            assert_eq!(untemplate(&with).trim_end(), text.trim_end());
        }
        assert!(template(None, 2, &ours()).contains("template \"base\""));
    }
}
