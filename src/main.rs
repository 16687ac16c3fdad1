//! The `prefixd` command: arguments in, an exit code out. Everything else is in the library.
use anyhow::Context;
use clap::Parser;
use prefixd::cli::{Cli, Code, Failure, Output};
use prefixd::telemetry;
use std::process::ExitCode;

fn main() -> ExitCode {
    prefixd::ops::pool::quiet_candle();
    let cli = Cli::parse();
    let output = cli.output;
    let Err(error) = run(cli) else { return ExitCode::SUCCESS };
    let failure = error.downcast_ref::<Failure>();
    match (output, failure) {
        (Output::Json, Some(failure)) => eprintln!("{}", failure.to_json()),
        (Output::Json, None) => {
            let failure = Failure::local(format!("{error:#}"));
            eprintln!("{}", failure.to_json());
        }
        (Output::Text, _) => eprintln!("error: {error:#}"),
    }
    ExitCode::from(failure.map_or(Code::Failed, Failure::code) as u8)
}

fn run(cli: Cli) -> anyhow::Result<()> {
    telemetry::start_logging(cli.default_log()).map_err(Failure::Usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("tokio runtime")?;
    let result = runtime.block_on(cli.run());
    // Blocking work that a finished command no longer needs does not keep the process.
    runtime.shutdown_background();
    Ok(result?)
}
