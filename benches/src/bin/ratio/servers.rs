//! The contenders: how each is started on the same volume, and stopped whatever happens.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use benches::fio::{Target, fill};
use benches::machine::tree_cpu_seconds;
use benches::process::dying_with_us;

use crate::rows::Row;

/// Who runs a row. Variants of one program compete among themselves first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    Raw,
    Echo,
    Berth,
    /// Three nodes of it, each with a replica.
    BerthCluster,
    QemuIoUring,
    QemuNative,
    QemuThreads,
    Nbdkit,
    NbdkitNoCache,
    NbdServer,
}

const ALL: [Contender; 10] = [
    Contender::Raw,
    Contender::Echo,
    Contender::Berth,
    Contender::BerthCluster,
    Contender::QemuIoUring,
    Contender::QemuNative,
    Contender::QemuThreads,
    Contender::Nbdkit,
    Contender::NbdkitNoCache,
    Contender::NbdServer,
];

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Contender::Raw => "raw",
            Contender::Echo => "echo",
            Contender::Berth => "berth",
            Contender::BerthCluster => "berth-cluster",
            Contender::QemuIoUring => "qemu-nbd-io_uring",
            Contender::QemuNative => "qemu-nbd-native",
            Contender::QemuThreads => "qemu-nbd-threads",
            Contender::Nbdkit => "nbdkit-page-cache",
            Contender::NbdkitNoCache => "nbdkit-cache=none",
            Contender::NbdServer => "nbd-server-page-cache",
        }
    }

    /// The program, for those that come in several settings.
    pub(crate) fn family(self) -> &'static str {
        match self {
            Contender::QemuIoUring | Contender::QemuNative | Contender::QemuThreads => "qemu-nbd",
            // Not variants of one another: they promise different things.
            Contender::Nbdkit => "nbdkit-page-cache",
            Contender::NbdkitNoCache => "nbdkit",
            Contender::NbdServer => "nbd-server",
            Contender::Berth | Contender::BerthCluster => "berth",
            other => other.name(),
        }
    }

    /// Does it answer a write when the data is in the page cache, and read from there? Then its figures say
    /// nothing about the disk, and it is shown but not compared with.
    pub(crate) fn uses_page_cache(self) -> bool {
        matches!(self, Contender::Nbdkit | Contender::NbdServer)
    }

    /// Is it a server that Berth is compared with?
    pub(crate) fn is_yardstick(self) -> bool {
        let own = [Contender::Raw, Contender::Echo, Contender::Berth, Contender::BerthCluster];
        !own.contains(&self) && !self.uses_page_cache()
    }

    /// Does it keep as many copies as the row asks for?
    pub(crate) fn is_of(self, row: &Row) -> bool {
        match self {
            Contender::Raw => true,
            Contender::BerthCluster => row.replicas > 1,
            _ => row.replicas == 1,
        }
    }
}

/// The contenders of these names or families, or all.
pub(crate) fn named(names: &[String]) -> Result<Vec<Contender>, String> {
    if names.is_empty() {
        return Ok(ALL.to_vec());
    }
    let mut chosen = Vec::new();
    for name in names {
        let before = chosen.len();
        chosen.extend(ALL.into_iter().filter(|one| one.name() == name || one.family() == name));
        if chosen.len() == before {
            let known: Vec<_> = ALL.iter().map(|one| one.name()).collect();
            return Err(format!("no contender `{name}`; there are {}", known.join(" ")));
        }
    }
    Ok(chosen)
}

/// The files that the contenders work on.
#[derive(Debug)]
pub(crate) struct Bench {
    dir: PathBuf,
    pub(crate) size_mib: u64,
}

impl Bench {
    /// Makes the plain file and, for Berth, filled pools.
    pub(crate) fn prepare(
        dir: &Path,
        size_mib: u64,
        rows: &[&Row],
        contenders: &[Contender],
    ) -> Result<Bench, String> {
        fs::create_dir_all(dir.join("raw")).map_err(|error| format!("{}: {error}", dir.display()))?;
        let dir = dir.canonicalize().map_err(|error| format!("{}: {error}", dir.display()))?;
        let bench = Bench { dir, size_mib };
        bench.write_plain_file()?;
        for (own, files) in [(Contender::Berth, bench.pool()), (Contender::BerthCluster, bench.cluster_dir())]
        {
            if !contenders.contains(&own) || !rows.iter().any(|row| own.is_of(row)) {
                continue;
            }
            let removed = if files.is_dir() { fs::remove_dir_all(&files) } else { fs::remove_file(&files) };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("{}: {error}", files.display()));
                }
                _ => {}
            }
            eprintln!("filling the volume of {}", own.name());
            let server = bench.start(own)?;
            fill(&server.target(), size_mib)?;
            server.stop()?;
        }
        Ok(bench)
    }

    /// A file whose every block was written: a first write to a hole would cost the file system more.
    fn write_plain_file(&self) -> Result<(), String> {
        let plain = self.plain();
        let len = self.size_mib << 20;
        if fs::metadata(&plain).is_ok_and(|metadata| metadata.len() == len) {
            return Ok(());
        }
        let status = dying_with_us("dd")
            .args(["if=/dev/zero", "bs=1M", "oflag=direct", "status=none"])
            .arg(format!("of={}", plain.display()))
            .arg(format!("count={}", self.size_mib))
            .status();
        match status {
            Ok(status) if status.success() => Ok(()),
            other => {
                Err(format!("dd to {} failed: {other:?}; does the disk allow O_DIRECT?", plain.display()))
            }
        }
    }

    fn plain(&self) -> PathBuf {
        self.dir.join("plain.img")
    }

    fn pool(&self) -> PathBuf {
        self.dir.join("pool.berth")
    }

    fn cluster_dir(&self) -> PathBuf {
        self.dir.join("cluster")
    }

    /// Where fio's own reports go.
    pub(crate) fn raw_dir(&self) -> PathBuf {
        self.dir.join("raw")
    }

    /// Starts a contender and waits until it serves.
    pub(crate) fn start(&self, contender: Contender) -> Result<Server, String> {
        let socket = self.dir.join("nbd.sock");
        // A server that was killed leaves its socket behind, and the next one could not bind.
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", socket.display()));
            }
            _ => {}
        }
        let uri = format!("nbd+unix:///v?socket={}", socket.display());
        let (program, arguments) = self.command(contender, &socket)?;
        if contender == Contender::Raw {
            return Ok(Server { child: None, output: None, target: Target::File(self.plain()), contender });
        }
        let mut command = dying_with_us(&program);
        command.args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit());
        command.stdout(if contender.family() == "berth" { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().map_err(|error| format!("{program}: {error}"))?;
        let mut output = child.stdout.take().map(BufReader::new);
        let ready = match &mut output {
            Some(output) => output
                .lines()
                .map_while(Result::ok)
                .find_map(|line| {
                    line.strip_prefix("ready ").filter(|uri| uri.contains("+unix")).map(str::to_owned)
                })
                .ok_or_else(|| "berth ended before it was ready".to_owned()),
            None => wait_for_socket(&socket, &mut child).map(|()| uri),
        };
        match ready {
            Ok(uri) => Ok(Server { child: Some(child), output, target: Target::Nbd(uri), contender }),
            Err(why) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("{}: {why}", contender.name()))
            }
        }
    }

    fn command(&self, contender: Contender, socket: &Path) -> Result<(String, Vec<String>), String> {
        let socket = socket.display().to_string();
        let plain = self.plain().display().to_string();
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let words = |text: String| text.split('\t').map(str::to_owned).collect::<Vec<_>>();
        let qemu = |aio: &str| {
            let line = format!(
                "-t\t-f\traw\t-x\tv\t--cache=none\t--aio={aio}\t--discard=unmap\t-k\t{socket}\t{plain}"
            );
            ("qemu-nbd".to_owned(), words(line))
        };
        Ok(match contender {
            Contender::Raw => (String::new(), Vec::new()),
            Contender::Echo => {
                let line = format!("--echo\t{socket}\t--size-mib\t{}", self.size_mib);
                (own.display().to_string(), words(line))
            }
            Contender::Berth => {
                let line = format!(
                    "serve\t--pool\t{}\t--pool-size\t{}M\t--volume\tv={}M\t--nbd\tunix:{socket}\t--threads\t1",
                    self.pool().display(),
                    self.size_mib * 4,
                    self.size_mib
                );
                (berth_program(&own)?, words(line))
            }
            Contender::BerthCluster => {
                let line = format!(
                    "dev\t--nodes\t3\t--replicas\t3\t--size\t{}M\t--pool-size\t{}M\t--dir\t{}",
                    self.size_mib,
                    self.size_mib * 4,
                    self.cluster_dir().display()
                );
                (berth_program(&own)?, words(line))
            }
            Contender::QemuIoUring => qemu("io_uring"),
            Contender::QemuNative => qemu("native"),
            Contender::QemuThreads => qemu("threads"),
            Contender::Nbdkit => ("nbdkit".to_owned(), words(format!("-f\t-U\t{socket}\tfile\t{plain}"))),
            Contender::NbdkitNoCache => {
                ("nbdkit".to_owned(), words(format!("-f\t-U\t{socket}\tfile\t{plain}\tcache=none")))
            }
            Contender::NbdServer => {
                // It cannot do without a TCP port: zero would mean standard input.
                let config = self.dir.join("nbd-server.conf");
                let text = format!(
                    "[generic]\nunixsock = {socket}\nlistenaddr = 127.0.0.1\nport = 10899\n[v]\nexportname = {plain}\nflush = true\nfua = true\n"
                );
                fs::write(&config, text).map_err(|error| format!("{}: {error}", config.display()))?;
                // It leaves for the background, except to serve a single client. A process namespace with a parent
                // that stays keeps hold of it and of its children, one per client.
                let script = format!("nbd-server -C {} && exec sleep infinity", config.display());
                let line = format!("--map-root-user\t--pid\t--fork\t--kill-child\tsh\t-c\t{script}");
                ("unshare".to_owned(), words(line))
            }
        })
    }
}

fn berth_program(own: &Path) -> Result<String, String> {
    let berth = std::env::var("BERTH_BIN").map_or_else(|_| own.with_file_name("berth"), PathBuf::from);
    if !berth.exists() {
        let why = "build it (cargo build --release) or set BERTH_BIN";
        return Err(format!("{} is missing: {why}", berth.display()));
    }
    Ok(berth.display().to_string())
}

fn wait_for_socket(socket: &Path, child: &mut Child) -> Result<(), String> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        if UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            return Err(format!("ended with {status} before it served; is it installed?"));
        }
        sleep(Duration::from_millis(20));
    }
    Err("does not listen after 20 s".to_owned())
}

/// A contender at work. Dropped without [`Server::stop`], it is killed.
#[derive(Debug)]
pub(crate) struct Server {
    child: Option<Child>,
    /// Kept open: it goes on to talk.
    #[expect(dead_code, reason = "held, not read")]
    output: Option<BufReader<ChildStdout>>,
    target: Target,
    contender: Contender,
}

impl Server {
    pub(crate) fn target(&self) -> Target {
        self.target.clone()
    }

    /// CPU time of all its processes so far; zero for the raw disk, which has none.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, String> {
        self.child.as_ref().map_or(Ok(0.0), |child| tree_cpu_seconds(child.id()))
    }

    /// Asks it to end, and waits for that.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        if matches!(self.contender, Contender::Echo | Contender::NbdServer) {
            // The one knows no other end, the other's namespace ignores the polite way.
            let _ = child.kill();
        }
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).map_err(|error| error.to_string())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).map_err(|error| error.to_string())?;
        let start = Instant::now();
        while child.try_wait().map_err(|error| error.to_string())?.is_none() {
            if start.elapsed() > Duration::from_secs(30) {
                let _ = child.kill();
                let _ = child.wait();
                return Err("a server does not end 30 s after SIGTERM".to_owned());
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
