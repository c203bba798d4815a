//! What every benchmark shares: medians, the table, the JSON file, and peers to compare with.
//!
//! A benchmark never asserts a time. It prints a table in which a real peer was measured on
//! the same machine in the same run, and writes `target/bench/<name>.json`.

// A benchmark reports its own failures by panicking.
#![allow(clippy::expect_used, clippy::panic)]

pub mod backend;
pub mod memory;
pub mod peer;
pub mod qemu_restore;
pub mod report;

use std::time::Duration;

/// The middle of `samples`; the mean of the two middle ones when their number is even.
/// `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    let upper = *sorted.get(half)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    sorted
        .get(half - 1)
        .map(|lower| f64::midpoint(*lower, upper))
}

/// The smallest sample that 99 of 100 samples do not exceed; `None` without samples.
#[must_use]
pub fn p99(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * 99).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

/// A duration in milliseconds.
#[must_use]
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::{median, p99};

    #[test]
    fn percentiles() {
        assert_eq!(p99(&[]), None);
        assert_eq!(p99(&[7.0]), Some(7.0));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(p99(&hundred), Some(99.0));
        let sixty: Vec<f64> = (1..=60).map(f64::from).collect();
        assert_eq!(p99(&sixty), Some(60.0));
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }
}
