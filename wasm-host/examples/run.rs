//! Runs a WebAssembly program with this folder as its own: `run PROGRAM [ARGUMENT...]`.

use std::process::ExitCode;

use tokio::io::{stderr, stdin, stdout};
use wasm_host::{Host, HostConfig, Lane, LaneConfig, Mount, Network, Settings, Stdio, WasmError};

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(args).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(125)
        }
    }
}

async fn run(args: Vec<String>) -> Result<u8, WasmError> {
    let path = args.first().cloned().unwrap_or_default();
    let host = Host::new(HostConfig::default())?;
    let program = host.load(path.as_ref()).await?;
    let lane = Lane::start(LaneConfig::default())?;
    let container = host.container(Settings {
        args,
        mounts: vec![Mount {
            host: ".".into(),
            guest: "/".to_owned(),
            read_only: false,
        }],
        network: Network::Namespace,
        ..Default::default()
    });
    let stdio = Stdio {
        stdin: Some(Box::new(stdin())),
        stdout: Some(Box::new(stdout())),
        stderr: Some(Box::new(stderr())),
        terminal: false,
    };
    let process = container.start(&lane, &program, stdio).await?;
    Ok(u8::try_from(process.wait().await.code).unwrap_or(u8::MAX))
}
