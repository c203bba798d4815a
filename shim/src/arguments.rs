//! What containerd calls these programs with: Go flags with one dash, then an action.

use std::path::PathBuf;

use crate::Runtime;

/// What is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say how the program is used.
    #[default]
    Help,
    /// `-v`.
    Version,
    /// `-info`.
    Info,
    /// See that a process serves the pod, and say where.
    Start,
    /// Clean up after a pod or container that nobody serves any more.
    Delete,
    /// Be that process; its stdin is the socket it listens on.
    Serve,
}

/// The arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    /// Of the container or the sandbox.
    pub(crate) id: String,
    /// containerd's gRPC socket; iSulad gives none.
    pub(crate) address: String,
    /// Given with `delete`.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
    /// The daemon's socket; overrides environment and settings.
    pub(crate) sandboxer: Option<PathBuf>,
    /// The socket that `serve` listens on, to be removed at the end.
    pub(crate) socket: Option<PathBuf>,
}

impl Arguments {
    /// Parses the arguments after the program's name.
    ///
    /// # Errors
    /// A flag or an action is not known, or a flag lacks its value.
    pub(crate) fn parse(given: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut action = None;
        let mut given = given.into_iter();
        while let Some(word) = given.next() {
            let Some(flag) = word.strip_prefix('-') else {
                action = Some(named(&word)?);
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (flag, inline) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            match flag {
                "debug" => {
                    parsed.debug = true;
                    continue;
                }
                "info" => return Ok(parsed.with(Action::Info)),
                "v" | "version" => return Ok(parsed.with(Action::Version)),
                "h" | "help" => return Ok(parsed.with(Action::Help)),
                _ => {}
            }
            let mut value = || {
                inline
                    .clone()
                    .or_else(|| given.next())
                    .ok_or_else(|| format!("-{flag} needs a value; see -h"))
            };
            match flag {
                "namespace" => parsed.namespace = value()?,
                "id" => parsed.id = value()?,
                "address" => parsed.address = value()?,
                "bundle" => parsed.bundle = Some(value()?.into()),
                "sandboxer" => parsed.sandboxer = Some(value()?.into()),
                "socket" => parsed.socket = Some(value()?.into()),
                "publish-binary" => {
                    let _ = value()?;
                }
                _ => return Err(format!("unknown flag -{flag}; see -h")),
            }
        }
        let action = action.ok_or("an action is missing: start or delete; see -h")?;
        if parsed.id.is_empty() {
            return Err("-id is missing: it names the sandbox or the container".to_owned());
        }
        Ok(parsed.with(action))
    }

    fn with(self, action: Action) -> Self {
        Self { action, ..self }
    }
}

fn named(action: &str) -> Result<Action, String> {
    match action {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "serve" => Ok(Action::Serve),
        other => Err(format!("{other:?} is neither start nor delete; see -h")),
    }
}

/// The text of `-h`.
pub(crate) fn help(runtime: &Runtime) -> String {
    let Runtime {
        program,
        name,
        key,
        daemon,
        socket,
        serves,
    } = runtime;
    let about = if *serves {
        format!("Serves one pod of the runtime {name} for containerd, out of {daemon}.")
    } else {
        format!("Cleans up after pods of the runtime {name}, which {daemon} serves.")
    };
    format!(
        "{about}
Called by containerd:

  {program} -namespace NS -id ID -address SOCKET [-debug] start
  {program} -namespace NS -id ID -address SOCKET -bundle DIR delete
  {program} -info | -v | -h

The daemon's socket, the first that is given:
  -sandboxer SOCKET
  {variable}=SOCKET in the environment
  {key} = \"SOCKET\" in {file}
  {socket}
",
        variable = crate::settings::variable(key),
        file = crate::settings::FILE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Arguments, String> {
        Arguments::parse(text.split(' ').map(str::to_owned))
    }

    #[test]
    fn flags_have_one_dash_and_the_action_comes_last() {
        let parsed = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc \
             -bundle /run/b -debug delete",
        )
        .unwrap();
        let expected = Arguments {
            action: Action::Delete,
            namespace: "k8s.io".to_owned(),
            id: "abc".to_owned(),
            address: "/run/c.sock".to_owned(),
            bundle: Some(PathBuf::from("/run/b")),
            debug: true,
            ..Default::default()
        };
        assert_eq!(parsed, expected);
    }

    #[test]
    fn isulad_has_two_dashes_and_no_address() {
        let parsed = parse("--id abc --namespace isula start").unwrap();
        assert_eq!((parsed.id.as_str(), parsed.action), ("abc", Action::Start));
        assert_eq!(parsed.address, "");
    }

    #[test]
    fn questions_need_no_id() {
        for (text, action) in [
            ("-info", Action::Info),
            ("-v", Action::Version),
            ("-namespace=x -h", Action::Help),
        ] {
            assert_eq!(parse(text).unwrap().action, action, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("-other start", "-other"),
            ("-id", "-id needs a value"),
            ("-id x dance", "dance"),
            ("-id x", "an action is missing"),
            ("start", "-id is missing"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(named), "{text}: {why}");
        }
    }
}
