//! Command lines.

/// Options one after the other, as QEMU and StratoVirt take them.
#[derive(Debug, Default)]
pub(crate) struct Args(Vec<String>);

impl Args {
    pub(crate) fn add(&mut self, option: &str, value: impl Into<String>) {
        self.flag(option);
        self.0.push(value.into());
    }

    pub(crate) fn flag(&mut self, option: &str) {
        self.0.push(format!("-{option}"));
    }
}

impl From<Args> for Vec<String> {
    fn from(args: Args) -> Self {
        args.0
    }
}
