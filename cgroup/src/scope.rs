//! `slice:prefix:name`: the form of `linux.cgroupsPath` that asks for a scope of
//! systemd's, and where such a scope lies.

use std::path::PathBuf;

use crate::error::CgroupError;

/// The longest name of a unit (systemd.unit(5)).
const UNIT_NAME_MAX: usize = 255;
/// What systemd takes where none is named.
const DEFAULT_SLICE: &str = "system.slice";

/// A scope unit (systemd.scope(5)) and the slice that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    slice: String,
    unit: String,
}

impl Scope {
    /// The scope that `path` (a value of `linux.cgroupsPath`) asks for, `None`
    /// if it is a plain path. An empty slice is `system.slice`; with an empty
    /// prefix the scope is `name.scope`, else `prefix-name.scope`.
    pub fn parse(path: &str) -> Result<Option<Scope>, CgroupError> {
        let mut parts = path.split(':');
        let (Some(slice), Some(prefix), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Ok(None);
        };
        if slice.contains('/') {
            return Ok(None);
        }
        let slice = if slice.is_empty() {
            DEFAULT_SLICE
        } else {
            slice
        };
        let refuse = |reason| CgroupError::Path {
            path: path.to_owned(),
            reason,
        };
        if name.is_empty() {
            return Err(refuse("has the form slice:prefix:name, but no name"));
        }
        let unit = if prefix.is_empty() {
            format!("{name}.scope")
        } else {
            format!("{prefix}-{name}.scope")
        };
        Scope::named(slice, &unit).map(Some).map_err(refuse)
    }

    /// The scope with these names, as [`Scope::slice`] and [`Scope::unit`] gave them.
    pub fn named(slice: &str, unit: &str) -> Result<Scope, &'static str> {
        for name in [slice, unit] {
            if name.len() > UNIT_NAME_MAX {
                return Err("makes a unit name of over 255 bytes");
            }
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:\\".contains(&b);
            if !name.bytes().all(plain) {
                return Err("has a character that no unit name has: use letters, digits and -_.\\");
            }
        }
        let stem = slice
            .strip_suffix(".slice")
            .ok_or("has the form slice:prefix:name, but its slice does not end in .slice")?;
        if stem != "-" && stem.split('-').any(str::is_empty) {
            return Err("names no slice: a dash separates two levels, both with a name");
        }
        match unit.strip_suffix(".scope") {
            // Directories and interface files share one name space.
            Some(stem) if !stem.starts_with("cgroup.") && !stem.is_empty() => {}
            _ => return Err("names no scope"),
        }
        Ok(Scope {
            slice: slice.to_owned(),
            unit: unit.to_owned(),
        })
    }

    /// The slice's name.
    pub fn slice(&self) -> &str {
        &self.slice
    }

    /// The scope's name.
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// Where the scope lies below the root of a hierarchy: `a-b.slice` is inside
    /// of `a.slice` (systemd.slice(5)).
    pub fn path(&self) -> PathBuf {
        let mut path = PathBuf::new();
        let stem = self.slice.trim_end_matches(".slice");
        if stem != "-" {
            let dashes = stem.match_indices('-').map(|(at, _)| at);
            for end in dashes.chain([stem.len()]) {
                path.push(format!("{}.slice", stem.get(..end).unwrap_or_default()));
            }
        }
        path.push(&self.unit);
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn path(text: &str) -> PathBuf {
        Scope::parse(text).unwrap().unwrap().path()
    }

    #[test]
    fn a_slice_is_inside_of_those_that_its_name_begins_with() {
        assert_eq!(
            path("kubepods-burstable-pod1_2.slice:cri-containerd:abc"),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope"
            )
        );
        assert_eq!(path("a.slice:x:y"), Path::new("a.slice/x-y.scope"));
        assert_eq!(path(":x:y"), Path::new("system.slice/x-y.scope"));
        assert_eq!(path("-.slice::y"), Path::new("y.scope"));
    }

    #[test]
    fn other_forms_are_plain_paths() {
        for plain in ["/a:b:c", "/k8s/cri-containerd:abc", "a:b", "a:b:c:d", "a"] {
            assert_eq!(Scope::parse(plain).unwrap(), None, "{plain}");
        }
    }

    #[test]
    fn what_systemd_would_not_take_is_refused_by_reason() {
        for (bad, part) in [
            ("a:b:c", ".slice"),
            ("a.slice:b:", "no name"),
            ("a--b.slice:b:c", "dash"),
            ("-a.slice:b:c", "dash"),
            ("a-.slice:b:c", "dash"),
            (".slice:b:c", "dash"),
            ("a.slice:b:c/d", "character"),
            ("a.slice:b:..\n", "character"),
            ("a.slice:b:c@d", "character"),
            ("a.slice::cgroup.procs", "no scope"),
        ] {
            let error = Scope::parse(bad).unwrap_err().to_string();
            assert!(error.contains(part), "{bad}: {error}");
        }
        assert!(Scope::parse(&format!("a.slice:b:{}", "c".repeat(260))).is_err());
    }
}
