//! How far long work is, for people at a terminal: on standard error, and nowhere else.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar. It is taken away when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// Work of so many steps, each of them a `noun`.
    pub fn of(count: u64, noun: &'static str) -> Self {
        // Draws nothing where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(Some(count), ProgressDrawTarget::stderr());
        let form = format!("{noun} {{pos}} of {{len}} [{{bar:30}}] {{elapsed}} {{wide_msg}}");
        if let Ok(style) = ProgressStyle::with_template(&form) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self(bar)
    }

    /// The next step begins, with what it is about: text of our own making.
    pub fn step(&self, about: &str) {
        self.0.set_message(about.to_owned());
        self.0.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
