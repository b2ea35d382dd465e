//! The same names from `regex-lite`: all that `oci-spec` uses of `regex`.
pub use regex_lite::{Captures, Error, Regex, RegexBuilder};
