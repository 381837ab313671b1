//! The flags of `berth serve`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use nbd_server::listener::ListenAddress;
use nbd_server::serve::{AckPolicy, CpuList, ServeConfig, VolumeConfig};
use nbd_server::size::Size;

/// Serve volumes of a pool over NBD.
#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// File or block device that holds the volumes. May be given several times.
    #[arg(long, required = true, value_name = "FILE")]
    pool: Vec<PathBuf>,

    /// Make the pool with this size if it does not exist, or grow it to this size: 20G, 512M, bytes.
    #[arg(long, value_name = "SIZE")]
    pool_size: Option<Size>,

    /// A volume to serve, made if it is new: data=10G. May be given several times.
    #[arg(long, required = true, value_name = "NAME=SIZE", value_parser = parse_volume)]
    volume: Vec<VolumeConfig>,

    /// Where NBD clients connect: ADDR:PORT or unix:PATH. May be given several times.
    #[arg(long, value_name = "ADDR|unix:PATH", default_value = "127.0.0.1:10809")]
    nbd: Vec<ListenAddress>,

    /// Threads that do the work, each pinned to a processor [default: one for each of --cpus, else up to 2].
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,

    /// Processors to use, like 0,2-3 [default: those that the process may use].
    #[arg(long, value_name = "LIST")]
    cpus: Option<CpuList>,

    /// When a write is answered: when the device has completed it, or when it would survive a loss of power.
    #[arg(long, value_enum, default_value_t = Ack::Device)]
    ack: Ack,

    /// Memory for the map from blocks to places [default: as much as it needs].
    #[arg(long, value_name = "SIZE")]
    map_cache: Option<Size>,

    /// Serve metrics to Prometheus on this address, at /metrics.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<String>,

    /// Refuse every change to the volumes.
    #[arg(long)]
    read_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ack {
    Device,
    Durable,
}

impl ServeArguments {
    /// As the server takes it.
    pub(crate) fn into_config(self) -> ServeConfig {
        ServeConfig {
            pools: self.pool,
            pool_size: self.pool_size,
            volumes: self.volume,
            nbd: self.nbd,
            threads: self.threads,
            cpus: self.cpus,
            ack: match self.ack {
                Ack::Device => AckPolicy::Device,
                Ack::Durable => AckPolicy::Durable,
            },
            map_cache: self.map_cache,
            metrics: self.metrics,
            read_only: self.read_only,
        }
    }
}

fn parse_volume(text: &str) -> Result<VolumeConfig, String> {
    let (name, size) = text.split_once('=').ok_or_else(|| "write NAME=SIZE, as in data=10G".to_owned())?;
    let name = name.parse().map_err(|error| format!("{error}"))?;
    let size = size.parse().map_err(|error| format!("{error}"))?;
    Ok(VolumeConfig { name, size })
}

fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads @ 1..=256) => Ok(threads),
        _ => Err("a number from 1 to 256".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use nbd_server::serve::{AckPolicy, ServeConfig};

    use super::ServeArguments;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeArguments,
    }

    fn parse(line: &str) -> Result<ServeConfig, String> {
        let words = std::iter::once("serve").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.serve.into_config()).map_err(|error| error.to_string())
    }

    #[test]
    fn pool_and_volume_are_enough() {
        let config = parse("--pool p --volume data=10G").expect("a command");
        assert_eq!(config.pools, [std::path::Path::new("p")]);
        assert_eq!((config.volumes[0].name.as_str(), config.volumes[0].size.bytes), ("data", 10 << 30));
        assert_eq!(config.nbd, ["127.0.0.1:10809".parse().expect("an address")]);
        assert_eq!(config.ack, AckPolicy::Device);
        assert!(!config.read_only && config.threads.is_none() && config.map_cache.is_none());
    }

    #[test]
    fn every_flag_arrives() {
        let config = parse(
            "--pool p --pool q --pool-size 20G --volume a=1G --volume b=2G --nbd unix:/s --nbd [::1]:1 --threads 2 \
             --cpus 0,2-3 --ack durable --map-cache 1G --metrics 127.0.0.1:9 --read-only",
        )
        .expect("a command");
        assert_eq!((config.pools.len(), config.volumes.len(), config.nbd.len()), (2, 2, 2));
        assert_eq!(config.pool_size.expect("given").bytes, 20 << 30);
        assert_eq!((config.threads, config.ack, config.read_only), (Some(2), AckPolicy::Durable, true));
        assert_eq!(config.cpus.expect("given").to_string(), "0,2,3");
        assert_eq!(config.map_cache.expect("given").bytes, 1 << 30);
        assert_eq!(config.metrics.as_deref(), Some("127.0.0.1:9"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, part) in [
            ("--volume a=1G", "--pool <FILE>"),
            ("--pool p", "--volume <NAME=SIZE>"),
            ("--pool p --volume a", "write NAME=SIZE"),
            ("--pool p --volume A=1G", "'A' is not one of a-z"),
            ("--pool p --volume a=1X", "is not a size"),
            ("--pool p --volume a=1G --nbd 10809", "is not an address"),
            ("--pool p --volume a=1G --cpus 3-1", "is not a list of processors"),
            ("--pool p --volume a=1G --threads 0", "from 1 to 256"),
            ("--pool p --volume a=1G --ack never", "[possible values: device, durable]"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
