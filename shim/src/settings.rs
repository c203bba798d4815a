//! Where the daemon listens. containerd passes its shims no options of ours, so there are an
//! environment variable (of containerd itself) and a file besides the flag.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::arguments::Arguments;
use crate::{Error, Runtime};

/// TOML with one socket per runtime; may be absent.
pub(crate) const FILE: &str = "/var/lib/kuasar/shim.toml";

/// Name of the environment variable of a runtime.
pub(crate) fn variable(key: &str) -> String {
    format!("KUASAR_{}_SANDBOXER", key.to_uppercase())
}

/// The socket of the daemon behind `runtime`.
///
/// # Errors
/// The file is not what it should be, or the path is not absolute.
pub(crate) fn sandboxer(runtime: &Runtime, arguments: &Arguments) -> Result<PathBuf, Error> {
    let variable = variable(runtime.key);
    let (from, path) = if let Some(path) = &arguments.sandboxer {
        ("-sandboxer".to_owned(), path.clone())
    } else if let Some(path) = std::env::var_os(&variable) {
        (variable, path.into())
    } else if let Some(path) = from_file(Path::new(FILE), runtime.key)? {
        (format!("{FILE}: {}", runtime.key), path)
    } else {
        return Ok(runtime.socket.into());
    };
    if path.is_absolute() {
        return Ok(path);
    }
    let path = path.display();
    Err(Error::Settings(format!(
        "{from} = {path:?}: must be the absolute path of the socket of {}",
        runtime.daemon,
        path = path.to_string(),
    )))
}

fn from_file(file: &Path, key: &str) -> Result<Option<PathBuf>, Error> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(format!("reading {}", file.display()))(e)),
    };
    let mut sockets: BTreeMap<String, PathBuf> =
        toml::from_str(&text).map_err(|e| Error::Settings(format!("{}: {e}", file.display())))?;
    const KEYS: [&str; 3] = ["vmm", "wasm", "quark"];
    if let Some(unknown) = sockets.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(Error::Settings(format!(
            "{}: unknown key `{unknown}`; there are `vmm`, `wasm` and `quark`",
            file.display()
        )));
    }
    Ok(sockets.remove(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_one_socket_per_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shim.toml");
        assert_eq!(from_file(&file, "vmm").unwrap(), None);
        std::fs::write(&file, "vmm = \"/run/a.sock\"\n").unwrap();
        assert_eq!(from_file(&file, "vmm").unwrap(), Some("/run/a.sock".into()));
        assert_eq!(from_file(&file, "wasm").unwrap(), None);
        std::fs::write(&file, "vm = \"/run/a.sock\"\n").unwrap();
        let why = from_file(&file, "vmm").unwrap_err().to_string();
        assert!(why.contains("`vm`"), "{why}");
    }
}
