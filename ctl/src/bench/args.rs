//! The options of `berth bench`.

use std::path::PathBuf;
use std::str::FromStr;

use super::uri::NbdUri;
use super::verify::{Loss, SECTOR_BYTES};

/// Loads NBD volumes, measures latency from the moment each request should have started, and can verify
/// every byte.
#[derive(clap::Args, Clone, Debug)]
pub struct BenchArgs {
    /// Volumes: nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH.
    #[arg(required = true)]
    pub uris: Vec<NbdUri>,
    /// Requests per second, over all volumes, with random (Poisson) arrivals; 0 is as fast as the depth allows.
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
    /// Requests in flight per connection.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub depth: u32,
    /// Bytes per request, as 4k, or as a range 512-256k in which all magnitudes are equally frequent.
    #[arg(long, default_value = "4k")]
    pub block: BlockRange,
    /// Weight of reads in the mix.
    #[arg(long, default_value_t = 0)]
    pub read: u32,
    /// Weight of writes in the mix.
    #[arg(long, default_value_t = 0)]
    pub write: u32,
    /// Weight of trims in the mix.
    #[arg(long, default_value_t = 0)]
    pub trim: u32,
    /// Weight of writes of zeroes in the mix.
    #[arg(long, default_value_t = 0)]
    pub zeroes: u32,
    /// Weight of flushes in the mix.
    #[arg(long, default_value_t = 0)]
    pub flush: u32,
    /// Percentage of changes that ask to be durable at once (FUA).
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100))]
    pub fua: u32,
    /// Go through the volume in order; each connection has its own part.
    #[arg(long)]
    pub sequential: bool,
    /// Length of the run in seconds.
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Connections per volume.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub connections: u32,
    /// Best form of replies to ask the server for.
    #[arg(long, value_enum, default_value = "structured")]
    pub replies: Replies,
    /// When the server goes away, try for so many seconds to come back.
    #[arg(long, default_value_t = 0.0)]
    pub reconnect: f64,
    /// Where the volume may be found after its server is lost, besides its own URI: another node of its cluster.
    /// A server that owes an answer for --answer-timeout counts as lost. Needs --reconnect and one volume. May be
    /// given several times.
    #[arg(long, value_name = "URI")]
    pub failover: Vec<NbdUri>,
    /// A server that owes an answer for so many seconds is given up: with --failover the volume is looked for
    /// elsewhere, without it the run fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub answer_timeout: f64,
    /// Write sectors that tell where they come from, check every sector that is read, read everything at the
    /// end. The volume must read as zeroes, or be the one that --state tells about.
    #[arg(long)]
    pub verify: bool,
    /// What the server may go through while or after this runs.
    #[arg(long, value_enum, default_value = "kill")]
    pub after_loss: Loss,
    /// Keep what --verify knows in this file: loaded at the start if it exists, saved at the end (one volume).
    #[arg(long, requires = "verify")]
    pub state: Option<PathBuf>,
    /// Allow changes: what is on the volumes is lost.
    #[arg(long)]
    pub destroy_data: bool,
    /// Seed of the random choices.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Form of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Replies {
    /// Simple replies.
    Simple,
    /// Structured replies if the server has them.
    Structured,
    /// Extended headers if the server has them, else structured replies.
    Extended,
}

impl BenchArgs {
    /// The defaults of the command line for one volume: reads, for ten seconds.
    #[must_use]
    pub fn new(uri: NbdUri) -> BenchArgs {
        BenchArgs {
            uris: vec![uri],
            rate: 0.0,
            depth: 32,
            block: BlockRange { least: 4096, most: 4096 },
            read: 0,
            write: 0,
            trim: 0,
            zeroes: 0,
            flush: 0,
            fua: 0,
            sequential: false,
            duration: 10.0,
            connections: 1,
            replies: Replies::Structured,
            reconnect: 0.0,
            failover: Vec::new(),
            answer_timeout: 60.0,
            verify: false,
            after_loss: Loss::Kill,
            state: None,
            destroy_data: false,
            seed: 1,
        }
    }

    /// Refuses what makes no sense, in words that say what to do.
    pub(super) fn check(&self) -> Result<(), String> {
        let finite = |number: f64| number.is_finite() && number >= 0.0;
        if !finite(self.rate) || !finite(self.duration) || !finite(self.reconnect) {
            return Err("--rate, --duration and --reconnect are numbers of zero and more".to_owned());
        }
        if !(0.1..=86_400.0).contains(&self.answer_timeout) {
            return Err("--answer-timeout is a number of seconds from 0.1 to 86400".to_owned());
        }
        if self.write + self.trim + self.zeroes > 0 && !self.destroy_data {
            return Err(
                "writing destroys what is on the volume; add --destroy-data if that is wanted".to_owned()
            );
        }
        if self.verify && !u64::from(self.block.least).is_multiple_of(SECTOR_BYTES) {
            return Err(format!("--verify works in sectors: --block must be a multiple of {SECTOR_BYTES}"));
        }
        if !self.failover.is_empty() && (self.uris.len() > 1 || self.reconnect == 0.0) {
            return Err("--failover needs --reconnect, and one volume: start one run for each".to_owned());
        }
        if self.state.is_some() && self.uris.len() > 1 {
            return Err("--state belongs to one volume; start one run for each".to_owned());
        }
        Ok(())
    }
}

/// Lengths of requests: multiples of the least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// Shortest, in bytes; also the alignment of offsets.
    pub least: u32,
    /// Longest, in bytes; a multiple of the shortest.
    pub most: u32,
}

impl FromStr for BlockRange {
    type Err = String;

    fn from_str(text: &str) -> Result<BlockRange, String> {
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        let (least, most) = (bytes(least)?, bytes(most)?);
        if least == 0 || least > most || !most.is_multiple_of(least) || most > 32 << 20 {
            return Err("need 0 < least ≤ most ≤ 32m, and most a multiple of least".to_owned());
        }
        Ok(BlockRange { least, most })
    }
}

fn bytes(text: &str) -> Result<u32, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        _ => (text, 0),
    };
    let number: u32 = digits.parse().map_err(|_| format!("`{text}` is not a size like 512, 4k or 1m"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_read() {
        let range = |least, most| Ok(BlockRange { least, most });
        assert_eq!("4k".parse(), range(4096, 4096));
        assert_eq!("512-256k".parse(), range(512, 256 << 10));
        assert_eq!("1M".parse(), range(1 << 20, 1 << 20));
        for bad in ["", "k", "0", "8k-4k", "3k-4k", "64m", "4g", "99999m", "-"] {
            assert!(bad.parse::<BlockRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn writing_needs_permission() {
        let mut args = BenchArgs::new("nbd://h/v".parse().unwrap());
        args.write = 1;
        assert!(args.check().unwrap_err().contains("--destroy-data"));
        args.destroy_data = true;
        assert_eq!(args.check(), Ok(()));
    }
}
