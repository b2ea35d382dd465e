//! Which limits were set last. What was written, not what the kernel then showed: so
//! it costs no look, and can be held against the kernel's word at any later time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Stands for a file with the id of the device program, which version 2 has no file
/// for.
pub const DEVICE_PROGRAM: &str = "device program";

#[derive(Debug, Default)]
pub(crate) struct Limits(Mutex<BTreeMap<PathBuf, String>>);

impl Limits {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file that holds one value; others are left out.
    pub(crate) fn note(&self, path: PathBuf, text: &str) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        // A line for each device or interface, or tables of the network's.
        let keyed = ["blkio.", "devices.", "io.", "net_", "rdma."];
        let plain = |c: char| c.is_ascii_digit() || "max,- ".contains(c);
        if !keyed.iter().any(|k| name.starts_with(k)) && text.chars().all(plain) {
            let mut all = self.lock();
            if name == "cpu.idle" {
                // It comes with a weight of its own.
                all.remove(&path.with_file_name("cpu.shares"));
                all.remove(&path.with_file_name("cpu.weight"));
            }
            all.insert(path, text.trim().to_owned());
        }
    }

    pub(crate) fn note_devices(&self, dir: &Path, lines: Vec<String>) {
        self.lock()
            .insert(dir.join("devices.list"), lines.join("\n"));
    }

    pub(crate) fn note_program(&self, dir: &Path, id: Option<u32>) {
        if let Some(id) = id {
            self.lock().insert(dir.join(DEVICE_PROGRAM), id.to_string());
        }
    }

    pub(crate) fn all(&self) -> BTreeMap<PathBuf, String> {
        self.lock().clone()
    }
}
