//! `berth`: the one binary.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use berth::bench::{self, BenchArgs};

mod ctl;
mod dev;
mod node;
mod pool;
mod remote;
mod serve;
mod volume;

/// Block volumes for containers.
#[derive(Debug, Parser)]
#[command(name = "berth", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArguments),
    Bench(BenchCommand),
    Pool(pool::PoolArguments),
    Ctl(ctl::CtlArguments),
    Dev(dev::DevArguments),
    Volume(volume::VolumeArguments),
    Node(node::NodeArguments),
    Status(volume::StatusArguments),
}

/// Load volumes over NBD and measure, or verify that none of it is lost.
#[derive(Debug, clap::Args)]
struct BenchCommand {
    #[command(flatten)]
    arguments: BenchArgs,

    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Text,
    Json,
}

/// A broken invariant ends the process, whichever thread finds it: what it holds is on its disks, and nobody may go on with a
/// state that must not be. (`panic = "abort"` would say the same, but tests are built without it, and with two ways to
/// build, every library would be built twice.)
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

fn main() -> ExitCode {
    abort_on_panic();
    let arguments = Arguments::parse();
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(colours).init();
    let result = match arguments.command {
        Command::Serve(arguments) => {
            nbd_server::serve(arguments.into_config()).map(|()| true).map_err(|error| error.to_string())
        }
        Command::Bench(command) => run_bench(&command).map(|()| true),
        Command::Pool(arguments) => pool::run(&arguments),
        Command::Ctl(arguments) => ctl::run(arguments).map(|()| true),
        Command::Volume(arguments) => volume::run(&arguments),
        Command::Node(arguments) => node::run(arguments).map(|()| true),
        Command::Status(arguments) => volume::status(&arguments),
        Command::Dev(arguments) => dev::run(&arguments).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // What is wrong was printed as the result.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("berth: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_bench(command: &BenchCommand) -> Result<(), String> {
    let report = bench::run(&command.arguments).map_err(|error| error.to_string())?;
    match command.output {
        Output::Text => println!("{report}"),
        Output::Json => {
            println!("{}", serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?);
        }
    }
    Ok(())
}
