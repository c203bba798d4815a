//! This process's terminal: raw while a container has it, and put back whatever happens.

use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::error::{CliError, Doing, Result};

/// Columns and rows of our terminal; `None` when there is none.
pub(super) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin())
        .or_else(|_| tcgetwinsize(io::stdout()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Refuses `-it` where there is no terminal to give.
pub(super) fn check(interactive: bool, tty: bool) -> Result<()> {
    if interactive && tty && !io::stdin().is_terminal() {
        return Err(
            CliError::new("-i with -t needs a terminal, and stdin is none")
                .next("leave -t out to pass a pipe or a file on"),
        );
    }
    Ok(())
}

/// Our terminal in raw mode; restored on drop.
#[derive(Debug)]
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    pub(super) fn enter() -> Result<Self> {
        let doing = || "set up the terminal".to_owned();
        let before = tcgetattr(io::stdin()).doing(doing)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).doing(doing)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
