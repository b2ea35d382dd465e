//! The image of `runtimeclass/installer`: one static program, and nothing else.
//!
//! That is `casemate`, which carries the other two, as what decides, what acts and what an
//! operator types stay programs of their own on the node.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::layer::mode;
use super::{Image, Layer};
use crate::error::{Failure, Result, file};
use crate::run::run;

/// Its name where `runtimeclass/` and its chart are as they come.
#[must_use]
pub fn name() -> String {
    format!("casemate.invalid/casemate:{}", env!("CARGO_PKG_VERSION"))
}

/// What it is made of.
pub const PROGRAMS: [&str; 3] = ["casemate", "casemate-agent", "containerd-shim-casemate-v2"];

/// The image of the programs in this directory, with this time (seconds since the epoch)
/// on every file.
///
/// # Errors
/// A program can't be read, or needs libraries, which the image doesn't have.
pub fn image(programs: &Path, time: u64) -> Result<Image> {
    for program in PROGRAMS {
        let path = programs.join(program);
        let bytes = fs::read(&path).map_err(file("read", &path))?;
        if let Some(loader) = loader(&bytes) {
            return Err(Failure::Unexpected(format!(
                "{} is not static: it needs {loader}",
                path.display()
            )));
        }
    }
    let mut layer = Layer::default().at(time);
    layer.dir("bin", mode(0o755))?;
    layer.file("bin/casemate", mode(0o755), &whole(programs)?)?;
    Ok(Image {
        name: name(),
        layers: vec![layer.finish()?],
        entrypoint: vec!["/bin/casemate".to_owned()],
        cmd: vec!["--help".to_owned()],
    })
}

/// The `casemate` of this directory, carrying the programs beside it.
///
/// # Errors
/// It can't be run, or one is missing.
pub fn whole(programs: &Path) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir().map_err(file("make a directory in", Path::new("/tmp")))?;
    let made = dir.path().join("casemate");
    let mut carry = Command::new(programs.join("casemate"));
    carry.arg("carry").arg("--output").arg(&made);
    run(&mut carry, &[], Duration::from_secs(60))?.ok()?;
    fs::read(&made).map_err(file("read", &made))
}

/// The dynamic loader that an ELF program of 64 bits asks for (elf(5), `PT_INTERP`).
fn loader(program: &[u8]) -> Option<String> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = program.get(at..at.checked_add(size)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0_u64, |n, b| n << 8 | u64::from(*b));
        usize::try_from(value).ok()
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|index| {
        let entry = table.checked_add(index.checked_mul(size)?)?;
        if number(entry, 4)? != 3 {
            return None;
        }
        let (from, length) = (number(entry + 8, 8)?, number(entry + 32, 8)?);
        let text = program.get(from..from.checked_add(length)?)?;
        Some(
            String::from_utf8_lossy(text)
                .trim_end_matches('\0')
                .to_owned(),
        )
    })
}

/// Writes the image as an OCI layout, in place of what is there; the digest of its
/// manifest.
///
/// # Errors
/// A file can't be written.
pub fn write(image: &Image, to: &Path) -> Result<String> {
    if to.exists() {
        if !to.join("oci-layout").is_file() {
            return Err(Failure::Unexpected(format!(
                "{} is there, and is no image layout: it is not replaced",
                to.display()
            )));
        }
        fs::remove_dir_all(to).map_err(file("remove", to))?;
    }
    let files = image.layout()?;
    for (path, data) in &files {
        let path = to.join(path);
        let dir = path.parent().unwrap_or(to);
        fs::create_dir_all(dir).map_err(file("make", dir))?;
        fs::write(&path, data).map_err(file("write", &path))?;
    }
    let index = files.get("index.json").map_or(&[][..], Vec::as_slice);
    let index: serde_json::Value = serde_json::from_slice(index)
        .map_err(|error| Failure::Unexpected(format!("index of the image: {error}")))?;
    let digest = index["manifests"][0]["digest"].as_str();
    Ok(digest.unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_go_in() {
        // This very test is linked as all our programs are.
        let own = fs::read("/proc/self/exe").unwrap();
        assert_eq!(loader(&own), None);
        let shell = fs::read("/bin/sh").unwrap();
        assert!(loader(&shell).unwrap().contains("ld-linux"));
        assert_eq!(loader(b"#!/bin/sh"), None);
        assert_eq!(loader(&[0xff; 64]), None);
    }
}
