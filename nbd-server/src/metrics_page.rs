//! The page for Prometheus: what every shard reports of itself, in OpenMetrics text.

use std::fmt;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use datapath::engine::report::{LaneReport, OperationClass, OperationReport, PeerBytes, ShardReport};
use datapath::reactor::Snapshot;
use datapath::reactor::mailbox::{Mailbox, Message};
use datapath::session::nbd::Rejection;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// A shard that has not answered by then is left out of the page.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// Upper bounds of the latency buckets, in microseconds; a last bucket takes the rest.
const BUCKETS_US: [u32; 16] = [
    20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
    10_000_000,
];

/// Asks all shards and writes the page.
#[must_use]
pub fn render(mailboxes: &[Mailbox<ShardReport>]) -> String {
    let answers: Vec<_> = mailboxes
        .iter()
        .map(|mailbox| {
            let (sender, receiver) = sync_channel(1);
            // One that has ended, or is told too much already, gives no answer.
            mailbox.post(Message::Inspect(sender)).ok().map(|()| receiver)
        })
        .collect();
    let shards = answers.iter().map(|answer| answer.as_ref()?.recv_timeout(ANSWER_MAX).ok()).collect();
    write_page(shards)
}

/// The page of these shards; `None` for one that did not answer.
fn write_page(shards: Vec<Option<Snapshot<ShardReport>>>) -> String {
    let mut registry = Registry::with_prefix("berth");
    registry.register_collector(Box::new(Page { shards }));
    let mut page = String::new();
    text::encode(&mut page, &registry).expect("a string takes all");
    page
}

#[derive(Debug)]
struct Page {
    shards: Vec<Option<Snapshot<ShardReport>>>,
}

/// Name without prefix and suffix, help, and how to read it.
type Metric<S, V> = (&'static str, &'static str, fn(&S) -> V);

const SHARD_COUNTERS: [Metric<Snapshot<ShardReport>, u64>; 24] = [
    ("connections_accepted", "Connections taken", |shard| shard.counters.accepted),
    (
        "connections_abandoned",
        "Connections closed for want of places after their clients had gone",
        |shard| shard.report.connections_abandoned,
    ),
    ("connections_refused", "Connections refused because there were too many", |shard| {
        shard.counters.refused + shard.report.connections_refused
    }),
    ("handshakes_timed_out", "Connections that did not choose an export in time", |shard| {
        shard.report.handshakes_timed_out
    }),
    ("accept_failures", "Failures to accept a connection", |shard| shard.counters.accept_failures),
    ("loop_turns", "Turns of the event loop", |shard| shard.counters.turns),
    ("loop_system_calls", "System calls of the event loop", |shard| shard.counters.enters),
    ("receive_buffer_shortages", "Receives that waited for a buffer", |shard| {
        shard.counters.buffer_shortages
    }),
    ("connections_put_out", "Connections closed for holding memory that others waited for", |shard| {
        shard.report.connections_put_out
    }),
    ("inputs_parked", "Times that a stalled connection gave back its receive buffer", |shard| {
        shard.report.inputs_parked
    }),
    (
        "reads_from_other_replicas",
        "Reads answered by another replica because the own one is damaged",
        |shard| shard.report.repairs.reads_from_peers,
    ),
    (
        "blocks_repaired_from_replicas",
        "Damaged blocks written again with another replica's content",
        |shard| shard.report.repairs.blocks_repaired,
    ),
    (
        "reads_without_good_copy",
        "Reads of damaged blocks that no other replica in sync could answer",
        |shard| shard.report.repairs.reads_without_good_copy,
    ),
    (
        "fills_without_room",
        "Attempts to bring a replica back that ended because its pool had no room",
        |shard| shard.report.repairs.fills_without_room,
    ),
    (
        "volumes_removed",
        "Volumes whose data was removed because they have no replica here any more",
        |shard| shard.report.volumes_removed,
    ),
    (
        "removals_failed",
        "Volumes without a replica here whose data stays, because a part of their map cannot be read",
        |shard| shard.report.removals_failed,
    ),
    ("scrub_passes", "Passes over volumes led here that saw everything", |shard| shard.report.checks.passes),
    ("scrub_compared_blocks", "Blocks read at every replica in sync and compared", |shard| {
        shard.report.checks.compared_blocks
    }),
    ("scrub_repaired_blocks", "Damaged blocks of any replica that passes made good", |shard| {
        shard.report.checks.repaired_blocks
    }),
    ("scrub_unreadable_blocks", "Damaged blocks that passes could not make good", |shard| {
        shard.report.checks.unreadable_blocks
    }),
    ("scrub_differing_blocks", "Blocks that are sound at two replicas and differ", |shard| {
        shard.report.checks.differing_blocks
    }),
    ("scrub_repeated_comparisons", "Comparisons that a change of the blocks has spoiled", |shard| {
        shard.report.checks.disturbed
    }),
    ("device_failures", "Device operations that the kernel failed", |shard| shard.counters.device_failures),
    ("device_transfers_in_parts", "Device operations done in parts", |shard| shard.counters.short_transfers),
];

const SHARD_GAUGES: [Metric<Snapshot<ShardReport>, u64>; 7] = [
    ("connections", "Connections open now", |shard| shard.report.connections.into()),
    ("requests_under_way", "Requests being worked on now", |shard| shard.report.requests_under_way.into()),
    ("receive_buffers_kept", "Receive buffers of connections that are stalled", |shard| {
        shard.report.receive_buffers_kept.into()
    }),
    ("parked_bytes", "Received bytes of stalled connections outside of receive buffers", |shard| {
        shard.report.parked_bytes
    }),
    ("memory_arena_bytes", "Memory for requests, lanes and receive buffers", |shard| {
        shard.arena_bytes.into()
    }),
    ("memory_pages", "Pages of 4096 bytes for requests and lanes", |shard| shard.report.pages.into()),
    ("memory_pages_free", "Of these, free now", |shard| shard.report.pages_free.into()),
];

const OPERATION_COUNTERS: [Metric<OperationReport, u64>; 3] = [
    ("requests", "Requests answered", |operation| operation.requests),
    ("request_errors", "Requests answered with an error", |operation| operation.errors),
    ("request_bytes", "Bytes read, written or released", |operation| operation.bytes),
];

const LANE_COUNTERS: [Metric<LaneReport, u64>; 12] = [
    ("client_blocks_written", "Blocks that clients wrote", |lane| lane.counters.client_blocks_written),
    ("batches_written", "Batches of the log written", |lane| lane.counters.batches),
    ("checkpoints", "Checkpoints completed", |lane| lane.counters.checkpoints),
    ("segments_cleaned", "Segments emptied by the cleaner", |lane| lane.counters.cleaned_segments),
    ("device_syncs", "Syncs of the device", |lane| lane.counters.syncs),
    ("checksum_errors", "Blocks whose checksum was wrong", |lane| lane.counters.checksum_errors),
    ("lost_blocks", "Damaged blocks whose place was given up", |lane| lane.counters.lost_blocks),
    ("device_errors", "Device operations that failed", |lane| lane.counters.device_errors),
    ("waits_for_space", "Changes that waited for space", |lane| lane.counters.waits_for_space),
    ("refused_no_space", "Changes refused for want of space", |lane| lane.counters.refused_no_space),
    ("map_misses", "Leaves of the map that had to be loaded", |lane| lane.leaf_misses),
    ("map_evictions", "Leaves of the map dropped for want of room", |lane| lane.leaf_evictions),
];

const LANE_GAUGES: [Metric<LaneReport, u64>; 7] = [
    ("map_leaves", "Leaves of the map in memory", |lane| lane.leaves_resident as u64),
    ("map_leaves_dirty", "Of these, with unwritten changes", |lane| lane.leaves_dirty as u64),
    ("segments_free", "Segments of the lane ready to be written", |lane| lane.segments_free.into()),
    ("segments", "Segments of the lane", |lane| lane.segments_owned.into()),
    ("live_blocks", "Blocks that something refers to", |lane| lane.live_blocks),
    ("capacity_blocks", "Blocks that can be alive at most", |lane| lane.capacity_blocks),
    ("lane_failed", "1 if a write or sync failed and the lane is read-only", |lane| lane.failed.into()),
];

type LaneValue = fn(&LaneReport) -> u64;
type PeerValue = fn(&PeerBytes) -> u64;

/// Bytes sent to other nodes by what for; together they are all of them.
const PEER_BYTES: [(&str, PeerValue); 4] = [
    ("change", |sent| sent.changes),
    ("copy", |sent| sent.copies),
    ("fetched", |sent| sent.fetched),
    ("other", |sent| sent.other),
];

/// Blocks written to the device by what for; together they are all of them.
const DEVICE_WRITES: [(&str, LaneValue); 4] = [
    ("log", |lane| {
        let counters = &lane.counters;
        let others = counters.moved_blocks + counters.map_blocks_written + counters.zero_blocks_written;
        counters.device_blocks_written.saturating_sub(others)
    }),
    ("cleaner", |lane| lane.counters.moved_blocks),
    ("map", |lane| lane.counters.map_blocks_written),
    ("zeroes", |lane| lane.counters.zero_blocks_written),
];

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let mut up = encoder.encode_descriptor("shard_up", "1 if it answered", None, MetricType::Gauge)?;
        for (shard, snapshot) in self.shards.iter().enumerate() {
            gauge(&mut up, &[("shard", shard.to_string())], u64::from(snapshot.is_some()))?;
        }
        for (name, help, value) in SHARD_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.shards()
                .try_for_each(|(shard, snapshot)| counter(&mut family, &[shard], value(snapshot)))?;
        }
        for (name, help, value) in SHARD_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            self.shards().try_for_each(|(shard, snapshot)| gauge(&mut family, &[shard], value(snapshot)))?;
        }
        self.encode_operations(encoder)?;
        self.encode_rejections(encoder)?;
        self.encode_peer_bytes(encoder)?;
        self.encode_lanes(encoder)
    }
}

impl Page {
    /// The shards that answered, with their label.
    fn shards(&self) -> impl Iterator<Item = (Label, &Snapshot<ShardReport>)> {
        let shards = self.shards.iter().enumerate();
        shards.filter_map(|(shard, snapshot)| Some((("shard", shard.to_string()), snapshot.as_ref()?)))
    }

    fn lanes(&self) -> impl Iterator<Item = ([Label; 2], &LaneReport)> {
        self.shards().flat_map(|(shard, snapshot)| {
            let lanes = snapshot.report.lanes.iter();
            lanes.map(move |report| ([shard.clone(), ("lane", report.number.to_string())], report))
        })
    }

    fn operations(&self) -> impl Iterator<Item = ([Label; 2], &OperationReport)> {
        self.shards().flat_map(|(shard, snapshot)| {
            let reports = OperationClass::ALL.iter().zip(&snapshot.report.operations);
            reports
                .map(move |((_, name), report)| ([shard.clone(), ("operation", (*name).to_owned())], report))
        })
    }

    fn encode_operations(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in OPERATION_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.operations()
                .try_for_each(|(labels, report)| counter(&mut family, &labels, value(report)))?;
        }
        let help = "From the whole request received to its reply queued";
        let mut family =
            encoder.encode_descriptor("request_duration_seconds", help, None, MetricType::Histogram)?;
        for (labels, report) in self.operations() {
            let labels = &labels[..];
            let (sum, buckets) = buckets_of(report);
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                sum,
                report.latency_us.len(),
                &buckets,
                None,
            )?;
        }
        Ok(())
    }

    fn encode_rejections(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Options, requests and connections refused, by reason";
        let mut family = encoder.encode_descriptor("rejections", help, None, MetricType::Counter)?;
        for (shard, snapshot) in self.shards() {
            for reason in Rejection::ALL {
                let labels = [shard.clone(), ("reason", reason.name().to_owned())];
                counter(&mut family, &labels, snapshot.report.rejections.count(*reason).into())?;
            }
        }
        Ok(())
    }

    fn encode_peer_bytes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Bytes sent to other nodes, by what for";
        let mut family = encoder.encode_descriptor("peer_bytes_sent", help, None, MetricType::Counter)?;
        for (shard, snapshot) in self.shards() {
            for (kind, value) in PEER_BYTES {
                let labels = [shard.clone(), ("kind", kind.to_owned())];
                counter(&mut family, &labels, value(&snapshot.report.peer_bytes_sent))?;
            }
        }
        Ok(())
    }

    fn encode_lanes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in LANE_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.lanes().try_for_each(|(labels, lane)| counter(&mut family, &labels, value(lane)))?;
        }
        for (name, help, value) in LANE_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            self.lanes().try_for_each(|(labels, lane)| gauge(&mut family, &labels, value(lane)))?;
        }
        let help = "Blocks written to the device, by what for";
        let mut family =
            encoder.encode_descriptor("device_blocks_written", help, None, MetricType::Counter)?;
        for ([shard, lane], report) in self.lanes() {
            for (kind, value) in DEVICE_WRITES {
                let labels = [shard.clone(), lane.clone(), ("kind", kind.to_owned())];
                counter(&mut family, &labels, value(report))?;
            }
        }
        let help = "Blocks written to the device for each block that clients wrote";
        let mut family = encoder.encode_descriptor("write_amplification", help, None, MetricType::Gauge)?;
        for (labels, lane) in self.lanes().filter(|(_, lane)| lane.counters.client_blocks_written > 0) {
            #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
            let ratio =
                lane.counters.device_blocks_written as f64 / lane.counters.client_blocks_written as f64;
            let labels = &labels[..];
            family.encode_family(&labels)?.encode_gauge(&ratio)?;
        }
        Ok(())
    }
}

type Label = (&'static str, String);

fn counter(family: &mut MetricEncoder<'_>, labels: &[Label], value: u64) -> fmt::Result {
    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn gauge(family: &mut MetricEncoder<'_>, labels: &[Label], value: u64) -> fmt::Result {
    family.encode_family(&labels)?.encode_gauge(&value)
}

/// Sum in seconds, and requests in each bucket.
fn buckets_of(report: &OperationReport) -> (f64, Vec<(f64, u64)>) {
    let seconds = |us: u32| f64::from(us) / 1e6;
    let mut buckets: Vec<(f64, u64)> = BUCKETS_US.iter().map(|bound| (seconds(*bound), 0)).collect();
    buckets.push((f64::INFINITY, 0));
    for step in report.latency_us.iter_recorded() {
        let us = step.value_iterated_to();
        let index = BUCKETS_US.partition_point(|bound| u64::from(*bound) < us);
        buckets[index].1 += step.count_since_last_iteration();
    }
    #[expect(clippy::cast_precision_loss, reason = "a sum of measurements")]
    let count = report.latency_us.len() as f64;
    (report.latency_us.mean() * count / 1e6, buckets)
}

#[cfg(test)]
mod tests {
    use datapath::engine::report::{OperationReport, ShardReport};
    use datapath::reactor::features::Features;
    use datapath::reactor::{Counters, Snapshot};

    use super::{buckets_of, write_page};

    #[test]
    fn requests_fall_into_the_bucket_that_holds_their_latency() {
        let mut report = OperationReport::default();
        [1, 20, 21, 700, 30_000_000]
            .into_iter()
            .for_each(|us| report.latency_us.record(us).expect("in range"));
        let (sum, buckets) = buckets_of(&report);
        assert_eq!(&buckets[..2], [(0.000_02, 2), (0.000_05, 1)]);
        assert_eq!((buckets[5], buckets[16].1), ((0.001, 1), 1));
        assert!((29.9..30.4).contains(&sum), "{sum}");
    }

    #[test]
    fn a_shard_without_an_answer_is_down_and_the_page_is_whole() {
        let mut report = ShardReport::default();
        report.operations[1].requests = 3;
        report.peer_bytes_sent.copies = 5;
        let counters = Counters { accepted: 7, ..Counters::default() };
        let up = Snapshot { report, counters, features: Features::EVERY, connections: 0, arena_bytes: 0 };
        let page = write_page(vec![Some(up), None]);
        for line in [
            "berth_shard_up{shard=\"0\"} 1",
            "berth_shard_up{shard=\"1\"} 0",
            "berth_connections_accepted_total{shard=\"0\"} 7",
            "berth_requests_total{shard=\"0\",operation=\"write\"} 3",
            "berth_rejections_total{shard=\"0\",reason=\"range\"} 0",
            "berth_peer_bytes_sent_total{shard=\"0\",kind=\"copy\"} 5",
            "berth_request_duration_seconds_bucket{le=\"+Inf\",shard=\"0\",operation=\"read\"} 0",
            "# EOF",
        ] {
            assert!(page.lines().any(|found| found == line), "no {line} in:\n{page}");
        }
    }
}
