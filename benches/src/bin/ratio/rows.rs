//! What is measured, and what the design asks for.

/// Which figure decides a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// I/Os per second.
    Iops,
    /// Median latency.
    MedianLatency,
    /// Bytes per second.
    Throughput,
}

/// What Berth is held to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    /// Times the figure of the raw disk, or of the wire or client where those are lower.
    OfRaw(f64),
    /// Times the figure of the best other server.
    OfBestOther(f64),
    /// Microseconds more than the raw disk.
    OverRawUs(f64),
    /// Times the server CPU per I/O of qemu-nbd.
    CpuOfQemu(f64),
    /// At least this figure.
    AtLeast(f64),
    /// At most this figure.
    AtMost(f64),
    /// At most so many microseconds of CPU per I/O, of all servers together.
    CpuUs(f64),
    /// Times the figure of the raw disk, divided by the replicas that share it.
    OfRawShared(f64),
}

/// One workload.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) rw: &'static str,
    pub(crate) block: &'static str,
    pub(crate) depth: u32,
    /// Copies of the volume, each in the pool of a node of its own, all on this machine.
    pub(crate) replicas: u32,
    /// Every write is followed by a flush; latencies are those of both.
    pub(crate) flush_each: bool,
    pub(crate) measure: Measure,
    pub(crate) bars: &'static [Bar],
    /// A round counts only if its two raw runs agree within 15 %.
    pub(crate) raw_must_agree: bool,
}

/// The targets. Rows whose names end in `-r3` are of a cluster.
pub(crate) const ROWS: [Row; 11] = [
    Row {
        name: "w4k",
        title: "4 KiB random write, QD32",
        rw: "randwrite",
        block: "4k",
        depth: 32,
        replicas: 1,
        flush_each: false,
        measure: Measure::Iops,
        bars: &[Bar::OfBestOther(3.0), Bar::OfRaw(0.9), Bar::CpuOfQemu(0.35)],
        raw_must_agree: false,
    },
    Row {
        name: "r4k",
        title: "4 KiB random read, QD32",
        rw: "randread",
        block: "4k",
        depth: 32,
        replicas: 1,
        flush_each: false,
        measure: Measure::Iops,
        bars: &[Bar::OfRaw(0.9), Bar::CpuOfQemu(0.35)],
        raw_must_agree: false,
    },
    Row {
        name: "w4k1",
        title: "4 KiB random write, QD1, p50",
        rw: "randwrite",
        block: "4k",
        depth: 1,
        replicas: 1,
        flush_each: false,
        measure: Measure::MedianLatency,
        bars: &[Bar::OverRawUs(45.0)],
        raw_must_agree: false,
    },
    Row {
        name: "r4k1",
        title: "4 KiB random read, QD1, p50",
        rw: "randread",
        block: "4k",
        depth: 1,
        replicas: 1,
        flush_each: false,
        measure: Measure::MedianLatency,
        bars: &[Bar::OverRawUs(45.0)],
        raw_must_agree: false,
    },
    Row {
        name: "w128k",
        title: "128 KiB sequential write, QD8",
        rw: "write",
        block: "128k",
        depth: 8,
        replicas: 1,
        flush_each: false,
        measure: Measure::Throughput,
        bars: &[Bar::OfRaw(0.7), Bar::OfBestOther(1.7)],
        raw_must_agree: false,
    },
    Row {
        name: "r128k",
        title: "128 KiB sequential read, QD8",
        rw: "read",
        block: "128k",
        depth: 8,
        replicas: 1,
        flush_each: false,
        measure: Measure::Throughput,
        bars: &[Bar::OfRaw(0.85)],
        raw_must_agree: true,
    },
    Row {
        name: "w4k-r3",
        title: "4 KiB random write, QD32, 3 replicas",
        rw: "randwrite",
        block: "4k",
        depth: 32,
        replicas: 3,
        flush_each: false,
        measure: Measure::Iops,
        bars: &[Bar::AtLeast(45_000.0), Bar::CpuUs(40.0)],
        raw_must_agree: false,
    },
    Row {
        name: "w4k1-r3",
        title: "4 KiB random write, QD1, p50, 3 replicas",
        rw: "randwrite",
        block: "4k",
        depth: 1,
        replicas: 3,
        flush_each: false,
        measure: Measure::MedianLatency,
        bars: &[Bar::AtMost(190.0)],
        raw_must_agree: false,
    },
    Row {
        name: "w4k1f-r3",
        title: "4 KiB random write and flush, QD1, p50, 3 replicas",
        rw: "randwrite",
        block: "4k",
        depth: 1,
        replicas: 3,
        flush_each: true,
        measure: Measure::MedianLatency,
        bars: &[Bar::AtMost(250.0)],
        raw_must_agree: false,
    },
    Row {
        name: "r4k-r3",
        title: "4 KiB random read, QD32, 3 replicas",
        rw: "randread",
        block: "4k",
        depth: 32,
        replicas: 3,
        flush_each: false,
        measure: Measure::Iops,
        bars: &[Bar::OfRaw(0.9)],
        raw_must_agree: false,
    },
    Row {
        name: "w128k-r3",
        title: "128 KiB sequential write, QD8, 3 replicas",
        rw: "write",
        block: "128k",
        depth: 8,
        replicas: 3,
        flush_each: false,
        measure: Measure::Throughput,
        bars: &[Bar::OfRawShared(0.7)],
        raw_must_agree: false,
    },
];

/// The rows of these names, or all.
pub(crate) fn named(names: &[String]) -> Result<Vec<&'static Row>, String> {
    if names.is_empty() {
        return Ok(ROWS.iter().collect());
    }
    let find = |name: &String| {
        let known = || ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(" ");
        ROWS.iter()
            .find(|row| row.name == name)
            .ok_or_else(|| format!("no row `{name}`; there are {}", known()))
    };
    names.iter().map(find).collect()
}
