//! What containerd shows of a runtime.

use prost::Message;

use crate::rpc::printed::{RuntimeInfo, RuntimeVersion};
use crate::{Runtime, VERSION};

/// The answer to `-info`.
pub(crate) fn info(runtime: &Runtime) -> Vec<u8> {
    let info = RuntimeInfo {
        name: runtime.name.to_owned(),
        version: Some(RuntimeVersion {
            version: VERSION.to_owned(),
            revision: String::new(),
        }),
    };
    info.encode_to_vec()
}
