//! Mounts the host asks for.

use std::fs;
use std::io;
use std::path::Path;

use agent_api::rpc::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use tracing::warn;

use crate::error::AgentError;

/// Mounts `wanted`, making its target when it is missing.
pub fn mount(wanted: &Mount) -> Result<(), AgentError> {
    let target = Path::new(&wanted.target);
    if !target.is_absolute() {
        let why = format!("{:?} must be an absolute path", wanted.target);
        return Err(AgentError::invalid("mounts.target", why));
    }
    let (flags, data) = parse_options(&wanted.options);
    let source = if wanted.source.is_empty() {
        wanted.fstype.as_str()
    } else {
        wanted.source.as_str()
    };
    let attempt = || {
        nix::mount::mount(
            Some(source),
            target,
            Some(wanted.fstype.as_str()).filter(|t| !t.is_empty()),
            flags,
            Some(data.as_str()).filter(|d| !d.is_empty()),
        )
    };
    let mut result = attempt();
    if result == Err(Errno::ENOENT) {
        make_target(target, Path::new(source), flags).map_err(AgentError::io(&wanted.target))?;
        if wanted.fstype == "overlay" {
            make_overlay_folders(&wanted.options).map_err(AgentError::io("overlay"))?;
        }
        result = attempt();
    }
    result.map_err(|e| {
        if e == Errno::ENODEV {
            let why = format!(
                "{:?} is no file system of the guest's kernel",
                wanted.fstype
            );
            return AgentError::invalid("mounts.fstype", why);
        }
        let what = format!("mounting {source} ({}) on {}", wanted.fstype, wanted.target);
        AgentError::io(what)(e.into())
    })?;
    // The first bind call ignores every other flag.
    let rest = flags.difference(MsFlags::MS_BIND | MsFlags::MS_REC);
    if flags.contains(MsFlags::MS_BIND) && !rest.is_empty() {
        let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        if let Err(e) = nix::mount::mount(None::<&str>, target, None::<&str>, again, None::<&str>) {
            unmount(target);
            return Err(AgentError::io(format!("remounting {}", wanted.target))(
                e.into(),
            ));
        }
    }
    Ok(())
}

/// The folders of an overlay that are missing on a new writable layer.
fn make_overlay_folders(options: &[String]) -> io::Result<()> {
    for option in options {
        let folder = option
            .strip_prefix("upperdir=")
            .or_else(|| option.strip_prefix("workdir="));
        if let Some(folder) = folder {
            fs::create_dir_all(folder)?;
        }
    }
    Ok(())
}

/// A folder, or an empty file when a file is bound.
fn make_target(target: &Path, source: &Path, flags: MsFlags) -> io::Result<()> {
    if flags.contains(MsFlags::MS_BIND) && source.is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        return fs::write(target, "");
    }
    fs::create_dir_all(target)
}

/// Takes a mount away, also when it is in use; false when it stays.
pub fn unmount(target: &Path) -> bool {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Not a mount any more: what we want.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => true,
        Err(e) => {
            warn!("{} stays mounted: {e}", target.display());
            false
        }
    }
}

/// Splits mount(8) options into flags and what the file system itself understands.
pub fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "defaults" | "rw" | "" => {}
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = ["ro", "nodev", "size=64m", "mode=755"].map(String::from);
        let (flags, data) = parse_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, "size=64m,mode=755");
    }

    #[test]
    fn a_relative_target_is_refused() {
        let bad = Mount {
            target: "etc".into(),
            ..Default::default()
        };
        assert!(mount(&bad).unwrap_err().to_string().contains("absolute"));
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_quiet() {
        unmount(Path::new("/nonexistent"));
    }
}
