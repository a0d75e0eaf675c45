//! Plots of a report: one figure of one measure, a bar for each path, in SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoSegmentedCoord, PathElement, RGBColor, Rectangle,
    SVGBackend, SegmentValue, WHITE,
};
use tunnel_tests::bench::run::Row;

const WIDTH: u32 = 760;
/// Pixels of a bar with the space around it.
const BAR: u32 = 30;
/// Pixels above and below the bars.
const FRAME: u32 = 100;
/// Pixels for the names of paths.
const NAMES: u32 = 200;
const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const OTHERS: RGBColor = RGBColor(0xb0, 0xb0, 0xb0);
const SPREAD: RGBColor = RGBColor(0x30, 0x30, 0x30);

/// Returns the plot of `rows`, which have one figure of one measure; bars are medians, lines the
/// spread.
pub(super) fn bars(title: &str, rows: &[&Row]) -> Result<String> {
    let mut svg = String::new();
    let height = FRAME + BAR * u32::try_from(rows.len())?;
    let most = rows.iter().map(|row| row.max).fold(0.0, f64::max);
    let unit = rows.first().map_or("", |row| row.unit.as_str());
    draw(&mut svg, (WIDTH, height), title, unit, most, rows)
        .map_err(|error| anyhow!("cannot plot {title}: {error}"))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    size: (u32, u32),
    title: &str,
    unit: &str,
    most: f64,
    rows: &[&Row],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, size).into_drawing_area();
    area.fill(&WHITE)?;
    // Zero would leave no room for a scale.
    let most = if most > 0.0 { most * 1.05 } else { 1.0 };
    let places = (0..rows.len().saturating_sub(1)).into_segmented();
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(45)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..most, places)?;
    // The first path is on top.
    let place = |index: usize| rows.len() - 1 - index;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(at) if *at < rows.len() => rows[place(*at)].path.clone(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc(unit)
        .y_labels(rows.len())
        .y_label_formatter(&name)
        .label_style(("sans-serif", 13))
        .draw()?;
    for (index, row) in rows.iter().enumerate() {
        let ours = row.path.starts_with("redirect") || row.path.starts_with("connect");
        let colour = if ours { OURS } else { OTHERS };
        let (from, to) = (
            SegmentValue::Exact(place(index)),
            SegmentValue::Exact(place(index) + 1),
        );
        let mut bar = Rectangle::new([(0.0, from), (row.median, to)], colour.filled());
        bar.set_margin(5, 5, 0, 0);
        chart.draw_series([bar])?;
        let middle = SegmentValue::CenterOf(place(index));
        let spread = vec![(row.min, middle.clone()), (row.max, middle)];
        chart.draw_series([PathElement::new(spread, SPREAD.stroke_width(2))])?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_names_every_path() -> Result<()> {
        let row = |path: &str, median: f64| Row {
            measure: "bulk".to_owned(),
            path: path.to_owned(),
            figure: "speed".to_owned(),
            unit: "Gbit/s".to_owned(),
            median,
            min: median / 2.0,
            max: median * 2.0,
            values: vec![median],
        };
        let rows = [row("direct", 20.0), row("redirect", 3.0), row("empty", 0.0)];
        let rows: Vec<_> = rows.iter().collect();
        let svg = bars("bulk", &rows)?;
        for text in ["<svg", "direct", "redirect", "empty", "Gbit/s", "bulk"] {
            assert!(svg.contains(text), "{text} is missing in {svg}");
        }
        bars("one", &rows[..1])?;
        Ok(())
    }
}
