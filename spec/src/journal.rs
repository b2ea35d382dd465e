//! What became of each field, as the rules go through a specification.

use crate::coverage::{Fields, How};
use crate::error::Refusal;
use crate::rules::UNSUPPORTED;
use crate::tightenings::Tightening;

/// What became of one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// As in `process.noNewPrivileges`.
    pub field: String,
    /// What was done.
    pub how: How,
    /// Why, or what exactly.
    pub note: String,
}

/// What was decided so far.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) decisions: Vec<Decision>,
    pub(crate) warnings: Vec<String>,
}

impl Journal {
    /// One decision for each field that the document sets.
    ///
    /// # Errors
    /// A field that is refused whatever its value.
    pub(crate) fn new(fields: &Fields, warnings: Vec<String>) -> Result<Self, Refusal> {
        let mut journal = Self {
            decisions: Vec::new(),
            warnings,
        };
        for row in &fields.known {
            match row.how {
                How::Refused => {
                    let rule = row.rule.unwrap_or(&UNSUPPORTED);
                    return Err(Refusal::new(rule, row.field, row.note));
                }
                How::IgnoredWithWarning => {
                    let note = row.note;
                    journal
                        .warnings
                        .push(format!("{}: ignored: {note}", row.field));
                    journal.mark(row.field, row.how, note);
                }
                // Until something is really changed.
                How::Applied | How::Stricter => journal.mark(row.field, How::Applied, row.note),
            }
        }
        // Their warnings are there since they were read.
        for field in &fields.unknown {
            journal.mark(field, How::IgnoredWithWarning, "not a known field");
        }
        Ok(journal)
    }

    pub(crate) fn mark(&mut self, field: &str, how: How, note: &str) {
        match self.decisions.iter_mut().find(|d| d.field == field) {
            Some(d) => {
                d.how = how;
                note.clone_into(&mut d.note);
            }
            None => self.decisions.push(Decision {
                field: field.to_owned(),
                how,
                note: note.to_owned(),
            }),
        }
    }

    /// A field is changed, as `row` says and, in this case, `note`. There is a
    /// warning where the row says so.
    pub(crate) fn tighten(&mut self, row: &Tightening, note: &str) {
        self.mark(row.field, How::Stricter, note);
        if row.told {
            self.warnings.push(format!("{}: {note}", row.field));
        }
    }
}
