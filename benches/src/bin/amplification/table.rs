//! The tables for people.

/// One figure and its bar, which it must not exceed.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) what: String,
    pub(crate) bar: f64,
    /// What the figure counts, with a space in front.
    pub(crate) unit: &'static str,
    pub(crate) figure: f64,
    pub(crate) made_of: String,
}

impl Line {
    /// False for a figure that is none, too.
    fn is_met(&self, slack: f64) -> bool {
        self.figure <= self.bar * slack
    }
}

/// What checkpoints of one volume took.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    pub(crate) gib: u64,
    /// One checkpoint of a map in which nothing has changed.
    pub(crate) at_start_bytes: u64,
    /// One checkpoint under random writes, on average.
    pub(crate) under_load_bytes: u64,
    pub(crate) checkpoints: u64,
    /// Written by clients meanwhile.
    pub(crate) client_bytes: u64,
}

pub(crate) fn print(facts: &[String], slack: f64, lines: &[Line], checkpoints: &[Checkpoints]) {
    println!("{}\n", facts.join(" · "));
    println!("| Volume | Checkpoint, nothing changed | Under random 4 KiB writes | For each client byte |");
    println!("|---|---|---|---|");
    for one in checkpoints {
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let share = (one.under_load_bytes * one.checkpoints) as f64 / one.client_bytes as f64;
        println!(
            "| {} GiB | {} KiB | {} KiB, {} of them | {share:.3} |",
            one.gib,
            one.at_start_bytes >> 10,
            one.under_load_bytes >> 10,
            one.checkpoints
        );
    }
    println!("\n| Row | Bar | Berth | Made of | Met |\n|---|---|---|---|---|");
    for line in lines {
        let Line { what, bar, unit, figure, made_of } = line;
        let met = if line.is_met(slack) { "yes" } else { "NO" };
        println!("| {what} | ≤ {:.2}{unit} | {figure:.2} | {made_of} | {met} |", bar * slack);
    }
    let figures: Vec<String> =
        lines.iter().map(|line| format!("{} {:.2}{}", line.what, line.figure, line.unit)).collect();
    println!("figure: {}", figures.join("; "));
}

#[cfg(test)]
mod tests {
    use super::Line;

    #[test]
    fn a_bar_is_met_up_to_the_bar_and_never_by_nonsense() {
        let line = |figure| Line { what: String::new(), bar: 2.0, unit: "", figure, made_of: String::new() };
        assert!(line(2.0).is_met(1.0) && line(4.0).is_met(2.0));
        assert!(!line(2.1).is_met(1.0) && !line(f64::NAN).is_met(9.0));
    }
}
