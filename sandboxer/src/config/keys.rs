//! Which keys exist, taken from the structs themselves.

use external_hv::cloud_hypervisor::ChConfig;
use external_hv::qemu::QemuConfig;
use external_hv::stratovirt::StratoConfig;
use serde_aux::serde_introspection::serde_introspect;

use super::{Config, Events, Fs, Hypervisor, Sandbox, Templates, Timeouts, Vm, Wasm};

/// A key further away than this many edits is no suggestion.
const MAX_EDITS: usize = 3;

/// The existing key of the same table that is most similar to `key`.
pub(super) fn nearest(key: &str) -> Option<String> {
    let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
    let known: &[&str] = match table {
        "" => serde_introspect::<Config>(),
        "sandbox" => serde_introspect::<Sandbox>(),
        "vm" => serde_introspect::<Vm>(),
        "hypervisor" => serde_introspect::<Hypervisor>(),
        "hypervisor.cloud-hypervisor" => serde_introspect::<ChConfig>(),
        "hypervisor.qemu" => serde_introspect::<QemuConfig>(),
        "hypervisor.stratovirt" => serde_introspect::<StratoConfig>(),
        "templates" => serde_introspect::<Templates>(),
        "fs" => serde_introspect::<Fs>(),
        "events" => serde_introspect::<Events>(),
        "wasm" => serde_introspect::<Wasm>(),
        "timeouts" => serde_introspect::<Timeouts>(),
        _ => &[],
    };
    let (edits, found) = similar(name, known)?;
    let limit = MAX_EDITS.min(name.len() / 2);
    (edits <= limit).then(|| match table {
        "" => found.to_owned(),
        _ => format!("{table}.{found}"),
    })
}

/// The most similar of `known` and how many edits away it is.
pub(super) fn similar<'a>(name: &str, known: &[&'a str]) -> Option<(usize, &'a str)> {
    known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), *candidate))
        .min()
}
