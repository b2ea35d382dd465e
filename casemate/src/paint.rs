//! Colours, for people at a terminal and nobody else.

use std::io::IsTerminal;

/// Whether to colour what goes to standard output: only on a terminal that can,
/// and never where `NO_COLOR` is set (no-color.org).
#[derive(Debug, Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// For standard output as it is.
    pub fn stdout() -> Self {
        Self::decide(
            std::io::stdout().is_terminal(),
            std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
            std::env::var("TERM").ok().as_deref(),
        )
    }

    fn decide(terminal: bool, no_color: bool, term: Option<&str>) -> Self {
        Self(terminal && !no_color && term.is_some_and(|term| !term.is_empty() && term != "dumb"))
    }

    /// Good news.
    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    /// Bad news.
    pub fn bad(self, text: &str) -> String {
        self.with("1;31", text)
    }

    /// What may be bad news.
    pub fn doubt(self, text: &str) -> String {
        self.with("33", text)
    }

    /// A heading.
    pub fn strong(self, text: &str) -> String {
        self.with("1", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Text of somebody else's in one line, without what a terminal would obey.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        // Marks that turn the direction of writing hide what follows.
        let hides = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || hides {
            plain.extend(c.escape_unicode());
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_told_nothing_to_obey() {
        assert_eq!(
            plain("a\x1b[2Jb\nc\u{202e}d"),
            "a\\u{1b}[2Jb\\u{a}c\\u{202e}d"
        );
        assert_eq!(plain("ü/web-0"), "ü/web-0");
    }

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        let red = |terminal, no_color, term| Paint::decide(terminal, no_color, term).bad("x");
        assert_eq!(red(true, false, Some("xterm")), "\x1b[1;31mx\x1b[0m");
        assert_eq!(red(false, false, Some("xterm")), "x");
        assert_eq!(red(true, true, Some("xterm")), "x");
        assert_eq!(red(true, false, Some("dumb")), "x");
        assert_eq!(red(true, false, None), "x");
    }
}
