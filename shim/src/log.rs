//! The shim's log: logfmt lines into `<bundle>/log`, a fifo that containerd
//! reads. Nothing here ever blocks: a line that doesn't fit is lost.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use casemate_spec::config::Level;
use log::{LevelFilter, Log, Metadata, Record};

use crate::error::one_line;

/// A write up to PIPE_BUF bytes is whole or not at all (pipe(7)).
const PIPE_BUF: usize = 4096;

struct FifoLog {
    path: PathBuf,
    /// `None` until somebody reads the fifo. Kept afterwards, also without a
    /// reader: the same descriptor works again when the next reader comes.
    fifo: Mutex<Option<File>>,
}

/// Applies `log.level` of config.toml. A containerd at debug level has asked
/// for more already, and keeps it.
pub fn set_level(level: Level) {
    let level = match level {
        Level::Off => LevelFilter::Off,
        Level::Error => LevelFilter::Error,
        Level::Warn => LevelFilter::Warn,
        Level::Info => LevelFilter::Info,
        Level::Debug => LevelFilter::Debug,
        Level::Trace => LevelFilter::Trace,
    };
    if log::max_level() < LevelFilter::Debug || level > LevelFilter::Debug {
        log::set_max_level(level);
    }
}

/// Sends the `log` crate's records to `<bundle>/log`.
pub fn init(bundle: &Path, debug: bool) {
    let logger = FifoLog {
        path: bundle.join("log"),
        fifo: Mutex::new(None),
    };
    // A second call can't happen: one server, one init.
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(if debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        });
    }
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // ttrpc reports every connection that ends as an error of its own.
        metadata.level() <= log::max_level()
            && (!metadata.target().starts_with("ttrpc") || metadata.level() <= log::Level::Warn)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format_line(
            SystemTime::now(),
            record.level().as_str(),
            &record.args().to_string(),
        );
        let Ok(mut fifo) = self.fifo.lock() else {
            return;
        };
        if fifo.is_none() {
            *fifo = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOFOLLOW)
                .open(&self.path)
                .ok();
        }
        if let Some(file) = fifo.as_mut() {
            // EAGAIN: the reader sleeps; EPIPE: there is none. Both lose the line.
            let _lost = file.write(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

fn format_line(at: SystemTime, level: &str, message: &str) -> String {
    let mut line = String::with_capacity(message.len() + 64);
    let level = level.to_ascii_lowercase();
    let level = if level == "warn" { "warning" } else { &level };
    let _infallible = write!(line, "time=\"{}\" level={level} msg=\"", rfc3339(at));
    for character in one_line(message).chars() {
        match character {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            other if other.is_control() => line.push(' '),
            other => line.push(other),
        }
        if line.len() > PIPE_BUF - 8 {
            line.push('…');
            break;
        }
    }
    line.push_str("\"\n");
    line
}

/// RFC 3339 with nanoseconds, UTC.
pub fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Proleptic Gregorian calendar in 400-year eras that begin on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_rfc_3339() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::new(seconds, 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000007Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000007Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59.000000007Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000000007Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000000007Z");
    }

    #[test]
    fn a_line_is_logfmt_quoted_and_fits_a_pipe_write() {
        let line = format_line(UNIX_EPOCH, "WARN", "a \"b\"\nc\\");
        assert_eq!(
            line,
            "time=\"1970-01-01T00:00:00.000000000Z\" level=warning msg=\"a \\\"b\\\"; c\\\\\"\n"
        );
        let long = format_line(UNIX_EPOCH, "INFO", &"ü".repeat(PIPE_BUF));
        assert!(long.len() <= PIPE_BUF && long.ends_with("\"\n"));
    }

    #[test]
    fn the_configured_level_counts_unless_containerd_wants_more() {
        log::set_max_level(LevelFilter::Info);
        set_level(Level::Error);
        assert_eq!(log::max_level(), LevelFilter::Error);
        set_level(Level::Debug);
        assert_eq!(log::max_level(), LevelFilter::Debug);
        set_level(Level::Error);
        assert_eq!(log::max_level(), LevelFilter::Debug);
    }
}
