//! The flags of `berth pool`, and how its results are printed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use datapath::store::layout::LANES_MAX;
use nbd_server::pool_check::{PoolCheck, check};
use nbd_server::pool_tools::{Inspection, LaneInspection, format, grow, inspect, remove_volume};
use nbd_server::pools::LANES;
use nbd_server::size::Size;
use nbd_server::volume_name::VolumeName;

use crate::Output;
use crate::remote::print;

/// Make, look at and change pools that no server has open.
#[derive(Debug, Args)]
pub(crate) struct PoolArguments {
    #[command(subcommand)]
    command: PoolCommand,

    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Make an empty pool of a new file, or of a blank file or block device.
    Format {
        /// File or block device.
        file: PathBuf,
        /// Its size: 20G, 512M, bytes [default: the size that it has].
        #[arg(long)]
        size: Option<Size>,
        /// Lanes: as many threads can share the pool.
        #[arg(long, value_name = "N", default_value_t = LANES, value_parser = clap::value_parser!(u32).range(1..=i64::from(LANES_MAX)))]
        lanes: u32,
        /// Destroy what is in it.
        #[arg(long)]
        force: bool,
    },
    /// Show the pool, its lanes and volumes.
    Inspect {
        /// File or block device.
        file: PathBuf,
    },
    /// Read everything, verify every checksum and every reference. Changes nothing; ends with 1 if there are problems.
    Check {
        /// File or block device.
        file: PathBuf,
    },
    /// Make the pool's file longer.
    Grow {
        /// The file.
        file: PathBuf,
        /// Its new size.
        #[arg(long)]
        size: Size,
    },
    /// Remove a volume with all its data.
    RmVolume {
        /// File or block device.
        file: PathBuf,
        /// The volume.
        name: VolumeName,
    },
}

/// Runs the command and prints what came of it. False if the pool has problems.
pub(crate) fn run(arguments: &PoolArguments) -> Result<bool, String> {
    let output = arguments.output;
    let told = |error: nbd_server::pool_tools::PoolToolError| error.to_string();
    match &arguments.command {
        PoolCommand::Format { file, size, lanes, force } => {
            let made = format(file, *size, *lanes, *force).map_err(told)?;
            print(output, &made, || {
                let size = Size { bytes: made.length_bytes };
                format!("{}: an empty pool of {size} with {} lanes\n", file.display(), made.lanes)
            })?;
        }
        PoolCommand::Inspect { file } => {
            let found = inspect(file).map_err(told)?;
            print(output, &found, || inspection(&found))?;
        }
        PoolCommand::Check { file } => {
            let found = check(file).map_err(told)?;
            print(output, &found, || verdict(&found))?;
            return Ok(found.is_clean());
        }
        PoolCommand::Grow { file, size } => {
            let grown = grow(file, *size).map_err(told)?;
            print(output, &grown, || {
                let (from, to) = (Size { bytes: grown.from_bytes }, Size { bytes: grown.to_bytes });
                format!("{}: grown from {from} to {to}\n", file.display())
            })?;
        }
        PoolCommand::RmVolume { file, name } => {
            let removed = remove_volume(file, name).map_err(told)?;
            print(output, &removed, || {
                let blocks = removed.released_blocks;
                format!("{}: volume {name} is removed, {blocks} blocks are free\n", file.display())
            })?;
        }
    }
    Ok(true)
}

fn inspection(pool: &Inspection) -> String {
    let anchors: Vec<String> = pool.anchors.iter().map(u32::to_string).collect();
    let mut text = format!(
        "{}: pool {}, format {}\n  {} in {} segments of {}, {} free; headers at segments {}: {} of 4 good\n",
        pool.path.display(),
        pool.id,
        pool.format_version,
        Size { bytes: pool.length_bytes },
        pool.segments,
        Size { bytes: u64::from(pool.segment_bytes) },
        pool.segments_free,
        anchors.join(", "),
        pool.headers_good,
    );
    pool.lanes.iter().for_each(|lane| describe_lane(&mut text, lane));
    text
}

fn describe_lane(text: &mut String, lane: &LaneInspection) {
    text.push_str(&format!(
        "  lane {}: checkpoint {} in {} of 4 roots, mount {}, last batch {} ({} after the checkpoint); {} segments, \
         {} live blocks\n",
        lane.lane,
        lane.checkpoint,
        lane.roots_good,
        lane.mount,
        lane.last_batch,
        lane.batches_after_checkpoint,
        lane.segments,
        lane.live_blocks,
    ));
    for volume in &lane.volumes {
        text.push_str(&format!(
            "    volume {}: {}, number {}, identity {}, epoch {}, sequence {}, {} live blocks\n",
            volume.name,
            Size { bytes: volume.size_bytes },
            volume.number,
            volume.identity,
            volume.epoch,
            volume.sequence,
            volume.live_blocks,
        ));
    }
}

fn verdict(check: &PoolCheck) -> String {
    let mut text = String::new();
    for problem in &check.listed {
        text.push_str(&format!("problem: {problem}\n"));
    }
    for note in &check.notes {
        text.push_str(&format!("note: {note}; the next start puts it right\n"));
    }
    let listed = u64::try_from(check.listed.len()).unwrap_or(u64::MAX);
    if check.problems > listed {
        text.push_str(&format!("and {} more problems\n", check.problems - listed));
    }
    let (path, problems) = (check.path.display(), check.problems);
    let (volumes, data, leaves) = (check.volumes, check.data_blocks, check.leaf_blocks);
    text.push_str(&format!(
        "{path}: {problems} problems; {volumes} volumes, {data} data blocks and {leaves} map blocks were read\n"
    ));
    text
}
