//! The tables of this crate as Markdown, for `docs/`.

use std::fmt::Write;

use crate::coverage::{How, coverage};
use crate::failures::FAILURES;
use crate::rules::RULES;
use crate::tightenings::TIGHTENINGS;

const HEAD: &str = "<!-- Written by `make docs-tables`; a test compares it with the code. -->\n\n";

/// `docs/oci-coverage.md`.
#[must_use]
pub fn coverage_page() -> String {
    let mut page = format!(
        "# What becomes of each field of the OCI specification\n\n{HEAD}\
         A field is *applied* as written, or *stricter*; or it is *refused*, by the\n\
         [rule](refusals.md) that the last column names, and the container doesn't start;\n\
         or it is *ignored with a warning*, where that does no harm. What is applied can\n\
         have values that are refused all the same. A field that isn't here is ignored\n\
         with a warning. `[]` stands for each entry of a list, `*` for any key.\n\n"
    );
    for (how, title) in [
        (How::Applied, "Applied"),
        (How::Stricter, "Applied, at least as strictly"),
        (How::Refused, "Refused"),
        (How::IgnoredWithWarning, "Ignored with a warning"),
    ] {
        let rows: Vec<_> = coverage().iter().filter(|row| row.how == how).collect();
        // Writing to a text can't fail.
        let _ = write!(page, "## {title} ({})\n\n", rows.len());
        page.push_str("| Field | How | Rule |\n| --- | --- | --- |\n");
        for row in rows {
            let below = if row.subtree { " and all below" } else { "" };
            let rule = row
                .rule
                .map_or(String::new(), |rule| format!("`{}`", rule.id));
            let _ = writeln!(
                page,
                "| `{}`{below} | {} | {rule} |",
                row.field,
                cell(row.note)
            );
        }
        page.push('\n');
    }
    page.truncate(page.trim_end().len());
    page.push('\n');
    page
}

/// `docs/refusals.md`.
#[must_use]
pub fn refusals_page() -> String {
    let mut page = format!(
        "# What is refused, why, and the way out\n\n{HEAD}\
         A refusal is one line, `casemate: WHAT: DETAIL (FIELD). WAY OUT`, and the code\n\
         that comes with it is InvalidArgument.\n\n\
         | Rule | What | Why | Way out |\n| --- | --- | --- | --- |\n"
    );
    for rule in RULES {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} |",
            rule.id,
            cell(rule.what),
            cell(rule.why),
            cell(rule.way_out)
        );
    }
    page.push_str(
        "\n## What fails for another reason\n\n\
         Such a message begins with the step that failed and says on what; words of it, in the\n\
         order in which a container is made:\n\n\
         | Words | When | Way out |\n| --- | --- | --- |\n",
    );
    for row in FAILURES {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} |",
            row.words.trim_end(),
            row.when,
            row.way_out
        );
    }
    page.push_str(
        "\n## What is tightened instead\n\n\
         The container starts, and not with all that was asked for. *Log*: the shim's log says\n\
         so. Each field that a specification can have is in [oci-coverage.md](oci-coverage.md).\n\n\
         | Field | What becomes of it | Why | As written with | Log |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for row in TIGHTENINGS {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} | {} |",
            row.field,
            cell(row.what),
            cell(row.why),
            if row.way.is_empty() {
                "–".to_owned()
            } else {
                cell(row.way)
            },
            if row.told { "yes" } else { "no" }
        );
    }
    page
}

/// A text within a row.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
        .replace('*', "\\*")
        .replace('<', "\\<")
}
