//! The same figures as a picture: one group of bars per row, a line from the least to the greatest value.

use std::fmt::Write as _;
use std::path::Path;

use crate::servers::Contender;
use crate::table::{Results, unit};

const WIDTH: f64 = 900.0;
const LABEL_WIDTH: f64 = 180.0;
const BAR_HEIGHT: f64 = 16.0;

fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::Berth | Contender::BerthCluster => "#0b6e4f",
        Contender::Raw => "#555555",
        Contender::Echo => "#aaaaaa",
        _ => "#c8792b",
    }
}

/// Draws all rows into `file`.
pub(crate) fn write(results: &Results, file: &Path) -> Result<(), String> {
    let mut body = String::new();
    let mut y = 20.0;
    for row in results.rows() {
        let _ = writeln!(
            body,
            "<text x='10' y='{y}' font-weight='bold'>{}, {}</text>",
            row.title,
            unit(row.measure)
        );
        y += 10.0;
        let bars: Vec<_> = results
            .contenders(row)
            .into_iter()
            .filter_map(|who| Some((who, results.main_figures(row, who)?)))
            .collect();
        let greatest = bars.iter().map(|(_, s)| s.greatest).fold(f64::MIN_POSITIVE, f64::max);
        let scale = |value: f64| value / greatest * (WIDTH - LABEL_WIDTH - 90.0);
        for (who, spread) in bars {
            let (length, middle) = (scale(spread.median), y + BAR_HEIGHT / 2.0);
            let (from, to) = (LABEL_WIDTH + scale(spread.least), LABEL_WIDTH + scale(spread.greatest));
            let _ = writeln!(
                body,
                "<text x='{}' y='{}' text-anchor='end'>{}</text>\
                 <rect x='{LABEL_WIDTH}' y='{}' width='{length:.1}' height='{}' fill='{}'/>\
                 <line x1='{from:.1}' y1='{middle}' x2='{to:.1}' y2='{middle}' stroke='black'/>\
                 <text x='{:.1}' y='{}'>{:.0}</text>",
                LABEL_WIDTH - 8.0,
                y + 12.0,
                who.name(),
                y + 1.0,
                BAR_HEIGHT - 2.0,
                colour(who),
                to.max(LABEL_WIDTH + length) + 6.0,
                y + 12.0,
                spread.median
            );
            y += BAR_HEIGHT;
        }
        y += 28.0;
    }
    let svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{y}' font-family='sans-serif' \
         font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n{body}</svg>\n"
    );
    std::fs::write(file, svg).map_err(|error| format!("{}: {error}", file.display()))
}
