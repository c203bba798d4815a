//! Who a container runs as: names are looked up in the image's own `/etc/passwd` and
//! `/etc/group`, never in the host's.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::str::FromStr;

use super::RootDir;

/// Larger account files are refused.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// `user[:group]`, each a name or a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserSpec {
    user: String,
    group: Option<String>,
}

/// Numbers for the OCI `process.user`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups, sorted, without `gid`.
    pub additional_gids: Vec<u32>,
    /// Home folder from `/etc/passwd`, if the user is listed.
    pub home: Option<String>,
}

/// Why a user cannot be resolved.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not `user[:group]`.
    #[error("user {0:?} must be NAME|UID[:NAME|GID]")]
    Syntax(String),
    /// A name that is not in the image.
    #[error("{kind} {name:?} is not in the image's {file}; use a number")]
    Unknown {
        /// "user" or "group".
        kind: &'static str,
        /// The name.
        name: String,
        /// The file looked in.
        file: &'static str,
    },
    /// An account file that cannot be read.
    #[error("cannot read {file} of the image")]
    Read {
        /// The file.
        file: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl FromStr for UserSpec {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let good = |s: &str| {
            !s.is_empty() && !s.contains(|c: char| c == ':' || c == ',' || c.is_whitespace())
        };
        if !good(user) || !group.is_none_or(good) {
            return Err(UserError::Syntax(text.to_owned()));
        }
        Ok(Self {
            user: user.to_owned(),
            group: group.map(ToOwned::to_owned),
        })
    }
}

impl UserSpec {
    /// Looks the names up in the account files of a container, whose layers `roots` are,
    /// topmost first. A number that is not listed is used as it is.
    ///
    /// # Errors
    /// [`UserError::Unknown`] for a name that is not there, [`UserError::Read`] for files that
    /// cannot be read (missing ones are empty).
    pub fn resolve(&self, roots: &[RootDir]) -> Result<Identity, UserError> {
        let passwd = read(roots, "/etc/passwd")?;
        let group = read(roots, "/etc/group")?;
        let number = self.user.parse::<u32>().ok();
        let account = accounts(&passwd)
            .find(|a| a.name == self.user)
            .or_else(|| accounts(&passwd).find(|a| Some(a.uid) == number));
        let uid = match (&account, number) {
            (Some(account), _) => account.uid,
            (None, Some(number)) => number,
            (None, None) => return Err(unknown("user", &self.user, "/etc/passwd")),
        };
        let primary = match &self.group {
            None => account.as_ref().map_or(0, |a| a.gid),
            Some(name) => match groups(&group).find(|g| g.name == name) {
                Some(found) => found.gid,
                None => name
                    .parse()
                    .map_err(|_| unknown("group", name, "/etc/group"))?,
            },
        };
        // An explicit group means: this group only.
        let mut additional_gids: Vec<u32> = match (&account, &self.group) {
            (Some(account), None) => groups(&group)
                .filter(|g| g.gid != primary && g.members.split(',').any(|m| m == account.name))
                .map(|g| g.gid)
                .collect(),
            _ => Vec::new(),
        };
        additional_gids.sort_unstable();
        additional_gids.dedup();
        Ok(Identity {
            uid,
            gid: primary,
            additional_gids,
            home: account
                .map(|a| a.home.to_owned())
                .filter(|home| !home.is_empty()),
        })
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Lines of `passwd(5)`; what does not parse is no account.
fn accounts(text: &str) -> impl Iterator<Item = Account<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// Lines of `group(5)`.
fn groups(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default().trim();
        Some(Group { name, gid, members })
    })
}

/// The topmost file; empty where no layer has one.
fn read(roots: &[RootDir], file: &'static str) -> Result<String, UserError> {
    for root in roots {
        match root.read(Path::new(file), MAX_FILE_BYTES) {
            Ok(content) => return Ok(String::from_utf8_lossy(&content).into_owned()),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(source) => return Err(UserError::Read { file, source }),
        }
    }
    Ok(String::new())
}

fn unknown(kind: &'static str, name: &str, file: &'static str) -> UserError {
    UserError::Unknown {
        kind,
        name: name.to_owned(),
        file,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, RootDir) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:5:5::/:\nweb:x:33:34:Web:/var/www:/bin/sh\n\
             7:x:70:71::/seven:\n",
        )
        .unwrap();
        fs::write(
            dir.path().join("etc/group"),
            "root:x:0:\nweb:x:34:web\nlog:x:4:alice,web\nvideo:x:44:web\nstaff:x:50:alice\n",
        )
        .unwrap();
        let root = RootDir::open(dir.path()).unwrap();
        (dir, root)
    }

    fn resolve(text: &str) -> Result<Identity, UserError> {
        let (_dir, root) = root();
        text.parse::<UserSpec>()?.resolve(&[root])
    }

    #[test]
    fn names_and_numbers() {
        let web = resolve("web").unwrap();
        assert_eq!((web.uid, web.gid), (33, 34));
        assert_eq!(web.additional_gids, [4, 44]);
        assert_eq!(web.home.as_deref(), Some("/var/www"));
        assert_eq!(resolve("33").unwrap(), web);
        assert_eq!(
            resolve("1234").unwrap(),
            Identity {
                uid: 1234,
                ..Identity::default()
            }
        );
        let explicit = resolve("web:staff").unwrap();
        assert_eq!((explicit.uid, explicit.gid), (33, 50));
        assert!(explicit.additional_gids.is_empty());
        assert_eq!(resolve("5000:6000").unwrap().gid, 6000);
        // A name made of digits is a name first.
        assert_eq!(resolve("7").unwrap().uid, 70);
    }

    #[test]
    fn unknown_names_are_named() {
        assert_eq!(
            resolve("nobody").unwrap_err().to_string(),
            "user \"nobody\" is not in the image's /etc/passwd; use a number"
        );
        assert!(matches!(
            resolve("0:nogroup"),
            Err(UserError::Unknown { kind: "group", .. })
        ));
        for text in ["", ":", "a:", ":b", "a b", "a:b:c", "-1", "4294967296"] {
            assert!(resolve(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn account_files_are_the_images_own() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("/etc/shadow-of-host", dir.path().join("etc/passwd")).unwrap();
        symlink("../../../../../../etc/group", dir.path().join("etc/group")).unwrap();
        let root = RootDir::open(dir.path()).unwrap();
        let spec: UserSpec = "root:root".parse().unwrap();
        // Both links end at missing files or at themselves inside the root.
        spec.resolve(&[root]).unwrap_err();
        let empty = tempfile::tempdir().unwrap();
        let root = RootDir::open(empty.path()).unwrap();
        let spec: UserSpec = "0:0".parse().unwrap();
        assert_eq!(spec.resolve(&[root]).unwrap(), Identity::default());
    }
}
