//! What commands print: results on stdout, everything else on stderr; colours only where
//! somebody sees them.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use bytesize::ByteSize;
use serde::Serialize;

use super::error::{CliError, Doing, Result};

pub(super) const GOOD: Style = AnsiColor::Green.on_default();
pub(super) const WARN: Style = AnsiColor::Yellow.on_default();
pub(super) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(super) const DIM: Style = Style::new().dimmed();
pub(super) const STRONG: Style = Style::new().bold();

/// Whether colours on stderr are wanted: a terminal, and no `NO_COLOR`.
pub(super) fn stderr_has_colours() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never
}

/// Prints one line of JSON.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).doing(|| "write JSON".to_owned())?;
    line(&text)
}

/// Prints one line; a reader that has gone away is no error of ours.
pub(super) fn line(text: &str) -> Result<()> {
    match writeln!(anstream::stdout(), "{text}") {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::caused("cannot write the output", &e))
        }
        _ => Ok(()),
    }
}

/// Shows an error as one line what failed and one line what to do.
pub(super) fn error(error: &CliError) {
    let mut err = anstream::stderr();
    // Nobody can be told that nobody can be told.
    let _ = writeln!(err, "{BAD}kuasar-ctl:{BAD:#} {}", error.what);
    if let Some(next) = &error.next {
        let _ = writeln!(err, "  {GOOD}try:{GOOD:#} {next}");
    }
}

/// A remark on stderr.
pub(super) fn note(text: &str) {
    let _ = writeln!(anstream::stderr(), "{DIM}kuasar-ctl: {text}{DIM:#}");
}

/// A table with a bold head; columns as wide as their widest cell.
pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> Result<()> {
    let mut widths = head.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let format = |cells: [&str; N]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            let cell = format!("{cell:<width$}  ");
            text.push_str(&cell);
        }
        text.trim_end().to_owned()
    };
    line(&format!("{STRONG}{}{STRONG:#}", format(head)))?;
    for row in rows {
        line(&format(row.each_ref().map(String::as_str)))?;
    }
    Ok(())
}

/// A number of bytes, in the largest unit that fits.
pub(super) fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// How long ago, in the largest unit that fits.
pub(super) fn age(age: Duration) -> String {
    let secs = age.as_secs();
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// What a long step is doing: one line on a terminal that is wiped in the end, nothing
/// elsewhere (unless verbose: then one line per step).
#[derive(Debug)]
pub(super) struct Steps {
    live: bool,
    verbose: bool,
    started: Instant,
}

impl Steps {
    pub(super) fn new(verbose: bool) -> Self {
        Self {
            live: io::stderr().is_terminal() && !verbose,
            verbose,
            started: Instant::now(),
        }
    }

    pub(super) fn step(&self, text: &str) {
        if self.verbose {
            note(&format!(
                "{:>6.2}s {text}",
                self.started.elapsed().as_secs_f64()
            ));
        } else if self.live {
            let mut err = anstream::stderr();
            let _ = write!(err, "\r\x1b[2K{DIM}{text} ...{DIM:#}");
            let _ = err.flush();
        }
    }

    /// Wipes the line, before the container prints.
    pub(super) fn done(&self) {
        if self.live {
            let mut err = io::stderr();
            let _ = write!(err, "\r\x1b[2K");
            let _ = err.flush();
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.done();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        for (secs, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7200, "2h"),
            (200_000, "2d"),
        ] {
            assert_eq!(age(Duration::from_secs(secs)), text);
        }
    }
}
