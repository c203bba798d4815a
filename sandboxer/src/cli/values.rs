//! Values of options: sizes, volumes, environment, names.

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use nix::sys::signal::Signal;

/// The CPU controller's usual period.
pub(super) const CPU_PERIOD_US: u64 = 100_000;
/// More vCPUs no pod gets.
const MAX_CPUS: f64 = 255.0;
/// Less memory no container can start with.
const MIN_MEMORY: ByteSize = ByteSize::mib(4);
const MAX_NAME_BYTES: usize = 63;

/// `--cpus`: whole or part of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cpus {
    /// CPU time per [`CPU_PERIOD_US`].
    pub(super) quota_us: u64,
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cpus: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
        if !(cpus > 0.0 && cpus <= MAX_CPUS) {
            return Err(format!("a pod has more than 0 and at most {MAX_CPUS} CPUs"));
        }
        // A tenth of a second is the period.
        let quota = Duration::from_secs_f64(cpus / 10.0).as_micros();
        let quota_us = u64::try_from(quota).map_err(|e| e.to_string())?;
        if quota_us < 1000 {
            return Err("less than a hundredth of a CPU".to_owned());
        }
        Ok(Self { quota_us })
    }
}

/// `--memory`.
pub(super) fn memory(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| "not a size; write for instance 256MiB or 1GiB".to_owned())?;
    if size < MIN_MEMORY {
        return Err("a container needs at least 4MiB".to_owned());
    }
    i64::try_from(size.as_u64()).map_err(|_| "more than any machine has".to_owned())?;
    Ok(size)
}

/// A time such as `30s`, `1m30s` or `500ms`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime_serde::re::humantime::parse_duration(text)
        .map_err(|e| format!("{e}; write for instance 30s or 5m"))?;
    if duration.is_zero() {
        return Err("must be longer than nothing".to_owned());
    }
    Ok(duration)
}

/// A signal as images and users write it: `TERM`, `SIGTERM`, `15` or `SIGRTMIN+3`.
pub(super) fn signal(text: &str) -> Result<i32, String> {
    const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;
    let unknown = || format!("{text:?} is no signal; write for instance TERM, SIGTERM or 15");
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let number = if let Ok(number) = name.parse::<i32>() {
        number
    } else if let Some(more) = name.strip_prefix("RTMIN") {
        offset(more, '+').map_or(0, |n| REAL_TIME.start().saturating_add(n))
    } else if let Some(less) = name.strip_prefix("RTMAX") {
        offset(less, '-').map_or(0, |n| REAL_TIME.end().saturating_sub(n))
    } else {
        Signal::from_str(&format!("SIG{name}")).map_or(0, |signal| signal as i32)
    };
    let known = Signal::try_from(number).is_ok() || REAL_TIME.contains(&number);
    known.then_some(number).ok_or_else(unknown)
}

/// What follows `sign`, or 0 for nothing at all.
fn offset(text: &str, sign: char) -> Option<i32> {
    if text.is_empty() {
        return Some(0);
    }
    text.strip_prefix(sign)?.parse().ok()
}

/// `--name` and pod arguments.
pub(super) fn name(text: &str) -> Result<String, String> {
    let mut bytes = text.bytes();
    let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if starts_well && bytes.all(allowed) && text.len() <= MAX_NAME_BYTES {
        return Ok(text.to_owned());
    }
    Err(format!(
        "a name has 1 to {MAX_NAME_BYTES} of the characters A-Z a-z 0-9 _ . - and begins with a \
         letter or digit"
    ))
}

/// `--hostname`.
pub(super) fn hostname(text: &str) -> Result<String, String> {
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if text.len() <= 64 && text.split('.').all(label) {
        return Ok(text.to_owned());
    }
    Err("a host name has 1 to 64 letters, digits, '-' and '.'".to_owned())
}

/// `--volume HOST:GUEST[:ro|rw]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Volume {
    /// Absolute path on the host.
    pub(super) source: PathBuf,
    /// Absolute path in the container.
    pub(super) destination: PathBuf,
    pub(super) read_only: bool,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, destination, read_only) = match parts.as_slice() {
            [source, destination] | [source, destination, "rw"] => (source, destination, false),
            [source, destination, "ro"] => (source, destination, true),
            [_, _, other] => return Err(format!("{other:?} is neither ro nor rw")),
            _ => return Err("must be HOST:GUEST, HOST:GUEST:ro or HOST:GUEST:rw".to_owned()),
        };
        if source.is_empty() {
            return Err("the host path is empty".to_owned());
        }
        let destination = container_path(destination)?;
        let source = fs::canonicalize(source).map_err(|e| format!("{source}: {e}"))?;
        Ok(Self {
            source,
            destination,
            read_only,
        })
    }
}

/// A path to mount on in a container.
pub(super) fn container_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let climbs = path.components().any(|c| c == Component::ParentDir);
    if !path.is_absolute() || climbs || path == Path::new("/") {
        return Err(format!(
            "{text}: the path in the container must be absolute, below / and without .."
        ));
    }
    Ok(path.to_owned())
}

/// `NAME=VALUE`, or `NAME` to take this process's own value.
pub(super) fn env(text: &str) -> Result<String, String> {
    let name = text.split('=').next().unwrap_or_default();
    if name.is_empty() || text.contains('\0') {
        return Err("must be NAME=VALUE, or NAME to pass this shell's value on".to_owned());
    }
    Ok(text.to_owned())
}

/// Lines `NAME=VALUE`; empty lines and lines that begin with `#` are skipped.
pub(super) fn env_file(path: &Path) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    text.lines()
        .enumerate()
        .map(|(index, line)| (index, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(index, line)| {
            let number = index.saturating_add(1);
            env(line).map_err(|e| format!("{} line {number}: {e}", path.display()))
        })
        .collect()
}

/// Later settings replace earlier ones of the same name; a bare name takes the value from
/// `own`, or is left out when it has none.
pub(super) fn merge_env(
    settings: impl IntoIterator<Item = String>,
    own: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let settings: Vec<String> = settings
        .into_iter()
        .filter_map(|setting| match setting.split_once('=') {
            Some(_) => Some(setting),
            None => own(&setting).map(|value| format!("{setting}={value}")),
        })
        .collect();
    let mut seen = HashSet::new();
    let mut merged: Vec<String> = settings
        .into_iter()
        .rev()
        .filter(|setting| seen.insert(setting.split('=').next().unwrap_or_default().to_owned()))
        .collect();
    merged.reverse();
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals() {
        for (text, number) in [
            ("TERM", 15),
            ("SIGTERM", 15),
            ("9", 9),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("64", 64),
        ] {
            assert_eq!(signal(text), Ok(number), "{text}");
        }
        for text in [
            "", "SIG", "0", "-1", "65", "33", "term", "RTMIN+31", "RTMAX+1", "RTMIN-1",
        ] {
            signal(text).unwrap_err();
        }
    }

    #[test]
    fn cpus() {
        assert_eq!("2".parse::<Cpus>().unwrap().quota_us, 200_000);
        assert_eq!("0.5".parse::<Cpus>().unwrap().quota_us, 50_000);
        assert_eq!("255".parse::<Cpus>().unwrap().quota_us, 25_500_000);
        for text in ["0", "-1", "1000", "x", "", "NaN", "inf", "0.0001", "1e99"] {
            text.parse::<Cpus>().unwrap_err();
        }
    }

    #[test]
    fn memory_sizes() {
        assert_eq!(memory("192MiB").unwrap(), ByteSize::mib(192));
        assert_eq!(memory("1GiB").unwrap(), ByteSize::gib(1));
        for text in ["0", "1", "x", "", "-5MiB", "99999999999GiB"] {
            memory(text).unwrap_err();
        }
    }

    #[test]
    fn volumes() {
        let dir = tempfile::tempdir().unwrap();
        let host = fs::canonicalize(dir.path()).unwrap();
        let text = host.to_str().unwrap();
        let volume: Volume = format!("{text}:/data").parse().unwrap();
        assert_eq!(volume.source, host);
        assert_eq!(volume.destination, Path::new("/data"));
        assert!(!volume.read_only);
        assert!(
            format!("{text}:/data:ro")
                .parse::<Volume>()
                .unwrap()
                .read_only
        );
        assert!(
            !format!("{text}:/data:rw")
                .parse::<Volume>()
                .unwrap()
                .read_only
        );
        for bad in ["", ":/x", "/x", "a:b:c:d"] {
            bad.parse::<Volume>().unwrap_err();
        }
        for guest in ["data", "", "/", "/a/../../b", "/data:rx"] {
            format!("{text}:{guest}").parse::<Volume>().unwrap_err();
        }
        let missing = "/no/such/path:/data".parse::<Volume>().unwrap_err();
        assert!(missing.contains("/no/such/path"), "{missing}");
    }

    #[test]
    fn environments() {
        let own = |name: &str| (name == "HOME").then(|| "/me".to_owned());
        let merged = merge_env(
            ["A=1", "B=2", "A=3", "HOME", "UNSET"].map(str::to_owned),
            own,
        );
        assert_eq!(merged, ["B=2", "A=3", "HOME=/me"]);
        env("=x").unwrap_err();
        env("").unwrap_err();
        env("A=").unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "# comment\n\nA=1\n  B=2=3 \n").unwrap();
        assert_eq!(env_file(file.path()).unwrap(), ["A=1", "B=2=3"]);
        fs::write(file.path(), "A=1\n=x\n").unwrap();
        assert!(env_file(file.path()).unwrap_err().contains("line 2"));
    }

    #[test]
    fn names() {
        for good in ["a", "web-1", "A.b_c", &"x".repeat(63)] {
            name(good).unwrap();
        }
        for bad in ["", "-a", ".", "a/b", "a b", &"x".repeat(64)] {
            name(bad).unwrap_err();
        }
        hostname("a.b-c.d").unwrap();
        for bad in ["", "-a", "a..b", "a_b", &"x".repeat(65)] {
            hostname(bad).unwrap_err();
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1m30s").unwrap(), Duration::from_secs(90));
        for bad in ["", "0s", "5", "x"] {
            duration(bad).unwrap_err();
        }
    }
}
