//! Boots a Linux kernel in a microVM and shows its console: the library's front door.
//!
//! ```text
//! cargo run --example boot -- vmlinux initramfs.cpio [vcpus [MiB [parameters...]]]
//! ```

use std::error::Error;
use std::time::Duration;

use vmm_core::vm::Vm;
use vmm_core::{DeviceSet, Host, Machine, MachineConfig};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args
        .next()
        .ok_or("usage: boot KERNEL INITRAMFS [VCPUS [MIB [PARAMETER...]]]")?;

    // What this host's KVM can do; probed once and passed around.
    let host = Host::probe()?;

    // What the machine is made of.
    let mut config = MachineConfig::new("boot", kernel);
    config.initramfs = args.next().map(Into::into);
    config.vcpus = args.next().map_or(Ok(1), |count| count.parse())?;
    config.memory_bytes = args.next().map_or(Ok(128), |mib| mib.parse::<u64>())? << 20;
    config.cmdline = args.collect::<Vec<_>>().join(" ");
    config.console.echo = true;
    config.devices = DeviceSet::new().with_rng()?;

    // The machine: built, started, awaited. Dropping it would end it, too.
    let machine = Machine::build(&host, config)?;
    println!("command line: {}", machine.cmdline());
    machine.start().await?;
    let mut exited = machine.exited();
    let reason = exited.wait_for(Option::is_some).await?.clone();
    machine.stop(Duration::from_secs(5)).await?;

    println!(
        "ended: {}",
        reason.map_or_else(String::new, |reason| reason.to_string())
    );
    println!("{:#?}", machine.stats());
    Ok(())
}
