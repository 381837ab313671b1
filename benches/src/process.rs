//! Child processes that cannot outlive the tool.

use std::process::Command;

/// A program that the kernel ends when this one ends, however that happens.
#[must_use]
pub fn dying_with_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}
