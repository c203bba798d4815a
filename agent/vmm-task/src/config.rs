//! Settings: the kernel command line in a guest, the environment elsewhere.

use std::path::PathBuf;

use agent_api::{CONTROL_PORT, STREAM_PORT};
use nix::libc::{VMADDR_CID_ANY, VMADDR_CID_HOST};
use tracing::level_filters::LevelFilter;

use crate::net::Endpoint;

/// Names the Unix socket to dial instead of the host's vsock port. Setting it tells the
/// agent that it is not PID 1 of a virtual machine: it then leaves kernel-wide settings
/// alone and ends instead of resetting the machine.
pub const DIAL_ENV: &str = "KUASAR_AGENT_DIAL";
/// Names the Unix socket to accept byte streams on; goes with [`DIAL_ENV`].
pub const LISTEN_ENV: &str = "KUASAR_AGENT_LISTEN";

/// Settings of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the host answers.
    pub dial: Endpoint,
    /// Where byte streams arrive.
    pub listen: Endpoint,
    /// Whether this is PID 1 of a virtual machine.
    pub guest: bool,
    /// What to log.
    pub params: Params,
}

/// Kernel parameters `task.*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// `task.log_level=<level>`, default info.
    pub log_level: LevelFilter,
    /// `task.debug`: also log the container runtime's inner steps.
    pub debug: bool,
    /// `task.control_port=<port>`: the host port to dial, where it is not [`CONTROL_PORT`].
    pub control_port: u32,
    /// `task.debug_shell=<path>`: the program of the debug console, which is off without.
    pub debug_shell: Option<PathBuf>,
    /// What could not be used, to be logged once logging works.
    pub warnings: Vec<String>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            log_level: LevelFilter::INFO,
            debug: false,
            control_port: CONTROL_PORT,
            debug_shell: None,
            warnings: Vec::new(),
        }
    }
}

impl Params {
    /// Reads the `task.*` parameters of a kernel command line.
    pub fn parse(cmdline: &str) -> Self {
        let mut params = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let Some(setting) = word.strip_prefix("task.") else {
                continue;
            };
            let (name, value) = match setting.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (setting, None),
            };
            match (name, value) {
                ("log_level", Some(level)) => match level.parse() {
                    Ok(level) => params.log_level = level,
                    Err(_) => params.warn(
                        word,
                        "the level must be off, error, warn, info, debug or trace",
                    ),
                },
                ("debug", None | Some("true" | "1")) => params.debug = true,
                ("debug", Some("false" | "0")) => params.debug = false,
                ("sharefs_type", Some("virtiofs")) => {}
                ("sharefs_type", _) => params.warn(word, "only virtiofs is shared with the host"),
                ("control_port", port) => match port.and_then(|port| port.parse().ok()) {
                    Some(port) => params.control_port = port,
                    None => params.warn(word, "must be a number"),
                },
                ("debug_shell", Some(path)) if path.starts_with('/') => {
                    params.debug_shell = Some(path.into());
                }
                ("debug_shell", _) => params.warn(word, "must be an absolute path"),
                ("enable_tracing", _) => params.warn(word, "not supported by this agent"),
                _ => params.warn(word, "unknown parameter"),
            }
        }
        params
    }

    fn warn(&mut self, word: &str, why: &str) {
        self.warnings
            .push(format!("kernel parameter {word}: {why}; ignored"));
    }
}

impl Config {
    /// Settings for PID 1 of a guest.
    pub const fn guest(params: Params) -> Self {
        Self {
            dial: Endpoint::Vsock {
                cid: VMADDR_CID_HOST,
                port: params.control_port,
            },
            listen: Endpoint::Vsock {
                cid: VMADDR_CID_ANY,
                port: STREAM_PORT,
            },
            guest: true,
            params,
        }
    }

    /// Settings from the environment, when it has them.
    pub fn nested() -> Option<Self> {
        let dial = PathBuf::from(std::env::var_os(DIAL_ENV)?);
        let listen = PathBuf::from(std::env::var_os(LISTEN_ENV)?);
        let level = std::env::var("TASK_LOG_LEVEL")
            .ok()
            .and_then(|l| l.parse().ok());
        Some(Self {
            dial: Endpoint::Unix(dial),
            listen: Endpoint::Unix(listen),
            guest: false,
            params: Params {
                log_level: level.unwrap_or(LevelFilter::INFO),
                ..Params::default()
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_parameters_take_effect_and_unknown_ones_warn() {
        let p = Params::parse(
            "console=ttyS0 task.log_level=debug task.debug quiet task.sharefs_type=virtiofs task.colour=blue",
        );
        assert_eq!(p.log_level, LevelFilter::DEBUG);
        assert!(p.debug);
        assert_eq!(p.warnings.len(), 1);
        assert!(
            p.warnings[0].contains("task.colour=blue"),
            "{:?}",
            p.warnings
        );
    }

    #[test]
    fn bad_values_keep_the_default() {
        let p = Params::parse(
            "task.log_level=loud task.sharefs_type=9p task.debug=maybe task.debug_shell=sh",
        );
        assert_eq!(p.log_level, LevelFilter::INFO);
        assert!(!p.debug);
        assert_eq!(p.debug_shell, None);
        assert_eq!(p.warnings.len(), 4);
    }

    #[test]
    fn the_debug_console_is_off_unless_a_shell_is_named() {
        assert_eq!(Params::parse("task.debug").debug_shell, None);
        let shell = Params::parse("task.debug_shell=/bin/sh").debug_shell;
        assert_eq!(shell, Some("/bin/sh".into()));
    }

    #[test]
    fn the_host_port_to_dial_is_the_usual_one_unless_another_is_named() {
        let port = |line| match Config::guest(Params::parse(line)).dial {
            Endpoint::Vsock { port, .. } => port,
            Endpoint::Unix(path) => panic!("{path:?}"),
        };
        assert_eq!(port("task.control_port=70000"), 70_000);
        assert_eq!(port("task.control_port=x"), CONTROL_PORT);
        assert_eq!(port(""), CONTROL_PORT);
    }

    #[test]
    fn an_empty_line_is_the_default() {
        assert_eq!(Params::parse("\n"), Params::default());
    }
}
