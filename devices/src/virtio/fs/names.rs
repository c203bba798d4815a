//! Names that a guest sends.

use std::ffi::CStr;
use std::io;

/// An error number as an error.
pub fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// A name that denotes an entry of its directory and nothing else.
///
/// # Errors
/// EINVAL for an empty name, `.`, `..`, or one with a slash.
pub fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for good in [c"a", c"...", c".hidden", c"..x", c"with space"] {
            assert_eq!(component(good).unwrap(), good);
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"/etc", c"../x", c"a/"] {
            let err = component(bad).unwrap_err();
            assert_eq!(err.raw_os_error(), Some(libc::EINVAL), "{bad:?}");
        }
    }
}
