//! `berth serve` with one volume, and what it and the kernel count.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};

use benches::fio::Target;
use benches::process::dying_with_us;

/// What device blocks are written for, as the metrics name it.
const KINDS: [&str; 4] = ["log", "cleaner", "map", "zeroes"];

/// A server that is ready. Dropped without being stopped, it is killed.
#[derive(Debug)]
pub(crate) struct Berth {
    child: Child,
    uri: String,
    metrics: String,
}

/// Everything that was counted up to one moment, or between two.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    pub(crate) client_blocks: u64,
    pub(crate) device_blocks: Vec<(&'static str, u64)>,
    pub(crate) checkpoints: u64,
    pub(crate) segments_cleaned: u64,
    /// What the kernel sent to the disk for the process.
    pub(crate) kernel_bytes: u64,
}

impl Counters {
    pub(crate) fn since(&self, before: &Counters) -> Counters {
        let kinds = self.device_blocks.iter().zip(&before.device_blocks);
        Counters {
            client_blocks: self.client_blocks - before.client_blocks,
            device_blocks: kinds.map(|((kind, now), (_, then))| (*kind, now - then)).collect(),
            checkpoints: self.checkpoints - before.checkpoints,
            segments_cleaned: self.segments_cleaned - before.segments_cleaned,
            kernel_bytes: self.kernel_bytes - before.kernel_bytes,
        }
    }

    pub(crate) fn device_blocks_in_all(&self) -> u64 {
        self.device_blocks.iter().map(|(_, blocks)| blocks).sum()
    }

    pub(crate) fn blocks_for(&self, wanted: &str) -> u64 {
        self.device_blocks.iter().filter(|(kind, _)| *kind == wanted).map(|(_, blocks)| blocks).sum()
    }
}

impl Berth {
    /// Starts on a new pool.
    pub(crate) fn start_fresh(dir: &Path, pool_mib: u64, volume_mib: u64) -> Result<Berth, String> {
        let pool = dir.join("pool.berth");
        match fs::remove_file(&pool) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{}: {error}", pool.display()))
            }
            _ => Berth::start(dir, pool_mib, volume_mib),
        }
    }

    /// Starts on the pool that is there, and waits until it serves.
    pub(crate) fn start(dir: &Path, pool_mib: u64, volume_mib: u64) -> Result<Berth, String> {
        let dir = dir.canonicalize().map_err(|error| format!("{}: {error}", dir.display()))?;
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let program = std::env::var("BERTH_BIN").map_or_else(|_| own.with_file_name("berth"), Into::into);
        if !program.exists() {
            let why = "build it (cargo build --release) or set BERTH_BIN";
            return Err(format!("{} is missing: {why}", program.display()));
        }
        let mut command = dying_with_us(&program.display().to_string());
        command.arg("serve").arg("--pool").arg(dir.join("pool.berth"));
        command.arg(format!("--pool-size={pool_mib}M")).arg(format!("--volume=v={volume_mib}M"));
        command.arg(format!("--nbd=unix:{}", dir.join("nbd.sock").display()));
        command.args(["--threads=1", "--metrics=127.0.0.1:0"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{command:?}: {error}"))?;
        let lines = BufReader::new(child.stdout.take().ok_or("no standard output")?).lines();
        let mut berth = Berth { child, uri: String::new(), metrics: String::new() };
        for line in lines.map_while(Result::ok) {
            match line.split_once(' ') {
                Some(("ready", uri)) => uri.clone_into(&mut berth.uri),
                Some(("metrics", url)) => url.clone_into(&mut berth.metrics),
                _ => return Err(format!("berth serve says {line:?}")),
            }
            if !berth.uri.is_empty() && !berth.metrics.is_empty() {
                return Ok(berth);
            }
        }
        Err("berth ended before it was ready".to_owned())
    }

    pub(crate) fn target(&self) -> Target {
        Target::Nbd(self.uri.clone())
    }

    /// What was counted since the start of the process.
    pub(crate) fn counters(&self) -> Result<Counters, String> {
        let page = fetch(&self.metrics).map_err(|error| format!("{}: {error}", self.metrics))?;
        let kinds = KINDS.iter().map(|kind| {
            let blocks = sum(&page, "berth_device_blocks_written_total", &format!("kind=\"{kind}\""))?;
            Ok::<_, String>((*kind, blocks))
        });
        let device_blocks: Vec<_> = kinds.collect::<Result<_, _>>()?;
        let counters = Counters {
            client_blocks: sum(&page, "berth_client_blocks_written_total", "")?,
            device_blocks,
            checkpoints: sum(&page, "berth_checkpoints_total", "")?,
            segments_cleaned: sum(&page, "berth_segments_cleaned_total", "")?,
            kernel_bytes: self.kernel_bytes()?,
        };
        let all = sum(&page, "berth_device_blocks_written_total", "")?;
        if all != counters.device_blocks_in_all() {
            return Err(format!("the server writes for more than {KINDS:?}: {all} blocks in all"));
        }
        Ok(counters)
    }

    /// `write_bytes` of proc_pid_io(5).
    fn kernel_bytes(&self) -> Result<u64, String> {
        let path = format!("/proc/{}/io", self.child.id());
        let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        line.and_then(|number| number.parse().ok()).ok_or_else(|| format!("{path} has no write_bytes"))
    }

    /// SIGTERM; returns when the server has ended.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        let pid = i32::try_from(self.child.id()).map_err(|error| error.to_string())?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
            .map_err(|error| error.to_string())?;
        // It ends by itself, after 8 s in any case.
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("the server ended with {status}")) }
    }
}

impl Drop for Berth {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fetch(url: &str) -> Result<String, String> {
    let address =
        url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).ok_or("not a URL")?;
    let mut stream = TcpStream::connect(address).map_err(|error| error.to_string())?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    let (_, page) = answer.split_once("\r\n\r\n").ok_or("no page")?;
    Ok(page.to_owned())
}

/// The sum over all samples of this counter whose labels contain `part`.
fn sum(page: &str, name: &str, part: &str) -> Result<u64, String> {
    let samples = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    let wanted = samples.filter(|(sample, _)| {
        let (found, labels) = sample.split_once('{').unwrap_or((sample, ""));
        found == name && labels.contains(part)
    });
    let values: Vec<u64> = wanted.filter_map(|(_, value)| value.parse().ok()).collect();
    if values.is_empty() {
        Err(format!("the metrics have no {name} with {part}"))
    } else {
        Ok(values.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn samples_are_added_up_over_lanes() {
        let page = "# TYPE a counter\na_total{lane=\"0\",kind=\"x\"} 3\na_total{lane=\"1\",kind=\"y\"} 4\nab_total 9\n# EOF\n";
        assert_eq!(sum(page, "a_total", ""), Ok(7));
        assert_eq!(sum(page, "a_total", "kind=\"y\""), Ok(4));
        assert!(sum(page, "b_total", "").is_err());
    }
}
