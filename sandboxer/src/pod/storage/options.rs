//! Mount options as containerd and OCI write them.

use nix::mount::MsFlags;

/// Options split into what `mount(2)` takes apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// Flags of the mount.
    pub(super) flags: MsFlags,
    /// Everything else, comma separated, for the file system.
    pub(super) data: String,
    /// Whether submounts of a bind come along.
    pub(super) recursive: bool,
    /// Whether mounts made on the host later appear below it.
    pub(super) follows_host: bool,
}

impl MountOptions {
    pub(super) fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut flags = MsFlags::empty();
        let mut data: Vec<&str> = Vec::new();
        let mut recursive = false;
        let mut follows_host = false;
        for option in options {
            match option.as_ref() {
                "" | "defaults" | "rw" | "bind" | "private" | "rprivate" | "unbindable"
                | "runbindable" => {}
                "rbind" => recursive = true,
                "slave" | "rslave" | "shared" | "rshared" => follows_host = true,
                "ro" | "rro" => flags |= MsFlags::MS_RDONLY,
                "nosuid" => flags |= MsFlags::MS_NOSUID,
                "suid" => flags -= MsFlags::MS_NOSUID,
                "nodev" => flags |= MsFlags::MS_NODEV,
                "dev" => flags -= MsFlags::MS_NODEV,
                "noexec" => flags |= MsFlags::MS_NOEXEC,
                "exec" => flags -= MsFlags::MS_NOEXEC,
                "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
                "dirsync" => flags |= MsFlags::MS_DIRSYNC,
                "noatime" => flags |= MsFlags::MS_NOATIME,
                "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
                "relatime" => flags |= MsFlags::MS_RELATIME,
                "strictatime" => flags |= MsFlags::MS_STRICTATIME,
                other => data.push(other),
            }
        }
        Self {
            flags,
            data: data.join(","),
            recursive,
            follows_host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_options_keep_their_data() {
        let options =
            MountOptions::parse(&["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"]);
        assert_eq!(
            options.data,
            "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b"
        );
        assert!(options.flags.is_empty());
    }

    #[test]
    fn bind_options_are_flags_only() {
        let options = MountOptions::parse(&["rbind", "rslave", "ro", "nosuid"]);
        assert!(options.recursive && options.follows_host);
        assert_eq!(options.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(options.data, "");
    }

    #[test]
    fn later_options_win() {
        assert!(
            !MountOptions::parse(&["nodev", "dev"])
                .flags
                .contains(MsFlags::MS_NODEV)
        );
    }
}
