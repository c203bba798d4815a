//! CPUs that come and go: the host builds the machine with as many as it may ever have, or
//! plugs them in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::AgentError;
use crate::uevents;

const CPUS: &str = "/sys/devices/system/cpu";

/// Brings CPUs online, or takes the last ones offline, until `count` run; returns how many
/// do.
///
/// One that the host has just plugged in is waited for.
pub async fn set_online(count: u32) -> Result<u32, AgentError> {
    let folder = Path::new(CPUS);
    let wanted = usize::try_from(count).unwrap_or(usize::MAX);
    let last = list(folder, "possible")?
        .get(wanted.saturating_sub(1))
        .copied();
    if let Some(last) = last {
        // The first one has no such file on many machines.
        let appeared = || (last == 0 || switch(folder, last).exists()).then_some(());
        uevents::until("cpu", "the appearance of the CPU", appeared).await?;
    }
    set_online_in(folder, count)
}

fn switch(folder: &Path, cpu: u32) -> PathBuf {
    folder.join(format!("cpu{cpu}/online"))
}

fn set_online_in(folder: &Path, count: u32) -> Result<u32, AgentError> {
    let possible = list(folder, "possible")?;
    let most = u32::try_from(possible.len()).unwrap_or(u32::MAX);
    if count == 0 || count > most {
        let why = format!("{count}: the machine can have 1 to {most} CPUs");
        return Err(AgentError::invalid("count", why));
    }
    let online = list(folder, "online")?;
    let keep = usize::try_from(count).unwrap_or(usize::MAX);
    for (position, cpu) in possible.iter().enumerate() {
        let wanted = position < keep;
        if online.contains(cpu) == wanted {
            continue;
        }
        let file = switch(folder, *cpu);
        let set = fs::write(&file, if wanted { "1" } else { "0" });
        set.map_err(AgentError::io(file.display().to_string()))?;
    }
    let online = list(folder, "online")?.len();
    Ok(u32::try_from(online).unwrap_or(u32::MAX))
}

/// The CPUs of a list such as `0-2,4`.
fn list(folder: &Path, name: &str) -> Result<Vec<u32>, AgentError> {
    let file = folder.join(name);
    let failed = || AgentError::io(file.display().to_string());
    let text = fs::read_to_string(&file).map_err(failed())?;
    let parse = |text: &str| -> Option<Vec<u32>> {
        let mut cpus = Vec::new();
        for range in text.split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
        }
        Some(cpus)
    };
    parse(text.trim()).ok_or_else(|| failed()(io::Error::from(io::ErrorKind::InvalidData)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_brought_online_and_taken_off() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("possible", "0-3\n");
        write("online", "0,2\n");
        for cpu in 0..4 {
            fs::create_dir(dir.path().join(format!("cpu{cpu}"))).unwrap();
        }
        set_online_in(dir.path(), 2).unwrap();
        let told = |cpu: u32| fs::read_to_string(dir.path().join(format!("cpu{cpu}/online"))).ok();
        assert_eq!(told(0), None);
        assert_eq!(told(1).as_deref(), Some("1"));
        assert_eq!(told(2).as_deref(), Some("0"));
        assert_eq!(told(3), None);
        for count in [0, 5] {
            let e = set_online_in(dir.path(), count).unwrap_err();
            assert!(e.to_string().contains("1 to 4"), "{e}");
        }
        write("online", "x");
        set_online_in(dir.path(), 1).unwrap_err();
    }
}
