//! Which kind of file a program is.

use crate::error::{Result, WasmError};

/// How a program is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Binary, a core module.
    Module,
    /// Binary, a component.
    Component,
    /// Either, as text.
    Text,
}

const MAGIC: &[u8] = b"\0asm";
/// Version 1, layer 0.
const MODULE: &[u8] = &[1, 0, 0, 0];
/// Version 13, layer 1.
const COMPONENT: &[u8] = &[13, 0, 1, 0];

const NO_WASM: &str = "build it for wasm32-wasip1 or wasm32-wasip2";

impl Format {
    /// Looks at the first bytes.
    pub(crate) fn of(name: &str, bytes: &[u8]) -> Result<Self> {
        let not_wasm = |found, fix| {
            Err(WasmError::NotWasm {
                name: name.to_owned(),
                found,
                fix,
            })
        };
        if let Some(rest) = bytes.strip_prefix(MAGIC) {
            return match rest.get(..4) {
                Some(version) if version == MODULE => Ok(Self::Module),
                Some(version) if version == COMPONENT => Ok(Self::Component),
                Some(version) => Err(WasmError::Invalid {
                    name: name.to_owned(),
                    reason: format!(
                        "its version is {version:?}; known are core modules of version 1 and \
                         components of version 13"
                    ),
                }),
                None => Err(WasmError::Invalid {
                    name: name.to_owned(),
                    reason: "the file ends within its first 8 bytes".to_owned(),
                }),
            };
        }
        if bytes.starts_with(b"\x7fELF") {
            if wasmtime::Engine::detect_precompiled(bytes).is_some() {
                return not_wasm(
                    "code that was compiled already",
                    "such code cannot be checked; name the .wasm file, it is compiled once and kept",
                );
            }
            return not_wasm(
                "a Linux program (ELF)",
                "run its image with a runtime class for Linux containers",
            );
        }
        if bytes.starts_with(b"#!") {
            return not_wasm(
                "a script",
                "run its image with a runtime class for Linux containers",
            );
        }
        if bytes.is_empty() {
            return not_wasm("an empty file", NO_WASM);
        }
        let text = std::str::from_utf8(bytes).map(str::trim_start);
        if text.is_ok_and(|text| text.starts_with('(') || text.starts_with(";;")) {
            return Ok(Self::Text);
        }
        not_wasm("a file of unknown format", NO_WASM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_apart() {
        let of = |bytes: &[u8]| Format::of("a", bytes);
        assert_eq!(of(b"\0asm\x01\0\0\0").unwrap(), Format::Module);
        assert_eq!(of(b"\0asm\x0d\0\x01\0").unwrap(), Format::Component);
        assert_eq!(of(b"  (module)").unwrap(), Format::Text);
        assert_eq!(of(b";; x\n(component)").unwrap(), Format::Text);
        for (bytes, part) in [
            (&b"\x7fELF\x02"[..], "a Linux program (ELF)"),
            (b"#!/bin/sh", "a script"),
            (b"", "an empty file"),
            (b"\xff\xfe", "unknown format"),
            (b"\0as", "unknown format"),
            (b"\0asm", "ends within"),
            (b"\0asm\x02\0\0\0", "version"),
        ] {
            let message = of(bytes).unwrap_err().to_string();
            assert!(
                message.starts_with("a is ") && message.contains(part),
                "{message}"
            );
        }
    }
}
