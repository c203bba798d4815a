//! The line that opens every byte stream between host and guest.
#![no_main]

use agent_api::stream::{StreamId, valid_id};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &str| {
    let Ok(id) = line.parse::<StreamId>() else {
        return;
    };
    // Ids become file names.
    assert!(valid_id(&id.container_id));
    assert!(id.exec_id.is_empty() || valid_id(&id.exec_id));
    assert_eq!(id.to_string(), line);
});
