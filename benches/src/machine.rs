//! Facts about the machine: who it is, how busy it is, and when it is quiet.
#![expect(clippy::disallowed_methods, reason = "a measuring tool reads the clock and waits for others")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// /proc counts CPU time in this unit on every Linux that Berth runs on (`getconf CLK_TCK`).
const TICKS_PER_SECOND: f64 = 100.0;
/// A job starts when all of the machine together used less than this part of one core.
const QUIET_CORES: f64 = 0.05;

/// CPU time that the whole machine spent on anything but idling, interrupts included.
///
/// # Errors
/// When /proc cannot be read.
pub fn busy_seconds() -> Result<f64, String> {
    let stat = fs::read_to_string("/proc/stat").map_err(|error| format!("/proc/stat: {error}"))?;
    let ticks: Vec<f64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user time.
    let busy =
        ticks.iter().take(8).enumerate().filter(|&(i, _)| i != 3 && i != 4).map(|(_, t)| t).sum::<f64>();
    Ok(busy / TICKS_PER_SECOND)
}

/// CPU time of a process, its ended and its living descendants.
///
/// # Errors
/// When /proc cannot be read.
pub fn tree_cpu_seconds(pid: u32) -> Result<f64, String> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").map_err(|error| format!("/proc: {error}"))?.flatten() {
        // A process may end while we look; then there is nothing to read, and its parent counts its time.
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name is in parentheses and may hold anything; the fields after it start with the third.
        let Some((_, fields)) = stat.rsplit_once(") ") else { continue };
        let field =
            |number: usize| fields.split(' ').nth(number - 3).and_then(|text| text.parse::<u64>().ok());
        let Some(parent) = field(4) else { continue };
        let ticks: u64 = (14..=17).filter_map(field).sum();
        parents.push((id, parent, ticks));
    }
    let mut members = vec![u64::from(pid)];
    let mut ticks = parents.iter().filter(|(id, ..)| *id == pid).map(|(.., ticks)| ticks).sum::<u64>();
    let mut next = 0;
    while let Some(&member) = members.get(next) {
        next += 1;
        for &(id, parent, used) in parents.iter().filter(|(_, parent, _)| *parent == member) {
            debug_assert_eq!(parent, member);
            members.push(u64::from(id));
            ticks += used;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of hundredths of seconds is far below 2^52")]
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// Waits until nothing else runs.
///
/// # Errors
/// When something still runs after a minute: figures taken then would mean nothing.
pub fn wait_until_quiet() -> Result<(), String> {
    let start = Instant::now();
    loop {
        let (before, moment) = (busy_seconds()?, Instant::now());
        sleep(Duration::from_millis(400));
        let cores = (busy_seconds()? - before) / moment.elapsed().as_secs_f64();
        if cores < QUIET_CORES {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("the machine is not quiet: others use {:.0} % of a core", cores * 100.0));
        }
    }
}

/// Date, kernel, processor, disk and versions, one per line.
#[must_use]
pub fn describe(dir: &Path) -> Vec<String> {
    let run = |command: &str| {
        let output = Command::new("sh").args(["-c", command]).output();
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        text.unwrap_or_default()
    };
    let dir = dir.display();
    vec![
        run("date -u +%Y-%m-%dT%H:%MZ"),
        run("uname -sr"),
        run("echo $(nproc) x $(sed -n 's/model name.*: //p' /proc/cpuinfo | head -1)"),
        run(&format!("mkdir -p {dir} && df --output=source,fstype {dir} | tail -1")),
        format!("{}{}", run("fio --version"), client_place()),
        run("qemu-nbd --version | head -1"),
        run("nbdkit --version"),
        run("nbd-server -V | head -1"),
        run("git describe --always --dirty 2>/dev/null | sed 's/^/berth /'"),
    ]
}

/// Where the client is kept, for the list of facts.
fn client_place() -> String {
    match crate::fio::client_cpu() {
        Some(cpu) => format!(" on CPU {cpu}"),
        None => String::new(),
    }
}
