//! Figures by row and runtime, and their median and 99th percentile.

/// What a row's figures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// 2^20 bytes.
    Mib,
    /// Nanoseconds.
    Ns,
    /// Thousandths of a processor.
    Milli,
}

impl Unit {
    /// As shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ms => "ms",
            Self::Mib => "MiB",
            Self::Ns => "ns",
            Self::Milli => "mCPU",
        }
    }
}

/// All figures of one row.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    figures: Vec<(&'static str, Vec<f64>)>,
}

impl Row {
    /// The figures of one runtime.
    pub fn of(&self, peer: &str) -> &[f64] {
        self.figures
            .iter()
            .find(|(name, _)| *name == peer)
            .map(|(_, values)| values.as_slice())
            .unwrap_or_default()
    }

    /// The median of one runtime's figures.
    pub fn median(&self, peer: &str) -> Option<f64> {
        quantile(self.of(peer), 0.5)
    }
}

/// All rows, in the order in which they first came.
#[derive(Debug, Default)]
pub struct Samples {
    /// The rows.
    pub rows: Vec<Row>,
}

impl Samples {
    /// Adds one figure.
    pub fn add(&mut self, row: &str, unit: Unit, peer: &'static str, value: f64) {
        let at = match self.rows.iter().position(|r| r.name == row) {
            Some(at) => at,
            None => {
                self.rows.push(Row {
                    name: row.to_owned(),
                    unit,
                    figures: Vec::new(),
                });
                self.rows.len() - 1
            }
        };
        let Some(row) = self.rows.get_mut(at) else {
            return;
        };
        match row.figures.iter_mut().find(|(name, _)| *name == peer) {
            Some((_, values)) => values.push(value),
            None => row.figures.push((peer, vec![value])),
        }
    }

    /// A row by its name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }
}

/// The value below which `share` of the values lie (nearest rank).
pub fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}
