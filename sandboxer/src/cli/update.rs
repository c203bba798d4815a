//! `kuasar-ctl update`: new limits for a running container.

use bytesize::ByteSize;
use clap::Args;
use serde_json::{Value, json};

use super::args::Global;
use super::error::Result;
use super::output;
use super::pods::find;
use super::spec::limits;
use super::values::{self, Cpus};

/// Changes the limits of a running pod's containers; the VM grows where they are above its size
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  kuasar-ctl update --memory 512MiB --cpus 2 web

The VM grows as far as vm.max_memory and vm.max_vcpus of the daemon's configuration allow.")]
pub(super) struct UpdateArgs {
    /// Name or id, or the beginning of an id
    pod: String,
    /// CPUs, for instance 2 or 0.5
    #[arg(long, value_name = "N", required_unless_present = "memory")]
    cpus: Option<Cpus>,
    /// Memory of each container, for instance 256MiB
    #[arg(long, value_name = "SIZE", value_parser = values::memory)]
    memory: Option<ByteSize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn update(global: &Global, args: &UpdateArgs) -> Result<()> {
    let found = find(global, &args.pod).await?;
    let task = found.task().await?;
    for container in found.container_ids() {
        task.update(&container, &args.resources()).await?;
    }
    if args.json {
        return output::json(&json!({ "updated": found.pod.id }));
    }
    output::line(&found.pod.id)
}

impl UpdateArgs {
    /// OCI `LinuxResources`.
    fn resources(&self) -> Value {
        Value::Object(limits(self.memory, self.cpus))
    }
}
