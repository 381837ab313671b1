//! Other people's programs. A missing one fails the test and names the package to install.

use std::path::Path;
use std::process::{Command, Output};

/// Debian packages of the programs that the tests use.
const PACKAGES: [(&str, &str); 16] = [
    ("fio", "fio"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("cmp", "diffutils"),
    ("setpriv", "util-linux"),
    ("timeout", "coreutils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
];

/// No program of a test may take longer, in seconds.
const TOOL_TIMEOUT_S: u32 = 600;

/// A command for a program that ends after [`TOOL_TIMEOUT_S`], or with the test.
///
/// # Panics
/// If it is not installed.
#[must_use]
pub fn tool(program: &str) -> Command {
    require(program);
    let mut command = dying_with_us("timeout");
    command.args(["--kill-after=5", &TOOL_TIMEOUT_S.to_string(), program]);
    command
}

/// A command that the kernel kills when the thread that starts it ends, however that happens.
#[must_use]
pub fn dying_with_us(program: &str) -> Command {
    require("setpriv");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

fn require(program: &str) {
    let path = std::env::var("PATH").unwrap_or_default();
    if path.split(':').any(|folder| Path::new(folder).join(program).exists()) {
        return;
    }
    let package = PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
    panic!("`{program}` is missing: apt-get install {package}");
}

/// Runs a command and returns its standard output.
///
/// # Panics
/// With all its output, if it fails.
pub fn run(command: &mut Command) -> String {
    let output = output_of(command);
    let text = text_of(&output);
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command that must fail, and returns all its output.
///
/// # Panics
/// If it succeeds.
pub fn run_to_fail(command: &mut Command) -> String {
    let output = output_of(command);
    let text = text_of(&output);
    assert!(!output.status.success(), "{command:?} succeeded:\n{text}");
    text
}

fn output_of(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn text_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A fio command that writes all of `size_mib` in requests of 512 bytes to 256 KiB and verifies every one.
#[must_use]
pub fn fio_verify(uri: &str, size_mib: u64) -> Command {
    let mut fio = tool("fio");
    fio.args(["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-256k", "--iodepth=32"]);
    fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]);
    fio.args([format!("--uri={uri}"), format!("--size={size_mib}m")]);
    fio
}
