//! The battery-backed clock (Motorola MC146818A): the time of day, read-only.
//!
//! Without it a kernel that looks for a clock waits for an update cycle that never ends.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

/// The top bit of the index port masks NMIs.
const INDEX_BITS: u8 = 0x7f;

/// What a snapshot keeps of a [`Cmos`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    index: u8,
}

/// Index and data port; always shows the host's time in UTC.
#[derive(Debug, Default)]
pub struct Cmos {
    index: AtomicU8,
}

impl Cmos {
    /// First port.
    pub const PORT: u64 = 0x70;
    /// Ports taken.
    pub const PORTS: u64 = 2;

    const INDEX: u64 = 0;
    const DATA: u64 = 1;

    /// What a snapshot keeps; the time itself is the host's.
    #[must_use]
    pub fn save(&self) -> CmosState {
        CmosState {
            index: self.index.load(Ordering::Relaxed),
        }
    }

    /// Goes on as `state` says.
    pub fn restore(&self, state: CmosState) {
        self.index
            .store(state.index & INDEX_BITS, Ordering::Relaxed);
    }

    fn register(index: u8, now: &Time) -> u8 {
        match index {
            0x00 => bcd(now.second),
            0x02 => bcd(now.minute),
            0x04 => bcd(now.hour),
            0x06 => bcd(now.weekday),
            0x07 => bcd(now.day),
            0x08 => bcd(now.month),
            0x09 => bcd(now.year % 100),
            0x32 => bcd(now.year / 100),
            // A: 32768 Hz time base, no update in progress.
            0x0a => 0x26,
            // B: 24 hours, BCD, no interrupts.
            0x0b => 0x02,
            // D: the battery is good.
            0x0d => 0x80,
            _ => 0,
        }
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Self::DATA, [byte]) = (offset, data) {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs());
            *byte = Self::register(self.index.load(Ordering::Relaxed), &Time::at(now));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Self::INDEX, [byte]) = (offset, data) {
            self.index.store(byte & INDEX_BITS, Ordering::Relaxed);
        }
    }
}

fn bcd(value: u64) -> u8 {
    let digits = ((value / 10 % 10) << 4) | (value % 10);
    u8::try_from(digits).unwrap_or(0)
}

#[derive(Debug, PartialEq, Eq)]
struct Time {
    second: u64,
    minute: u64,
    hour: u64,
    /// Sunday is 1.
    weekday: u64,
    day: u64,
    month: u64,
    year: u64,
}

impl Time {
    /// The Gregorian calendar, in UTC.
    fn at(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let mut year = 1970;
        let mut left = days;
        while left >= year_days(year) {
            left = left.saturating_sub(year_days(year));
            year = u64::saturating_add(year, 1);
        }
        let mut month = 1;
        while left >= month_days(year, month) {
            left = left.saturating_sub(month_days(year, month));
            month = u64::saturating_add(month, 1);
        }
        Self {
            second: seconds % 60,
            minute: seconds / 60 % 60,
            hour: seconds / 3600 % 24,
            // The epoch was a Thursday.
            weekday: days.saturating_add(4) % 7 + 1,
            day: left.saturating_add(1),
            month,
            year,
        }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        // The loop that asks never gets past December.
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_is_right() {
        let time = Time::at(951_782_400); // date -u -d @951782400
        assert_eq!(
            (time.year, time.month, time.day, time.weekday),
            (2000, 2, 29, 3)
        );
        let time = Time::at(1_798_761_599);
        assert_eq!((time.year, time.month, time.day), (2026, 12, 31));
        assert_eq!((time.hour, time.minute, time.second), (23, 59, 59));
        let time = Time::at(4_107_542_400);
        assert_eq!((time.year, time.month, time.day), (2100, 3, 1));
    }

    #[test]
    fn never_busy_and_in_bcd() {
        let cmos = Cmos::default();
        let read = |index: u8| {
            cmos.write(0, &[index | 0x80]);
            let mut data = [0];
            cmos.read(1, &mut data);
            data[0]
        };
        assert_eq!(read(0x0a) & 0x80, 0);
        assert_eq!(read(0x0d), 0x80);
        assert!(read(0x32) >= 0x20);
        assert_eq!(bcd(59), 0x59);
    }

    #[test]
    fn a_chosen_register_stays_chosen() {
        let cmos = Cmos::default();
        cmos.write(0, &[0x8d]);
        let restored = Cmos::default();
        restored.restore(cmos.save());
        let mut data = [0];
        restored.read(1, &mut data);
        assert_eq!(data, [0x80]);
    }
}
