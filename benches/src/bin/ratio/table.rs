//! Medians, spreads and ratios of the samples, as a table and as JSON.

use std::fmt::Write as _;
use std::path::Path;

use benches::fio::Output;
use serde_json::{Value, json};

use crate::rows::{Bar, Measure, Row};
use crate::servers::Contender;

/// Raw runs of one round may differ by this part of the larger one.
const RAW_SPREAD_MAX: f64 = 0.15;

/// One job's figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) iops: f64,
    pub(crate) bytes_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) server_cpu_us: f64,
    pub(crate) machine_cpu_us: f64,
}

impl Sample {
    pub(crate) fn new(output: &Output, server_cpu_seconds: f64, machine_cpu_seconds: f64) -> Sample {
        #[expect(clippy::cast_precision_loss, reason = "a count of I/Os is far below 2^52")]
        let per_io = |seconds: f64| seconds * 1e6 / output.ios.max(1) as f64;
        Sample {
            iops: output.iops,
            bytes_per_second: output.bytes_per_second,
            p50_us: output.p50_us,
            p99_us: output.p99_us,
            server_cpu_us: per_io(server_cpu_seconds),
            machine_cpu_us: per_io(machine_cpu_seconds),
        }
    }

    fn figure(&self, measure: Measure) -> f64 {
        match measure {
            Measure::Iops => self.iops,
            Measure::MedianLatency => self.p50_us,
            Measure::Throughput => self.bytes_per_second / 1e6,
        }
    }

    /// More is better.
    pub(crate) fn score(&self, row: &Row) -> f64 {
        match row.measure {
            Measure::MedianLatency => -self.p50_us,
            _ => self.figure(row.measure),
        }
    }

    pub(crate) fn short(&self, row: &Row) -> String {
        format!(
            "{:>9.0} {:5} p50 {:>7.1} µs  p99 {:>8.1} µs  CPU per I/O: server {:>5.1} µs, machine {:>5.1} µs",
            self.figure(row.measure),
            unit(row.measure),
            self.p50_us,
            self.p99_us,
            self.server_cpu_us,
            self.machine_cpu_us
        )
    }
}

pub(crate) fn unit(measure: Measure) -> &'static str {
    match measure {
        Measure::Iops => "IOPS",
        Measure::MedianLatency => "µs",
        Measure::Throughput => "MB/s",
    }
}

/// All samples of a run.
#[derive(Debug)]
pub(crate) struct Results {
    machine: Vec<String>,
    rounds: u32,
    seconds: u32,
    samples: Vec<(&'static str, Contender, u32, Sample)>,
}

/// Median, least and greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) greatest: f64,
}

/// None of nothing.
pub(crate) fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.sort_by(f64::total_cmp);
    let (least, greatest) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median =
        if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
    Some(Spread { median, least, greatest })
}

impl Results {
    pub(crate) fn new(machine: Vec<String>, rounds: u32, seconds: u32) -> Results {
        Results { machine, rounds, seconds, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: &Row, contender: Contender, round: u32, sample: Sample) {
        let name = crate::ROWS.iter().find(|known| known.name == row.name).expect("a known row").name;
        self.samples.push((name, contender, round, sample));
    }

    /// Those of one job in one round: two for the raw disk.
    fn of(&self, row: &Row, contender: Contender, round: u32) -> impl Iterator<Item = &Sample> {
        self.samples
            .iter()
            .filter(move |(name, who, when, _)| *name == row.name && *who == contender && *when == round)
            .map(|(.., sample)| sample)
    }

    /// Mean over the samples of a round, if it counts.
    fn in_round(
        &self,
        row: &Row,
        who: Contender,
        round: u32,
        figure: impl Fn(&Sample) -> f64,
    ) -> Option<f64> {
        if row.raw_must_agree {
            let raw = spread(self.of(row, Contender::Raw, round).map(|s| s.figure(row.measure)).collect())?;
            if raw.greatest - raw.least > RAW_SPREAD_MAX * raw.greatest {
                return None;
            }
        }
        let values: Vec<f64> = self.of(row, who, round).map(figure).collect();
        #[expect(clippy::cast_precision_loss, reason = "one or two samples")]
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (!values.is_empty()).then_some(mean)
    }

    pub(crate) fn figures(
        &self,
        row: &Row,
        who: Contender,
        figure: impl Fn(&Sample) -> f64,
    ) -> Option<Spread> {
        spread((0..self.rounds).filter_map(|round| self.in_round(row, who, round, &figure)).collect())
    }

    pub(crate) fn main_figures(&self, row: &Row, who: Contender) -> Option<Spread> {
        self.figures(row, who, |sample| sample.figure(row.measure))
    }

    fn paired(
        &self,
        row: &Row,
        (a, b): (Contender, Contender),
        figure: impl Fn(&Sample) -> f64,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<Spread> {
        let pair = |round| {
            let (a, b) = (self.in_round(row, a, round, &figure)?, self.in_round(row, b, round, &figure)?);
            Some(compare(a, b))
        };
        spread((0..self.rounds).filter_map(pair).collect())
    }

    pub(crate) fn contenders(&self, row: &Row) -> Vec<Contender> {
        let who = self.samples.iter().filter(|(name, ..)| *name == row.name).map(|(_, who, ..)| *who);
        who.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = &'static Row> {
        crate::ROWS.iter().filter(|row| self.samples.iter().any(|(name, ..)| *name == row.name))
    }

    fn best_other(&self, row: &Row) -> Option<Contender> {
        let sign = if row.measure == Measure::MedianLatency { -1.0 } else { 1.0 };
        let median = |who: &Contender| self.main_figures(row, *who).map_or(f64::MIN, |s| s.median * sign);
        let others = self.contenders(row).into_iter().filter(|who| who.is_yardstick());
        others.max_by(|a, b| median(a).total_cmp(&median(b)))
    }

    /// Berth's figure against one bar: a description, the spread, and whether it is met.
    fn judge(&self, row: &Row, bar: Bar) -> Option<(String, Spread, bool)> {
        let main = |sample: &Sample| sample.figure(row.measure);
        let berth = if row.replicas == 1 { Contender::Berth } else { Contender::BerthCluster };
        match bar {
            Bar::AtLeast(least) => {
                let value = self.main_figures(row, berth)?;
                Some((format!("≥ {least} {}", unit(row.measure)), value, value.median >= least))
            }
            Bar::AtMost(most) => {
                let value = self.main_figures(row, berth)?;
                Some((format!("≤ {most} {}", unit(row.measure)), value, value.median <= most))
            }
            Bar::CpuUs(most) => {
                let value = self.figures(row, berth, |sample| sample.server_cpu_us)?;
                Some((format!("server CPU ≤ {most} µs"), value, value.median <= most))
            }
            Bar::OfRawShared(least) => {
                let shares = f64::from(row.replicas);
                let ratio = self.paired(row, (berth, Contender::Raw), main, |a, b| a * shares / b)?;
                Some((format!("≥ {least} × raw ÷ {}", row.replicas), ratio, ratio.median >= least))
            }
            Bar::OfRaw(least) => {
                // A wire slower than the disk is the limit.
                let median = |who| self.main_figures(row, who).map_or(f64::MAX, |s| s.median);
                let limit = if median(Contender::Echo) < median(Contender::Raw) {
                    Contender::Echo
                } else {
                    Contender::Raw
                };
                let ratio = self.paired(row, (berth, limit), main, |a, b| a / b)?;
                Some((format!("≥ {least} × {}", limit.name()), ratio, ratio.median >= least))
            }
            Bar::OfBestOther(least) => {
                let other = self.best_other(row)?;
                let ratio = self.paired(row, (berth, other), main, |a, b| a / b)?;
                Some((format!("≥ {least} × {}", other.name()), ratio, ratio.median >= least))
            }
            Bar::OverRawUs(most) => {
                let over = self.paired(row, (berth, Contender::Raw), main, |a, b| a - b)?;
                Some((format!("≤ raw + {most} µs"), over, over.median <= most))
            }
            Bar::CpuOfQemu(most) => {
                let qemu = self.contenders(row).into_iter().find(|who| who.family() == "qemu-nbd")?;
                let cpu = |sample: &Sample| sample.server_cpu_us;
                let ratio = self.paired(row, (berth, qemu), cpu, |a, b| a / b)?;
                Some((format!("server CPU ≤ {most} × {}", qemu.name()), ratio, ratio.median <= most))
            }
        }
    }

    /// Bars that are met, and bars that were judged.
    pub(crate) fn bars_met(&self) -> (usize, usize) {
        let judged = self.rows().flat_map(|row| row.bars.iter().filter_map(|bar| self.judge(row, *bar)));
        let met: Vec<bool> = judged.map(|(.., met)| met).collect();
        (met.iter().filter(|met| **met).count(), met.len())
    }

    /// The tables for people.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("{}\n\n", self.machine.join(" · "));
        let _ = writeln!(text, "{} rounds of {} s; median (least – greatest)\n", self.rounds, self.seconds);
        for row in self.rows() {
            let _ = writeln!(
                text,
                "**{}**\n\n| | {} | p50 µs | p99 µs | server CPU µs per I/O | machine CPU µs per I/O |\n\
                 |---|---|---|---|---|---|",
                row.title,
                unit(row.measure)
            );
            for who in self.contenders(row) {
                let cell = |figure: fn(&Sample) -> f64| {
                    self.figures(row, who, figure)
                        .map_or_else(|| "–".to_owned(), |s| format!("{:.1}", s.median))
                };
                let main = self.main_figures(row, who).map_or_else(
                    || "no round counts".to_owned(),
                    |s| format!("{:.0} ({:.0} – {:.0})", s.median, s.least, s.greatest),
                );
                let _ = writeln!(
                    text,
                    "| {} | {main} | {} | {} | {} | {} |",
                    who.name(),
                    cell(|s| s.p50_us),
                    cell(|s| s.p99_us),
                    cell(|s| s.server_cpu_us),
                    cell(|s| s.machine_cpu_us)
                );
            }
            text.push('\n');
        }
        let _ = writeln!(text, "| Row | Bar | Berth, per pair | Met |\n|---|---|---|---|");
        for row in self.rows() {
            for &bar in row.bars {
                let Some((bar, value, met)) = self.judge(row, bar) else { continue };
                let Spread { median, least, greatest } = value;
                let met = if met { "yes" } else { "NO" };
                let _ = writeln!(
                    text,
                    "| {} | {bar} | {median:.2} ({least:.2} – {greatest:.2}) | {met} |",
                    row.title
                );
            }
        }
        text
    }

    /// Writes `results.json` and `results.md`.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), String> {
        let samples: Vec<Value> = self
            .samples
            .iter()
            .map(|(row, who, round, s)| {
                json!({"row": row, "contender": who.name(), "round": round, "iops": s.iops,
                       "bytes_per_second": s.bytes_per_second, "p50_us": s.p50_us, "p99_us": s.p99_us,
                       "server_cpu_us_per_io": s.server_cpu_us, "machine_cpu_us_per_io": s.machine_cpu_us})
            })
            .collect();
        let all = json!({"machine": self.machine, "seconds": self.seconds, "samples": samples});
        let text = serde_json::to_string_pretty(&all).map_err(|error| error.to_string())?;
        for (name, text) in [("results.json", text), ("results.md", self.markdown())] {
            let file = dir.join(name);
            std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(figure: f64) -> Sample {
        Sample {
            iops: figure,
            bytes_per_second: figure * 1e6,
            p50_us: figure,
            p99_us: figure,
            server_cpu_us: figure,
            machine_cpu_us: figure,
        }
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let mut results = Results::new(Vec::new(), 3, 1);
        let row = &crate::ROWS[0];
        // The machine halves its speed from round to round: no ratio across rounds would be right.
        for (round, speed) in [100.0, 50.0, 25.0].into_iter().enumerate() {
            let round = u32::try_from(round).unwrap();
            for (who, factor) in
                [(Contender::Raw, 1.0), (Contender::Berth, 1.2), (Contender::QemuNative, 0.3)]
            {
                results.add(row, who, round, sample(speed * factor));
            }
        }
        let (_, ratio, met) = results.judge(row, Bar::OfRaw(0.9)).unwrap();
        assert!((ratio.greatest - 1.2).abs() < 1e-9 && (ratio.least - 1.2).abs() < 1e-9 && met);
        let (text, ratio, met) = results.judge(row, Bar::OfBestOther(3.0)).unwrap();
        assert!((ratio.median - 4.0).abs() < 1e-9 && met && text.contains("qemu-nbd-native"));
        assert!(!results.judge(row, Bar::CpuOfQemu(0.35)).unwrap().2);
    }

    #[test]
    fn stream_rounds_with_an_unsteady_disk_do_not_count() {
        let row = crate::ROWS.iter().find(|row| row.raw_must_agree).unwrap();
        let mut results = Results::new(Vec::new(), 2, 1);
        for (round, raw) in [(0, [100.0, 80.0]), (1, [100.0, 90.0])] {
            for raw in raw {
                results.add(row, Contender::Raw, round, sample(raw));
            }
            results.add(row, Contender::Berth, round, sample(if round == 0 { 1.0 } else { 95.0 }));
        }
        let (_, ratio, _) = results.judge(row, Bar::OfRaw(0.85)).unwrap();
        assert!((ratio.least - 1.0).abs() < 1e-9);
    }
}
