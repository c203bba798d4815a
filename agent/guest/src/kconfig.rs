//! Kernel configuration: fragments, and whether the kernel took them.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{GuestError, Result};
use crate::recipe::Input;

/// What `.config` calls an option that is off.
const OFF: &str = "n";

/// An option whose value is not the one a fragment asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Name of the option.
    pub option: String,
    /// What the fragment says.
    pub wanted: String,
    /// What the kernel's rules made of it.
    pub got: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={} (is {})", self.option, self.wanted, self.got)
    }
}

/// Options and their values; an option that is off has the value `n`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads fragments. They are lists of wishes that do not overlap: an option
    /// set twice is an error, as is a line that sets none.
    pub fn from_fragments(fragments: &[Input]) -> Result<Self> {
        let mut options = BTreeMap::new();
        for fragment in fragments {
            for (index, text) in fragment.text.lines().enumerate() {
                let line = index + 1;
                let (option, value) = match parse_line(text) {
                    Line::Set(option, value) => (option, value),
                    Line::Nothing => continue,
                    Line::Bad => {
                        return Err(GuestError::BadFragment {
                            fragment: fragment.name.clone(),
                            line,
                            text: text.to_owned(),
                        });
                    }
                };
                let before = options.insert(option.to_owned(), value.to_owned());
                if before.is_some() {
                    return Err(GuestError::DuplicateOption {
                        fragment: fragment.name.clone(),
                        line,
                        option: option.to_owned(),
                    });
                }
            }
        }
        Ok(Self(options))
    }

    /// Reads a finished `.config`.
    pub fn from_config(text: &str) -> Self {
        let set = text.lines().filter_map(|line| match parse_line(line) {
            Line::Set(option, value) => Some((option.to_owned(), value.to_owned())),
            Line::Nothing | Line::Bad => None,
        });
        Self(set.collect())
    }

    /// These options on top of a base configuration. They come last: among the
    /// members of a choice the kernel takes the last one that is set.
    pub fn on_top_of(&self, base: &str) -> String {
        let base = Self::from_config(base).0;
        let kept = base.iter().filter(|(name, _)| !self.0.contains_key(*name));
        let line = |(option, value): (&String, &String)| {
            if value == OFF {
                format!("# {option} is not set\n")
            } else {
                format!("{option}={value}\n")
            }
        };
        kept.chain(&self.0).map(line).collect()
    }

    /// The options that are not so in a finished configuration.
    pub fn missing_from(&self, config: &Self) -> Vec<Mismatch> {
        let differs = |(option, wanted): (&String, &String)| {
            let got = config.0.get(option).map_or(OFF, String::as_str);
            (got != wanted).then(|| Mismatch {
                option: option.clone(),
                wanted: wanted.clone(),
                got: got.to_owned(),
            })
        };
        self.0.iter().filter_map(differs).collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

enum Line<'a> {
    Set(&'a str, &'a str),
    Nothing,
    Bad,
}

fn parse_line(line: &str) -> Line<'_> {
    let line = line.trim();
    if let Some(comment) = line.strip_prefix('#') {
        let off = comment.trim_start().strip_suffix(" is not set");
        return match off {
            Some(option) if is_option(option) => Line::Set(option, OFF),
            _ => Line::Nothing,
        };
    }
    match line.split_once('=') {
        _ if line.is_empty() => Line::Nothing,
        Some((option, value)) if is_option(option) && !value.is_empty() => Line::Set(option, value),
        _ => Line::Bad,
    }
}

fn is_option(name: &str) -> bool {
    name.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty() && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Result<Options> {
        Options::from_fragments(&[Input::new("test", text)])
    }

    #[test]
    fn reads_both_spellings_and_skips_comments() {
        let text = "# why\n\nCONFIG_A=y\nCONFIG_B=\"x y\"\n# CONFIG_C is not set\nCONFIG_D=n\n";
        let read = options(text).unwrap();
        assert_eq!(
            read.on_top_of(""),
            "CONFIG_A=y\nCONFIG_B=\"x y\"\n# CONFIG_C is not set\n# CONFIG_D is not set\n"
        );
    }

    #[test]
    fn comes_after_a_base_without_what_it_replaces() {
        let base = "CONFIG_HZ_250=y\n# CONFIG_B is not set\n";
        let merged = options("CONFIG_B=y\nCONFIG_HZ_100=y\n").unwrap();
        assert_eq!(
            merged.on_top_of(base),
            "CONFIG_HZ_250=y\nCONFIG_B=y\nCONFIG_HZ_100=y\n"
        );
    }

    #[test]
    fn names_every_option_that_was_dropped() {
        let wanted =
            options("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=32\n# CONFIG_D is not set\n").unwrap();
        let config = Options::from_config("CONFIG_A=y\nCONFIG_C=64\nCONFIG_D=y\n");
        let names: Vec<_> = wanted
            .missing_from(&config)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            names,
            [
                "CONFIG_B=y (is n)",
                "CONFIG_C=32 (is 64)",
                "CONFIG_D=n (is y)"
            ]
        );
    }

    #[test]
    fn refuses_what_is_no_configuration() {
        for text in ["CONFIG_A", "A=y", "CONFIG_A=", "CONFIG_A y"] {
            assert!(
                matches!(options(text), Err(GuestError::BadFragment { line: 1, .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn refuses_an_option_set_twice_also_across_fragments() {
        let one = Input::new("one", "CONFIG_A=y\n");
        let two = Input::new("two", "\n# CONFIG_A is not set\n");
        assert!(matches!(
            Options::from_fragments(&[one, two]),
            Err(GuestError::DuplicateOption { line: 2, .. })
        ));
    }
}
