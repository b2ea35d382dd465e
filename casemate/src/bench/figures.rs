//! Figures by row and runtime, as a table and as JSON: the form of `make bench`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

/// Figures of one row.
#[derive(Debug)]
struct Row {
    name: &'static str,
    unit: &'static str,
    of: BTreeMap<String, Vec<f64>>,
}

/// All rows, in the order in which they first came.
#[derive(Debug, Default)]
pub struct Figures(Vec<Row>);

/// The value below which so many of them are: of those that there are, the nearest.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]
fn quantile(values: &[f64], at: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * at).round() as usize).copied()
}

impl Figures {
    /// One more.
    pub fn add(&mut self, name: &'static str, unit: &'static str, runtime: &str, value: f64) {
        let at = self.0.iter().position(|row| row.name == name);
        let at = at.unwrap_or_else(|| {
            self.0.push(Row {
                name,
                unit,
                of: BTreeMap::new(),
            });
            self.0.len() - 1
        });
        if let Some(row) = self.0.get_mut(at) {
            row.of.entry(runtime.to_owned()).or_default().push(value);
        }
    }

    /// For people: median and 99th percentile.
    pub fn table(&self, runtimes: &[String]) -> String {
        let mut text = format!("{:34} {:>4}", "median / p99", "");
        // Writing to a String doesn't fail.
        for runtime in runtimes {
            let _ = write!(text, " {runtime:>20}");
        }
        text.push('\n');
        for row in &self.0 {
            let _ = write!(text, "{:34} {:>4}", row.name, row.unit);
            for runtime in runtimes {
                let values = row.of.get(runtime).map_or(&[][..], Vec::as_slice);
                let cell = match (quantile(values, 0.5), quantile(values, 0.99)) {
                    (Some(median), Some(tail)) => format!("{median:.2} / {tail:.2}"),
                    _ => "-".to_owned(),
                };
                let _ = write!(text, " {cell:>20}");
            }
            text.push('\n');
        }
        text
    }

    /// For programs: with every single figure.
    pub fn json(&self, about: &Value) -> Value {
        let rows: Vec<Value> = self
            .0
            .iter()
            .map(|row| {
                let of: BTreeMap<&String, Value> = row
                    .of
                    .iter()
                    .map(|(runtime, values)| {
                        let figures = json!({
                            "p25": quantile(values, 0.25), "median": quantile(values, 0.5),
                            "p99": quantile(values, 0.99), "count": values.len(),
                            "values": values,
                        });
                        (runtime, figures)
                    })
                    .collect();
                json!({ "name": row.name, "unit": row.unit, "runtimes": of })
            })
            .collect();
        json!({ "about": about, "rows": rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_what_was_added() {
        let mut figures = Figures::default();
        for value in [3.0, 1.0, 2.0, 9.0, 8.0] {
            figures.add("start", "ms", "casemate", value);
        }
        let all = figures.json(&json!({}));
        let of = &all["rows"][0]["runtimes"]["casemate"];
        assert_eq!(
            (of["median"].as_f64(), of["p99"].as_f64()),
            (Some(3.0), Some(9.0))
        );
        let table = figures.table(&["casemate".to_owned(), "runc".to_owned()]);
        assert!(
            table.contains("3.00 / 9.00") && table.trim_end().ends_with('-'),
            "{table}"
        );
    }
}
