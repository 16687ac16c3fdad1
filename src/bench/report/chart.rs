//! One chart as an SVG. Colours stand for roles: the page gives axes and grid those of its theme.
use crate::error::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;

/// Twice what it is shown at: plotters rounds to whole units.
const SIZE: (u32, u32) = (960, 580);

/// Text and axes. The page's style knows them by value.
pub(super) const INK: RGBColor = RGBColor(0x5B, 0x65, 0x73);
/// Lines behind the data.
pub(super) const GRID: RGBColor = RGBColor(0xE4, 0xE7, 0xEB);

/// Colours of series, told apart on white and on black, and by most of those who see few colours.
pub(super) const COLOURS: [RGBColor; 6] = [
    RGBColor(0x2F, 0x78, 0xC4),
    RGBColor(0xD9, 0x6B, 0x1E),
    RGBColor(0x3A, 0x9A, 0x5B),
    RGBColor(0x95, 0x5F, 0xB8),
    RGBColor(0xC2, 0x3B, 0x5E),
    RGBColor(0x1C, 0x96, 0xA3),
];

/// Text of axes, in units of [`SIZE`].
const FONT: i32 = 34;

/// Values so many times as large as others leave nothing to see of those on a linear axis.
const FAR: f64 = 40.0;

/// A chart.
pub(super) struct Chart {
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

/// One of its axes.
pub(super) struct Axis {
    /// With the unit.
    pub label: String,
    pub low: f64,
    pub high: f64,
    pub scale: Scale,
}

/// What a place on an axis stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scale {
    Linear,
    /// `low` and `high` are powers of ten.
    Log,
    /// Names of 0, 1, 2... instead of numbers.
    Named(Vec<String>),
}

impl Axis {
    /// Numbers from 0 to a little more than `high`.
    pub fn to(label: &str, high: f64) -> Self {
        let high = if high.is_finite() && high > 0.0 { high * 1.04 } else { 1.0 };
        Axis { label: label.to_owned(), low: 0.0, high, scale: Scale::Linear }
    }

    /// As [`Axis::to`], but logarithmic where `least` and `high` are far apart.
    pub fn between(label: &str, least: f64, high: f64) -> Self {
        if !(least > 0.0 && high.is_finite() && high / least > FAR) {
            return Axis::to(label, high);
        }
        Axis { label: label.to_owned(), low: least.log10().floor(), high: high.log10() + 0.05, scale: Scale::Log }
    }

    /// Names at equal distances.
    pub fn named(label: &str, names: Vec<String>) -> Self {
        let high = names.len().max(1) as f64 - 0.6;
        Axis { label: label.to_owned(), low: -0.4, high, scale: Scale::Named(names) }
    }
}

/// One set of data.
pub(super) struct Series {
    pub name: String,
    pub colour: RGBColor,
    pub points: Vec<(f64, f64)>,
    pub mark: Mark,
}

/// How points show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Line,
    /// Dashed: what was asked for beside what came.
    Reference,
    /// A line with a dot at each point.
    Dotted,
    Dots,
    /// Points two by two are the ends of upright strokes.
    Strokes,
}

impl Chart {
    /// The SVG, made to be put into a page.
    pub fn svg(&self) -> Result<String> {
        let mut text = String::new();
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let drawn = self.draw(&root).and_then(|()| root.present().map_err(Into::into));
        drawn.map_err(|e| Error::internal(format!("chart of {}: {e}", self.y.label)))?;
        drop(root);
        // Its size is the page's business.
        let size = format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1);
        Ok(text.replacen(&size, "", 1))
    }

    fn draw(&self, root: &DrawingArea<SVGBackend<'_>, Shift>) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let mut chart = ChartBuilder::on(root)
            .margin_top(18)
            .margin_right(34)
            .x_label_area_size(84)
            .y_label_area_size(128)
            .build_cartesian_2d(self.x.low..self.x.high, self.y.low..self.y.high)?;
        let font = |size: i32| ("sans-serif", size).into_font().color(&INK);
        let (x, y) = (|v: &f64| self.x.tick(*v), |v: &f64| self.y.tick(*v));
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID.stroke_width(2))
            .axis_style(INK.stroke_width(2))
            .x_labels(match &self.x.scale {
                Scale::Named(names) => names.len().clamp(2, 12),
                _ => 6,
            })
            .y_labels(6)
            .x_label_formatter(&x)
            .y_label_formatter(&y)
            .label_style(font(FONT))
            .axis_desc_style(font(FONT))
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .draw()?;
        for series in &self.series {
            let (colour, points) = (series.colour, &series.points);
            let inside: Vec<_> = points
                .iter()
                .map(|(x, y)| (self.x.place(*x), self.y.place(*y)))
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .collect();
            match series.mark {
                Mark::Line | Mark::Dotted => {
                    chart.draw_series(LineSeries::new(inside.clone(), colour.stroke_width(4)))?;
                }
                Mark::Reference => {
                    chart.draw_series(DashedLineSeries::new(inside.clone(), 14, 12, INK.stroke_width(3)))?;
                }
                Mark::Strokes => {
                    let strokes =
                        inside.chunks_exact(2).map(|ends| PathElement::new(ends.to_vec(), colour.stroke_width(3)));
                    chart.draw_series(strokes)?;
                }
                Mark::Dots => {}
            }
            if matches!(series.mark, Mark::Dots | Mark::Dotted) {
                let size = if inside.len() > 80 { 4 } else { 7 };
                chart.draw_series(inside.into_iter().map(|at| Circle::new(at, size, colour.filled())))?;
            }
        }
        Ok(())
    }
}

impl Axis {
    /// Where a value stands.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Log => value.max(1e-9).log10().max(self.low),
            _ => value,
        }
    }

    fn tick(&self, place: f64) -> String {
        let whole = place.round();
        let is_whole = (place - whole).abs() < 1e-6;
        match &self.scale {
            Scale::Linear => short(place),
            Scale::Log if is_whole => short(10f64.powf(whole)),
            Scale::Named(names) if is_whole && whole >= 0.0 => names.get(whole as usize).cloned().unwrap_or_default(),
            _ => String::new(),
        }
    }
}

/// A number of a tick.
fn short(value: f64) -> String {
    // What is left of 0 after additions of ticks.
    let value = if value.abs() < 1e-9 { 0.0 } else { value };
    let plain = |x: f64| {
        let text = format!("{x:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match value.abs() {
        size if size >= 1e6 => format!("{}M", plain(value / 1e6)),
        size if size >= 1e4 => format!("{}k", plain(value / 1e3)),
        _ => plain(value),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ticks_are_short() {
        for (value, text) in [(0.0, "0"), (0.25, "0.25"), (1500.0, "1500"), (12_000.0, "12k"), (2.5e6, "2.5M")] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn names_stand_at_whole_places_alone() {
        let axis = Axis::named("adapters", ["1", "10"].map(str::to_owned).into());
        assert_eq!([0.0, 0.5, 1.0, 2.0, -1.0].map(|v| axis.tick(v)), ["1", "", "10", "", ""]);
    }

    #[test]
    fn values_far_apart_get_powers_of_ten() {
        let axis = Axis::between("ms", 0.5, 5000.0);
        assert_eq!((axis.low, axis.scale.clone()), (-1.0, Scale::Log));
        assert_eq!([-1.0, 0.0, 0.5, 2.0].map(|p| axis.tick(p)), ["0.1", "1", "", "100"]);
        assert_eq!((axis.place(100.0), axis.place(0.0)), (2.0, -1.0));
        assert_eq!(Axis::between("ms", 1.0, 20.0).scale, Scale::Linear);
    }

    #[test]
    fn odd_data_draws_too() {
        for points in [vec![], vec![(0.0, f64::NAN)], vec![(0.0, 0.0); 3]] {
            for mark in [Mark::Line, Mark::Reference, Mark::Dotted, Mark::Dots, Mark::Strokes] {
                let series = Series { name: "x".into(), colour: COLOURS[0], points: points.clone(), mark };
                let chart = Chart { x: Axis::to("x", 0.0), y: Axis::to("y", f64::NAN), series: vec![series] };
                assert!(chart.svg().unwrap().starts_with("<svg viewBox"), "{}", chart.svg().unwrap());
            }
        }
    }
}
