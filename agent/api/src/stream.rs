//! The header line that opens every byte stream, of a process or to a port.
//!
//! The host connects to guest port [`crate::STREAM_PORT`] and sends
//! `<container>/<exec>/<stdin|stdout|stderr>\n`, where `<exec>` is empty for the
//! container's init process. Everything after the newline is payload. The direction
//! follows from the kind; the other direction carries nothing.
//!
//! `tcp/<port>\n` instead connects to that port on the guest's loopback interface, and bytes
//! go both ways; the stream ends at once where nobody listens.
//!
//! `console/<columns>x<rows>\n` opens the debug console: a shell in the guest itself, on a
//! terminal of that size, or without one for `0x0`. The guest answers [`CONSOLE_OPEN`], or one
//! line that says why not; after that bytes go both ways.

use std::fmt;
use std::str::FromStr;

/// Longest header, newline included, in bytes: two 256-byte ids and the kind.
pub const MAX_HEADER_BYTES: usize = 544;

/// Longest container or exec id, in bytes.
pub const MAX_ID_BYTES: usize = 256;

/// The guest's answer when the debug console is open.
pub const CONSOLE_OPEN: &[u8] = b"OK\n";

/// Which of a process's streams a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Host to guest.
    Stdin,
    /// Guest to host; with a terminal, everything the terminal shows.
    Stdout,
    /// Guest to host.
    Stderr,
}

impl StreamKind {
    /// The name used in the header.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Names one byte stream of one process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId {
    /// Container the process belongs to.
    pub container_id: String,
    /// Exec id; empty for the init process.
    pub exec_id: String,
    /// Which stream.
    pub kind: StreamKind,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

impl TerminalSize {
    /// No terminal.
    pub const NONE: Self = Self {
        columns: 0,
        rows: 0,
    };
}

/// What a header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// A stream of a process.
    Process(StreamId),
    /// A TCP port of the guest.
    Tcp(u16),
    /// The debug console.
    Console(TerminalSize),
}

impl FromStr for Header {
    type Err = HeaderError;

    /// Parses a header without its newline.
    fn from_str(line: &str) -> Result<Self, HeaderError> {
        match line.split_once('/') {
            Some(("tcp", port)) if !port.contains('/') => match port.parse() {
                Ok(port) if port > 0 => Ok(Self::Tcp(port)),
                _ => Err(HeaderError::Port),
            },
            Some(("console", size)) if !size.contains('/') => {
                let (columns, rows) = size.split_once('x').ok_or(HeaderError::Size)?;
                let number = |text: &str| text.parse().map_err(|_| HeaderError::Size);
                Ok(Self::Console(TerminalSize {
                    columns: number(columns)?,
                    rows: number(rows)?,
                }))
            }
            _ => line.parse().map(Self::Process),
        }
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(id) => id.fmt(f),
            Self::Tcp(port) => write!(f, "tcp/{port}"),
            Self::Console(size) => write!(f, "console/{}x{}", size.columns, size.rows),
        }
    }
}

/// Why a header was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not three `/`-separated fields.
    #[error("stream header must be <container>/<exec>/<kind>")]
    Shape,
    /// An id is empty where it must not be, too long, or has a character outside
    /// `A-Z a-z 0-9 _ - . +`.
    #[error("stream header has an invalid {0} id")]
    Id(&'static str),
    /// Not one of stdin, stdout, stderr.
    #[error("stream kind must be stdin, stdout or stderr")]
    Kind,
    /// Not a port number.
    #[error("the port must be 1 to 65535")]
    Port,
    /// Not a size of a terminal.
    #[error("the size of the terminal must be <columns>x<rows>")]
    Size,
}

/// Whether `id` may name a container or an exec: 1 to [`MAX_ID_BYTES`] bytes of
/// `A-Z a-z 0-9 _ - . +`, and neither `.` nor `..` (ids become file names).
#[must_use]
pub fn valid_id(id: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'+');
    !id.is_empty() && id.len() <= MAX_ID_BYTES && id != "." && id != ".." && id.bytes().all(allowed)
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}/{}",
            self.container_id,
            self.exec_id,
            self.kind.as_str()
        )
    }
}

impl FromStr for StreamId {
    type Err = HeaderError;

    /// Parses a header without its newline.
    fn from_str(line: &str) -> Result<Self, HeaderError> {
        let mut fields = line.split('/');
        let (Some(container), Some(exec), Some(kind), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(HeaderError::Shape);
        };
        if !valid_id(container) {
            return Err(HeaderError::Id("container"));
        }
        if !exec.is_empty() && !valid_id(exec) {
            return Err(HeaderError::Id("exec"));
        }
        let kind = match kind {
            "stdin" => StreamKind::Stdin,
            "stdout" => StreamKind::Stdout,
            "stderr" => StreamKind::Stderr,
            _ => return Err(HeaderError::Kind),
        };
        Ok(Self {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            kind,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_could_climb_out_of_a_folder() {
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "a\nb",
            "a b",
            "\u{e9}",
            &"x".repeat(257),
        ] {
            assert!(!valid_id(id), "{id:?}");
        }
    }

    #[test]
    fn refuses_wrong_shapes() {
        for (line, error) in [
            ("", HeaderError::Shape),
            ("a/stdin", HeaderError::Shape),
            ("a/b/stdin/x", HeaderError::Shape),
            ("/b/stdin", HeaderError::Id("container")),
            ("a/../stdin", HeaderError::Id("exec")),
            ("a/..\u{0}/stdin", HeaderError::Id("exec")),
            ("a/b/stdio", HeaderError::Kind),
        ] {
            assert_eq!(line.parse::<StreamId>(), Err(error), "{line:?}");
        }
    }

    #[test]
    fn a_port_is_no_process() {
        for (line, header) in [
            ("tcp/80", Ok(Header::Tcp(80))),
            ("tcp/0", Err(HeaderError::Port)),
            ("tcp/65536", Err(HeaderError::Port)),
            ("tcp/", Err(HeaderError::Port)),
        ] {
            assert_eq!(line.parse::<Header>(), header, "{line:?}");
        }
        let container = "tcp//stdin".parse::<Header>().unwrap();
        assert!(matches!(container, Header::Process(_)), "{container:?}");
        assert_eq!(Header::Tcp(80).to_string(), "tcp/80");
    }

    #[test]
    fn a_console_has_a_size() {
        let size = TerminalSize {
            columns: 80,
            rows: 24,
        };
        let header = Header::Console(size);
        assert_eq!(header.to_string(), "console/80x24");
        assert_eq!("console/80x24".parse(), Ok(header));
        assert_eq!(
            "console/0x0".parse(),
            Ok(Header::Console(TerminalSize::NONE))
        );
        for line in [
            "console/",
            "console/80",
            "console/80x-1",
            "console/80x65536",
        ] {
            assert_eq!(line.parse::<Header>(), Err(HeaderError::Size), "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trips(c in "[A-Za-z0-9_.+-]{1,256}", e in "[A-Za-z0-9_.+-]{0,256}", k in 0..3_usize) {
            prop_assume!(valid_id(&c) && (e.is_empty() || valid_id(&e)));
            let kind = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr][k];
            let id = StreamId { container_id: c, exec_id: e, kind };
            let line = id.to_string();
            prop_assert!(line.len() < MAX_HEADER_BYTES);
            prop_assert_eq!(line.parse::<StreamId>(), Ok(id));
        }

        #[test]
        fn never_panics(line in "\\PC*") {
            let _ = line.parse::<StreamId>();
        }
    }
}
