//! `berth dev`: a cluster on this machine, of child processes of this binary.
#![expect(clippy::disallowed_methods, reason = "it waits for processes")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clap::Args;
use datapath::reactor::affinity::CpuList;
use nbd_server::control::limits::REPLY_BYTES_MAX;
use nbd_server::size::Size;
use nbd_server::stop::{Stop, StopSignals};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a child may take to get ready: a pool is preallocated meanwhile.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long children may take to end before they are killed.
const END_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of a pool beyond its volume: a quarter of that, and this.
const POOL_SPARE_BYTES: u64 = 1 << 30;

/// Run a cluster on this machine: berth ctl, some nodes, and a volume that is replicated over them. Ctrl-C ends it.
#[derive(Debug, Args)]
pub(crate) struct DevArguments {
    /// Nodes.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    nodes: u32,

    /// Replicas of the volume, on the first so many nodes [default: 3, or as many as there are nodes].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    replicas: Option<u32>,

    /// Size of the volume.
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    size: Size,

    /// Size of each node's pool [default: a quarter more than the volume, and 1 GiB].
    #[arg(long, value_name = "SIZE")]
    pool_size: Option<Size>,

    /// Where pools, records, sockets and logs are kept [default: berth-dev in the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// A child process, and what its first line of output said.
struct Member {
    name: String,
    child: Child,
    ready: String,
    /// How to start it again by hand.
    line: String,
}

/// Runs the cluster until it is told to stop.
pub(crate) fn run(arguments: &DevArguments) -> Result<(), String> {
    let replicas = arguments.replicas.unwrap_or_else(|| arguments.nodes.min(3));
    if replicas > arguments.nodes {
        return Err(format!(
            "{replicas} replicas need as many nodes; say --nodes {replicas} or --replicas {}",
            arguments.nodes
        ));
    }
    let signals = StopSignals::block().map_err(|error| format!("cannot block signals: {error}"))?;
    let (sender, stops) = channel();
    signals
        .watch(move |stop| {
            let _ = sender.send(stop);
        })
        .map_err(|error| format!("cannot wait for signals: {error}"))?;
    let dir = arguments.dir.clone().unwrap_or_else(|| std::env::temp_dir().join("berth-dev"));
    let dir = std::path::absolute(dir).map_err(|error| error.to_string())?;
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut members = Vec::new();
    let result =
        start(arguments, replicas, &dir, &stops, &mut members).and_then(|()| watch(&mut members, &stops));
    end(members);
    result
}

fn start(
    arguments: &DevArguments,
    replicas: u32,
    dir: &Path,
    stops: &Receiver<Stop>,
    members: &mut Vec<Member>,
) -> Result<(), String> {
    let store = format!("redb:{}", dir.join("ctl.redb").display());
    let ctl =
        spawn(dir, "ctl", &["ctl".into(), "--store".into(), store, "--listen".into(), "127.0.0.1:0".into()])?;
    let url = ctl.ready.strip_prefix("ready ").unwrap_or_default().to_owned();
    members.push(ctl);
    let for_volume = arguments.size.bytes + arguments.size.bytes / 4 + POOL_SPARE_BYTES;
    let pool_bytes = arguments.pool_size.map_or(for_volume, |size| size.bytes);
    let cpus = CpuList::allowed().map_err(|error| error.to_string())?.to_string();
    let cpus: Vec<&str> = cpus.split(',').collect();
    for number in 1..=arguments.nodes {
        if stops.try_recv().is_ok() {
            return Err("stopped before the cluster was ready".to_owned());
        }
        let name = format!("n{number}");
        let cpu = cpus[(number as usize - 1) % cpus.len()];
        let words = [
            "node",
            "--name",
            &name,
            "--pool",
            &dir.join(format!("{name}.pool")).display().to_string(),
            "--pool-size",
            &pool_bytes.to_string(),
            "--ctl",
            &url,
            "--nbd",
            "127.0.0.1:0",
            "--nbd",
            &format!("unix:{}", dir.join(format!("{name}.sock")).display()),
            "--peer",
            "127.0.0.1:0",
            "--cpus",
            cpu,
        ]
        .map(str::to_owned);
        members.push(spawn(dir, &name, &words)?);
    }
    let on: Vec<String> = (1..=replicas).map(|number| format!("n{number}")).collect();
    make_volume(&url, arguments.size, &on)?;
    announce(dir, &url, members);
    Ok(())
}

/// Starts this binary with these arguments and waits until it says that it is ready.
fn spawn(dir: &Path, name: &str, words: &[String]) -> Result<Member, String> {
    let failed = |error: std::io::Error| format!("{name}: {error}");
    let log = dir.join(format!("{name}.log"));
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(&program)
        .args(words)
        .arg("--exit-with-parent")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log).map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    let (sender, lines) = channel();
    let output = child.stdout.take().expect("piped");
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            // Later lines are of no interest, but must be read.
            let _ = sender.send(line);
        }
    });
    let line = format!("{} {}", program.display(), words.join(" "));
    match lines.recv_timeout(READY_WITHIN) {
        Ok(ready) => Ok(Member { name: name.to_owned(), child, ready, line }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            let why = if error == RecvTimeoutError::Timeout { "does not get ready" } else { "ended" };
            let said = fs::read_to_string(&log).unwrap_or_default();
            Err(format!("{name} {why}: {}", said.trim()))
        }
    }
}

/// Makes the volume, unless a cluster that ran here before has made it.
fn make_volume(url: &str, size: Size, on: &[String]) -> Result<(), String> {
    use nbd_server::control::link::endpoint;
    use nbd_server::control::proto::control_client::ControlClient;
    use nbd_server::control::proto::{CreateVolumeRequest, GetVolumeRequest, get_volume_request};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(|error| error.to_string())?.block_on(async {
        let endpoint = endpoint(url).map_err(|error| error.to_string())?;
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = ControlClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX);
        let which = Some(get_volume_request::Which::Name("data".to_owned()));
        if client.get_volume(GetVolumeRequest { which }).await.is_ok() {
            return Ok(());
        }
        let request = CreateVolumeRequest {
            name: "data".to_owned(),
            size_blocks: size.bytes / datapath::units::BLOCK_BYTES_U64,
            on: on.to_vec(),
            ..CreateVolumeRequest::default()
        };
        client.create_volume(request).await.map(|_| ()).map_err(|error| error.message().to_owned())
    })
}

fn announce(dir: &Path, url: &str, members: &[Member]) {
    println!("ctl {url}");
    for member in members {
        println!("{} pid {}", member.name, member.child.id());
    }
    for member in &members[1..] {
        let address = member.ready.rsplit(' ').next().unwrap_or_default();
        println!("ready nbd://{address}/data");
        println!("ready nbd+unix:///data?socket={}", dir.join(format!("{}.sock", member.name)).display());
    }
    println!("a client of any of these makes its node the volume's head; logs are in {}", dir.display());
}

/// Tells of children that end, until the cluster is told to stop.
fn watch(members: &mut Vec<Member>, stops: &Receiver<Stop>) -> Result<(), String> {
    loop {
        match stops.recv_timeout(Duration::from_millis(200)) {
            Ok(_) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err("the thread of signals has ended".to_owned()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        members.retain_mut(|member| match member.child.try_wait() {
            Ok(None) => true,
            ended => {
                let how = ended.ok().flatten().map_or_else(String::new, |status| status.to_string());
                println!("{} has ended ({how}); start it again with: {}", member.name, member.line);
                false
            }
        });
    }
}

/// Nodes end first, all together; ctl, which started first, keeps their records until then.
fn end(members: Vec<Member>) {
    let (ctl, nodes): (Vec<Member>, Vec<Member>) =
        members.into_iter().partition(|member| member.name == "ctl");
    for group in [nodes, ctl] {
        for member in &group {
            let pid = Pid::from_raw(i32::try_from(member.child.id()).expect("a process id"));
            // It may have ended by itself.
            let _ = kill(pid, Signal::SIGTERM);
        }
        let start = Instant::now();
        for mut member in group {
            while matches!(member.child.try_wait(), Ok(None)) {
                if start.elapsed() > END_WITHIN {
                    let _ = member.child.kill();
                }
                std::thread::park_timeout(Duration::from_millis(10));
            }
        }
    }
}
