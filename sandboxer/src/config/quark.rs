//! `[quark]`: pods in Quark, for `quark-sandboxer`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `[quark]`: pods in Quark, for `quark-sandboxer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quark {
    /// Quark's program.
    pub path: PathBuf,
    /// Where Quark has its settings for this node, which are looked at when the daemon starts.
    pub node_config: PathBuf,
}

impl Default for Quark {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/usr/local/bin/quark"),
            node_config: PathBuf::from("/etc/quark/config.json"),
        }
    }
}

/// Why Quark's own settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("quark.node_config = {}: {why}", .path.display())]
pub struct QuarkNodeError {
    path: PathBuf,
    why: String,
}

impl Quark {
    /// Checks that Quark serves sandboxes rather than being a shim. Blocks.
    ///
    /// # Errors
    /// Its settings cannot be read, or say something else.
    pub fn check_node(&self) -> Result<(), QuarkNodeError> {
        let wrong = |why: String| QuarkNodeError {
            path: self.node_config.clone(),
            why,
        };
        let text = std::fs::read(&self.node_config)
            .map_err(|e| wrong(format!("{e}; copy config.json of Quark there")))?;
        let settings: serde_json::Value =
            serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        for (key, value) in [("Sandboxed", true), ("ShimMode", false)] {
            if settings.get(key).and_then(serde_json::Value::as_bool) != Some(value) {
                return Err(wrong(format!("{key} must be {value} there")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quark_has_to_serve_sandboxes() {
        let dir = tempfile::tempdir().unwrap();
        let quark = Quark {
            node_config: dir.path().join("config.json"),
            ..Quark::default()
        };
        let check = |text: &str| {
            std::fs::write(&quark.node_config, text).unwrap();
            quark.check_node().map_err(|e| e.to_string())
        };
        check(r#"{"Sandboxed": true, "ShimMode": false, "UringIO": true}"#).unwrap();
        for (text, says) in [
            (
                r#"{"Sandboxed": false, "ShimMode": false}"#,
                "Sandboxed must be true",
            ),
            (
                r#"{"Sandboxed": true, "ShimMode": true}"#,
                "ShimMode must be false",
            ),
            (r#"{"Sandboxed": true}"#, "ShimMode must be false"),
            ("[", "quark.node_config = "),
        ] {
            let why = check(text).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
        std::fs::remove_file(&quark.node_config).unwrap();
        let why = quark.check_node().unwrap_err().to_string();
        assert!(why.contains("copy config.json of Quark"), "{why}");
    }
}
