//! The table of a run.

use std::fmt::Write as _;

use crate::{Row, Verdict};

/// How the rows went.
#[derive(Clone, Debug, Default)]
pub struct Report(Vec<(Row, Verdict)>);

impl Report {
    /// Adds a row.
    pub fn add(&mut self, row: Row, verdict: Verdict) {
        self.0.push((row, verdict));
    }

    /// Rows that do not hold.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.count(|verdict| matches!(verdict, Verdict::Fail(_)))
    }

    fn count(&self, which: impl Fn(&Verdict) -> bool) -> usize {
        self.0.iter().filter(|(_, verdict)| which(verdict)).count()
    }

    /// One line with the sums.
    #[must_use]
    pub fn summary(&self) -> String {
        format!(
            "{} of {} rows pass, {} fail, {} are skipped",
            self.count(|verdict| *verdict == Verdict::Pass),
            self.0.len(),
            self.failed(),
            self.count(|verdict| matches!(verdict, Verdict::Skip(_))),
        )
    }

    /// A table in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::from("| # | row | result |\n|---|---|---|\n");
        for (row, verdict) in &self.0 {
            let result = match verdict {
                Verdict::Pass => "pass".to_owned(),
                Verdict::Fail(why) => format!("**fail**: {}", first_line(why)),
                Verdict::Skip(why) => format!("skipped: {}", first_line(why)),
            };
            let _ = writeln!(text, "| {} | {} | {result} |", row.number, row.name);
        }
        text
    }
}

/// One line for the terminal.
#[must_use]
pub fn line(row: &Row, verdict: &Verdict, seconds: f64) -> String {
    let (word, why) = match verdict {
        Verdict::Pass => ("pass", ""),
        Verdict::Fail(why) => ("FAIL", why.as_str()),
        Verdict::Skip(why) => ("skip", why.as_str()),
    };
    let name = row.name;
    let mut line = format!("{:>3}  {word}  {seconds:>5.1} s  {name}", row.number);
    if !why.is_empty() {
        let _ = write!(line, "\n            {}", first_line(why));
    }
    line
}

fn first_line(text: &str) -> String {
    text.split('\n')
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
}
