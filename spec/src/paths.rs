//! Paths in a specification, before anybody resolves them.

/// `path` without doubled slashes, `.` and a trailing slash.
///
/// # Errors
/// When it is empty, relative, or has `..` or NUL in it: lexical removal of
/// `..` would be wrong beside symbolic links.
pub fn plain_absolute(path: &str) -> Result<String, &'static str> {
    if !path.starts_with('/') {
        return Err("not absolute");
    }
    plain(path).map(|rest| format!("/{rest}"))
}

/// As [`plain_absolute`], for a path that may be relative: without its
/// leading slash.
///
/// # Errors
/// When it has `..` or NUL in it, or is longer than `PATH_MAX`.
pub fn plain(path: &str) -> Result<String, &'static str> {
    if path.contains('\0') {
        return Err("has a NUL in it");
    }
    // PATH_MAX of linux/limits.h, with its NUL.
    if path.len() >= 4096 {
        return Err("longer than 4095 bytes");
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err("has .. in it"),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// Whether `path` is `dir` or below; both as [`plain_absolute`] returns them.
#[must_use]
pub fn within(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
