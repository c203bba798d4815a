//! Memory of a process, as the kernel shares it out.

use std::fs;

/// Proportional set size of a process in KiB, split by whether the mapping is guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pss {
    /// Mappings whose name says they are guest memory.
    pub guest_kib: u64,
    /// Everything else: code, heap, stacks.
    pub own_kib: u64,
}

/// Reads `/proc/<pid>/smaps`; guest memory is every mapping whose path contains one of `names`.
///
/// # Errors
/// When the process is gone or may not be read.
pub fn pss(pid: u32, names: &[&str]) -> std::io::Result<Pss> {
    Ok(parse(
        &fs::read_to_string(format!("/proc/{pid}/smaps"))?,
        names,
    ))
}

fn parse(smaps: &str, names: &[&str]) -> Pss {
    let mut total = Pss::default();
    let mut in_guest = false;
    for line in smaps.lines() {
        // A mapping's head line starts with its address range, its facts with "Name:".
        let first = line.split(' ').next().unwrap_or_default();
        if !first.ends_with(':') {
            in_guest = names.iter().any(|name| line.contains(name));
        } else if first == "Pss:" {
            let kib = line
                .split_whitespace()
                .nth(1)
                .and_then(|v| v.parse().ok())
                .unwrap_or(0);
            if in_guest {
                total.guest_kib += kib;
            } else {
                total.own_kib += kib;
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_by_mapping() {
        let smaps = "7f00-7f10 rw-s 00000000 00:01 5 /memfd:guest (deleted)\n\
                     Size: 16 kB\nPss: 12 kB\nPss_Dirty: 4 kB\n\
                     55a0-55b0 r-xp 00000000 fe:00 9 /usr/bin/vmm-sandboxer\nPss: 7 kB\n";
        assert_eq!(
            parse(smaps, &["memfd:guest"]),
            Pss {
                guest_kib: 12,
                own_kib: 7
            }
        );
    }
}
