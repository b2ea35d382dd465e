//! Pages of docs/ that are made of what is in the code.

use std::path::Path;

/// Compares, or with `CASEMATE_WRITE_DOCS` writes.
pub fn same(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name);
    if std::env::var_os("CASEMATE_WRITE_DOCS").is_some() {
        std::fs::write(&path, text).unwrap();
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "{} is not what the code says; run `make docs-tables`",
        path.display()
    );
}
