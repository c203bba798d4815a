//! What the kernel build needs on this machine.

use std::env;
use std::path::Path;

/// Something the kernel build needs that is not installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingTool {
    /// The program or header.
    pub tool: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
}

/// Programs, and the packages they come in.
const PROGRAMS: &[MissingTool] = &[
    needs("bc", "bc"),
    needs("bison", "bison"),
    needs("flex", "flex"),
    needs("gcc", "gcc"),
    needs("ld", "binutils"),
    needs("make", "make"),
    needs("patch", "patch"),
    needs("perl", "perl"),
    needs("tar", "tar"),
    needs("xz", "xz-utils"),
];

/// Headers; `objtool` is built from them.
const HEADERS: &[MissingTool] = &[needs("/usr/include/libelf.h", "libelf-dev")];

const fn needs(tool: &'static str, package: &'static str) -> MissingTool {
    MissingTool { tool, package }
}

/// What has to be installed before a kernel can be built; empty when nothing.
pub fn missing_packages() -> Vec<MissingTool> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = env::split_paths(&path).collect();
    let in_path = |tool: &str| folders.iter().any(|dir| dir.join(tool).is_file());
    let missing_program = PROGRAMS.iter().filter(|m| !in_path(m.tool));
    let missing_header = HEADERS.iter().filter(|m| !Path::new(m.tool).is_file());
    missing_program.chain(missing_header).copied().collect()
}

#[cfg(test)]
mod tests {
    use crate::GuestError;

    use super::*;

    #[test]
    fn the_error_names_each_package_once() {
        let error = GuestError::MissingTools(vec![
            needs("bc", "bc"),
            needs("x", "bc"),
            needs("flex", "flex"),
        ]);
        assert_eq!(
            error.to_string(),
            "the kernel build needs bc, x, flex: install with `apt-get install bc flex`"
        );
    }
}
