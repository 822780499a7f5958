//! SVG plots.

use std::path::PathBuf;

use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 360);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x1b, 0x6c, 0xa8),
    RGBColor(0xd9, 0x5f, 0x02),
    RGBColor(0x4d, 0x92, 0x21),
    RGBColor(0x7b, 0x32, 0x94),
    RGBColor(0x80, 0x80, 0x80),
    RGBColor(0xb0, 0x30, 0x30),
];

/// Where plots go, if anywhere.
pub struct Plots(Option<PathBuf>);

/// A name and its points.
pub type Line = (String, Vec<(f64, f64)>);

impl Plots {
    pub fn new(directory: Option<PathBuf>) -> Result<Plots, String> {
        if let Some(directory) = &directory {
            std::fs::create_dir_all(directory)
                .map_err(|error| format!("cannot make {}: {error}", directory.display()))?;
        }
        Ok(Plots(directory))
    }

    /// Bars with their values. The axis begins at `from`.
    pub fn bars(
        &self,
        file: &str,
        title: &str,
        unit: &str,
        bars: &[(String, f64)],
        from: f64,
    ) -> Result<(), String> {
        let Some(path) = self.0.as_ref().map(|directory| directory.join(file)) else {
            return Ok(());
        };
        let most = bars.iter().map(|(_, value)| *value).fold(from, f64::max);
        let draw = || -> Result<(), Box<dyn std::error::Error>> {
            let area = SVGBackend::new(&path, SIZE).into_drawing_area();
            area.fill(&WHITE)?;
            let count = bars.len() as f64;
            let mut chart = ChartBuilder::on(&area)
                .caption(title, ("sans-serif", 18))
                .margin(10)
                .x_label_area_size(30)
                .y_label_area_size(55)
                .build_cartesian_2d(0.0..count, from..most * 1.15)?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .disable_x_axis()
                .y_desc(unit)
                .draw()?;
            for (at, ((name, value), colour)) in bars.iter().zip(COLOURS.iter().cycle()).enumerate() {
                let x = at as f64;
                chart.draw_series([Rectangle::new(
                    [(x + 0.15, from), (x + 0.85, *value)],
                    colour.filled(),
                )])?;
                let label = |text: String, y: f64| Text::new(text, (x + 0.15, y), ("sans-serif", 14));
                chart.draw_series([label(format!("{value:.1}"), value + most * 0.06)])?;
                chart.draw_series([label(name.clone(), from + most * 0.04)])?;
            }
            area.present()?;
            Ok(())
        };
        draw().map_err(|error| format!("cannot write {}: {error}", path.display()))
    }

    /// Lines over one axis, with a legend.
    pub fn lines(
        &self,
        file: &str,
        title: &str,
        (x_unit, y_unit): (&str, &str),
        lines: &[Line],
        (low, high): (f64, f64),
    ) -> Result<(), String> {
        let Some(path) = self.0.as_ref().map(|directory| directory.join(file)) else {
            return Ok(());
        };
        let xs = || lines.iter().flat_map(|(_, points)| points).map(|&(x, _)| x);
        let (left, right) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
        let draw = || -> Result<(), Box<dyn std::error::Error>> {
            let area = SVGBackend::new(&path, SIZE).into_drawing_area();
            area.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&area)
                .caption(title, ("sans-serif", 18))
                .margin(10)
                .x_label_area_size(40)
                .y_label_area_size(55)
                .build_cartesian_2d(left..right, low..high)?;
            chart
                .configure_mesh()
                .light_line_style(WHITE)
                .x_desc(x_unit)
                .y_desc(y_unit)
                .draw()?;
            for ((name, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.3))
                .draw()?;
            area.present()?;
            Ok(())
        };
        draw().map_err(|error| format!("cannot write {}: {error}", path.display()))
    }
}
