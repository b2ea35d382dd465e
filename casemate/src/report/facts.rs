//! What the page tells beside living pods: what filters leave in reach, and what
//! was measured.

use serde_json::Value;

/// What the installed filters leave in reach, as a test of the profiles' crate
/// keeps it.
const SURFACE: &str = include_str!("../../../docs/surface.md");
/// x86-64 calls that gVisor's Sentry may make on its host, counted in the filters that
/// it installs for itself: what its workloads call it answers, and calls these.
const SENTRY: u64 = 64;

/// A bar: whose, and how much.
pub type Bar = (String, u64);

/// Calls in reach by runtime.
pub fn reachable() -> Vec<Bar> {
    let mut bars = columns(SURFACE, "of them x86-64");
    bars.push(("gVisor's Sentry".to_owned(), SENTRY));
    bars
}

/// Calls of all ABIs.
pub fn entries() -> Vec<Bar> {
    columns(SURFACE, "Calls, all ABIs")
}

/// Numbers of a row of a table, by the heads of their columns.
fn columns(page: &str, row: &str) -> Vec<Bar> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim().trim_matches('|');
        inner.split('|').map(|c| c.trim().to_owned()).collect()
    };
    let mut lines = page.lines().filter(|line| line.starts_with('|'));
    let head = lines.next().map(cells).unwrap_or_default();
    let found = lines
        .map(cells)
        .find(|c| c.first().is_some_and(|c| c == row));
    let ours = |name: &str| match name {
        "runc" => name.to_owned(),
        profile => format!("casemate, {profile}"),
    };
    head.iter()
        .zip(found.unwrap_or_default())
        .skip(1)
        .filter_map(|(name, cell)| Some((ours(name), cell.parse().ok()?)))
        .collect()
}

/// A row of figures: its name with the unit, and a median for each runtime.
pub type Figures = (String, Vec<(String, f64)>);

/// Rows of a file of `casemate bench` or `make bench`. What isn't one has none.
pub fn figures(bench: &Value) -> Vec<Figures> {
    let rows = bench["rows"].as_array().into_iter().flatten();
    rows.filter_map(|row| {
        let name = row["name"].as_str()?;
        let unit = row["unit"].as_str().unwrap_or_default();
        let runtimes = row["runtimes"].as_object()?.iter();
        let medians = runtimes
            .filter_map(|(name, of)| Some((name.clone(), of["median"].as_f64()?)))
            .collect();
        Some((format!("{name} ({unit})"), medians))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_surface_is_found_in_its_page() {
        let bars = reachable();
        let names: Vec<&str> = bars.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "runc",
                "casemate, compat",
                "casemate, default",
                "casemate, strict",
                "gVisor's Sentry"
            ]
        );
        assert!(
            bars.iter().all(|(_, calls)| (40..400).contains(calls)),
            "{bars:?}"
        );
        assert_eq!(entries().len(), 4);
    }

    #[test]
    fn figures_are_read_and_nonsense_has_none() {
        let bench = json!({ "rows": [
            { "name": "exec", "unit": "ms", "runtimes": { "casemate": { "median": 0.5 }, "runc": {} } },
            { "name": 3 },
        ] });
        let want = vec![("exec (ms)".to_owned(), vec![("casemate".to_owned(), 0.5)])];
        assert_eq!(figures(&bench), want);
        assert!(figures(&json!([1])).is_empty());
    }
}
