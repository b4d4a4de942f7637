//! Line charts as PNG files.

use std::error;
use std::ops::Range;
use std::path::Path;

use eqim::{Error, Result, picture};
use image::{RgbImage, imageops};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::register_font;

/// Width of a chart in pixels.
pub const WIDTH: u32 = 1200;
/// Height of a chart in pixels.
pub const HEIGHT: u32 = 800;

/// Supersampling factor. Charts are drawn this many times larger and scaled down, because plotters draws thick lines
/// with jagged edges.
const FINE: u32 = 2;
/// Name under which the font is registered with plotters.
const FONT: &str = "DejaVu Sans";
/// Colours that colour-blind readers can distinguish (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// A series with at most this many values shows each value as a dot. The line of a single value has no length.
const DOTS: usize = 40;

/// A chart. The value axis is logarithmic if all values are positive. Values that are not finite are left out. A chart
/// without values is empty.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// Title above the chart.
    pub title: &'a str,
    /// Label of the horizontal axis.
    pub x: &'a str,
    /// Scale of the horizontal axis. Positions on a logarithmic axis are positive.
    pub x_scale: Scale,
    /// Label of the value axis.
    pub y: &'a str,
    /// Lines of the chart. A series keeps its colour if series before it are empty.
    pub series: Vec<Series<'a>>,
}

/// A line of a chart.
#[derive(Clone, Debug)]
pub struct Series<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// Pairs of a position on the horizontal axis and a value.
    pub points: Vec<(f64, f64)>,
    /// How the values are drawn.
    pub style: Style,
}

/// How the values of a series are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As a line through all values.
    Line,
    /// As a thin line, with their moving average as a thick line: for noisy values.
    Noisy,
    /// As dots, with a line through the Pareto front: the values that no other value is below and left of.
    Front,
}

type Drawn<T = ()> = Result<T, Box<dyn error::Error>>;
type Canvas<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Area<'a, 'b> = ChartContext<'a, BitMapBackend<'b>, Cartesian2d<Axis, Axis>>;

/// Draws charts below each other as one PNG of [`WIDTH`] × [`HEIGHT`] pixels per chart, and replaces `path` with it.
///
/// # Errors
/// [`Error::run`] if the charts cannot be drawn or written.
pub fn draw(path: &Path, charts: &[Chart]) -> Result<()> {
    let height = HEIGHT * charts.len() as u32;
    let mut pixels = RgbImage::new(FINE * WIDTH, FINE * height);
    let drawn = paint(&mut pixels, charts);
    drawn.map_err(|error| Error::run(path.display(), format!("cannot be drawn: {error}")))?;
    let pixels = imageops::thumbnail(&pixels, WIDTH, height);
    picture::write_rgb(path, &pixels, (WIDTH, height))
}

fn paint(pixels: &mut RgbImage, charts: &[Chart]) -> Drawn {
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).map_err(|_| "the font cannot be read")?;
    let size = pixels.dimensions();
    let canvas = BitMapBackend::with_buffer(pixels, size).into_drawing_area();
    canvas.fill(&WHITE)?;
    for (chart, part) in charts.iter().zip(canvas.split_evenly((charts.len(), 1))) {
        Plot::new(chart).paint(&part)?;
    }
    Ok(canvas.present()?)
}

/// An axis with given ticks.
struct Axis {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (first, last): (i32, i32)) -> i32 {
        let part = (place - self.range.start) / (self.range.end - self.range.start);
        first + (part * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Minor grid lines, between the ticks, are not drawn.
        if hint.weight().allow_light_points() { vec![] } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Equal differences have equal lengths.
    Linear,
    /// Equal ratios have equal lengths.
    Logarithmic,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.log10(),
        }
    }

    fn value(self, place: f64) -> f64 {
        match self {
            Self::Linear => place,
            Self::Logarithmic => 10f64.powf(place),
        }
    }

    /// Positions of about eight labels.
    fn ticks(self, range: &Range<f64>) -> Vec<f64> {
        match self {
            Self::Linear => round_numbers(range),
            Self::Logarithmic => round_exponents(range),
        }
    }
}

/// A series with its colour and its positions.
struct Line<'a> {
    series: &'a Series<'a>,
    colour: RGBColor,
    /// Positions on both axes. On a logarithmic axis, the position is the logarithm of the value.
    points: Vec<(f64, f64)>,
}

impl Line<'_> {
    fn paint(&self, area: &mut Area) -> Drawn {
        let (points, thick) = (self.points.iter().copied(), self.colour.stroke_width(2 * FINE));
        if self.series.style == Style::Noisy {
            area.draw_series(LineSeries::new(points.clone(), self.colour.mix(0.45).stroke_width(1)))?;
        }
        if self.points.len() <= DOTS || self.series.style == Style::Front {
            area.draw_series(points.clone().map(|point| Circle::new(point, 3 * FINE, self.colour.filled())))?;
        }
        let line: Vec<(f64, f64)> = match self.series.style {
            Style::Line => points.collect(),
            Style::Noisy => smoothed(&self.points).collect(),
            Style::Front => front(&self.points),
        };
        let legend = area.draw_series(LineSeries::new(line, thick))?.label(self.series.name);
        let length = 24 * FINE as i32;
        legend.legend(move |(x, y)| PathElement::new([(x, y), (x + length, y)], thick));
        Ok(())
    }
}

/// The points that no other point is below and left of, from left to right.
fn front(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut lowest = f64::INFINITY;
    sorted.retain(|&(_, value)| {
        let better = value < lowest;
        lowest = lowest.min(value);
        better
    });
    sorted
}

/// Exponential moving average. Its window grows with the length of the series. At the start it is the mean of the
/// values so far.
fn smoothed(points: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> {
    let window = (points.len() as f64 / 100.0).max(4.0);
    let mut mean = 0.0;
    points.iter().enumerate().map(move |(index, &(x, place))| {
        let weight = 1.0 / window.min(index as f64 + 1.0);
        mean = (1.0 - weight) * mean + weight * place;
        (x, mean)
    })
}

/// The lines of a chart that are drawn, and the scale of their value axis.
struct Plot<'a> {
    chart: &'a Chart<'a>,
    scale: Scale,
    lines: Vec<Line<'a>>,
}

impl<'a> Plot<'a> {
    fn new(chart: &'a Chart<'a>) -> Self {
        let coloured = chart.series.iter().zip(COLOURS.into_iter().cycle());
        let line = |(series, colour): (&'a Series<'a>, RGBColor)| {
            let points = series.points.iter().copied().filter(|point| point.1.is_finite()).collect();
            Line { series, colour, points }
        };
        let mut lines: Vec<Line> = coloured.map(line).collect();
        lines.retain(|line| !line.points.is_empty());
        let positive = lines.iter().flat_map(|line| &line.points).all(|&(_, value)| value > 0.0);
        let scale = if positive && !lines.is_empty() { Scale::Logarithmic } else { Scale::Linear };
        for (x, value) in lines.iter_mut().flat_map(|line| &mut line.points) {
            (*x, *value) = (chart.x_scale.place(*x), scale.place(*value));
        }
        Self { chart, scale, lines }
    }

    fn paint(&self, canvas: &Canvas) -> Drawn {
        let mut area = self.area(canvas)?;
        self.paint_axes(&mut area)?;
        for line in &self.lines {
            line.paint(&mut area)?;
        }
        if self.lines.is_empty() { Ok(()) } else { paint_legend(&mut area) }
    }

    fn area<'c, 'b>(&self, canvas: &'c Canvas<'b>) -> Drawn<Area<'c, 'b>> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let x_margin = if self.chart.x_scale == Scale::Logarithmic { 0.05 } else { 0.0 };
        let across = extent(points().map(|point| point.0), x_margin);
        let places = extent(points().map(|point| point.1), 0.05);
        let (ticks, place_ticks) = (self.chart.x_scale.ticks(&across), self.scale.ticks(&places));
        let mut builder = ChartBuilder::on(canvas);
        builder.margin(16 * FINE).margin_right(32 * FINE).caption(self.chart.title, font(22));
        builder.x_label_area_size(52 * FINE).y_label_area_size(84 * FINE);
        Ok(builder.build_cartesian_2d(Axis { range: across, ticks }, Axis { range: places, ticks: place_ticks })?)
    }

    fn paint_axes(&self, area: &mut Area) -> Drawn {
        let label = |text: &str, scale: Scale| match scale {
            Scale::Linear => text.to_string(),
            Scale::Logarithmic => format!("{text} (logarithmic)"),
        };
        let x_label = |x: &f64| number(self.chart.x_scale.value(*x));
        let place_label = |place: &f64| number(self.scale.value(*place));
        let mut mesh = area.configure_mesh();
        mesh.bold_line_style(BLACK.mix(0.12).stroke_width(FINE)).axis_style(BLACK.mix(0.6).stroke_width(FINE));
        mesh.label_style(font(15)).axis_desc_style(font(17)).set_all_tick_mark_size(5 * FINE);
        mesh.x_desc(label(self.chart.x, self.chart.x_scale)).x_label_formatter(&x_label);
        mesh.y_desc(label(self.chart.y, self.scale)).y_label_formatter(&place_label);
        Ok(mesh.draw()?)
    }
}

fn paint_legend<'a, 'b: 'a>(area: &mut Area<'a, 'b>) -> Drawn {
    let mut legend = area.configure_series_labels();
    legend.position(SeriesLabelPosition::UpperRight).margin(12 * FINE).legend_area_size(32 * FINE);
    legend.background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.3).stroke_width(FINE)).label_font(font(16));
    Ok(legend.draw()?)
}

fn font(size: u32) -> (&'static str, u32) {
    (FONT, size * FINE)
}

/// The range of an axis that contains all `places`, extended on both sides by `margin` times its length.
fn extent(places: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
    let Some((low, high)) = places.fold(None, |found: Option<(f64, f64)>, place| {
        Some(found.map_or((place, place), |(low, high)| (low.min(place), high.max(place))))
    }) else {
        return 0.0..1.0;
    };
    // The range of constant values is extended too, so that the axis has a length.
    let (length, least) = (high - low, low.abs().max(1.0) * 1e-9);
    let around = if length > least { margin * length } else { 0.05 * low.abs().max(1.0) };
    low - around..high + around
}

/// Multiples of a step of 1, 2 or 5 times a power of ten.
fn round_numbers(range: &Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|&step| step >= rough);
    let step = step.unwrap_or(rough);
    let (first, last) = ((range.start / step).ceil() as i64, (range.end / step).floor() as i64);
    (first..=last).map(|multiple| multiple as f64 * step).collect()
}

/// Base-10 exponents of round numbers: powers of ten if there are enough of them, otherwise also values between them.
fn round_exponents(range: &Range<f64>) -> Vec<f64> {
    let stride = ((range.end - range.start) / 10.0).ceil().max(1.0) as usize;
    let (first, last) = (range.start.floor() as i32, range.end.ceil() as i32);
    let factors: [&[f64]; 3] = [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0]];
    let ticks = factors.into_iter().map(|factors| {
        let exponents = (first..=last).step_by(stride).map(f64::from);
        let ticks = exponents.flat_map(|exponent| factors.iter().map(move |factor| exponent + factor.log10()));
        ticks.filter(|tick| range.contains(tick)).collect::<Vec<_>>()
    });
    let values = Scale::Logarithmic.value(range.start)..Scale::Logarithmic.value(range.end);
    let enough = ticks.into_iter().find(|ticks| ticks.len() >= 5);
    enough.unwrap_or_else(|| round_numbers(&values).into_iter().map(f64::log10).collect())
}

/// Text of a label. It is rounded to ten significant digits, which removes rounding errors.
fn number(value: f64) -> String {
    let value = format!("{value:.9e}").parse().unwrap_or(value);
    match value.abs() {
        0.0 | 1e-3..1e7 => value.to_string(),
        _ => format!("{value:e}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;

    fn series<'a>(name: &'a str, values: &[f64]) -> Series<'a> {
        let points = values.iter().enumerate().map(|(index, &value)| (10.0 * index as f64, value)).collect();
        Series { name, points, style: Style::Noisy }
    }

    fn chart(series: Vec<Series>) -> Chart {
        Chart { title: "a title", x: "step", x_scale: Scale::Linear, y: "loss", series }
    }

    fn drawn(charts: &[Chart]) -> RgbImage {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.png");
        draw(&path, charts).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        image::open(path).unwrap().to_rgb8()
    }

    fn has_colour(image: &RgbImage, colour: RGBColor) -> bool {
        image.pixels().any(|pixel| pixel.0 == [colour.0, colour.1, colour.2])
    }

    #[test]
    fn curves_of_all_kinds_are_drawn() {
        let cases: [&[f64]; 9] = [
            &[0.5],
            &[0.0],
            &[-3.0, -3.0, -3.0],
            &[0.25; 100],
            &[1e-9, 1e-9],
            &[3.0, f64::NAN, 2.0, f64::INFINITY, 1.0],
            &[1.0, 0.0, -1.0],
            &[1e-30, 1e30],
            &[1000.001, 1000.002],
        ];
        for case in cases {
            for style in [Style::Line, Style::Noisy, Style::Front] {
                let image = drawn(&[chart(vec![Series { style, ..series("loss", case) }])]);
                assert_eq!(image.dimensions(), (WIDTH, HEIGHT), "{case:?}");
                assert!(has_colour(&image, COLOURS[0]), "{case:?}");
            }
        }
    }

    #[test]
    fn a_chart_without_values_is_empty() {
        for values in [&[][..], &[f64::NAN, f64::NAN]] {
            let image = drawn(&[chart(vec![series("loss", values)])]);
            assert_eq!(image.dimensions(), (WIDTH, HEIGHT));
            assert!(image.pixels().map(|pixel| pixel.0).collect::<BTreeSet<_>>().len() > 1);
            assert!(!has_colour(&image, COLOURS[0]));
        }
    }

    #[test]
    fn series_keep_their_colours_beside_empty_ones() {
        let image = drawn(&[chart(vec![series("a", &[1.0, 2.0]), series("b", &[]), series("c", &[2.0, 3.0])])]);
        assert!(has_colour(&image, COLOURS[0]) && has_colour(&image, COLOURS[2]));
        assert!(!has_colour(&image, COLOURS[1]));
    }

    #[test]
    fn charts_stand_below_each_other() {
        let image = drawn(&[chart(vec![]), chart(vec![series("a", &[]), series("b", &[1.0, 2.0])])]);
        assert_eq!(image.dimensions(), (WIDTH, 2 * HEIGHT));
        let half = |y| imageops::crop_imm(&image, 0, y, WIDTH, HEIGHT).to_image();
        assert!(!has_colour(&half(0), COLOURS[1]) && has_colour(&half(HEIGHT), COLOURS[1]));
    }

    #[test]
    fn a_picture_that_cannot_be_written_is_named() {
        let error = draw(Path::new("/no/such/folder/loss.png"), &[chart(vec![])]).unwrap_err();
        assert!(!error.is_input() && error.to_string().contains("/no/such/folder/loss.png"), "{error}");
    }

    #[test]
    fn positive_values_have_a_logarithmic_axis() {
        let scale = |values: &[f64]| Plot::new(&chart(vec![series("loss", values)])).scale;
        assert_eq!(scale(&[1.0, f64::NAN, 0.1]), Scale::Logarithmic);
        assert_eq!(scale(&[1.0, 0.0]), Scale::Linear);
    }

    #[test]
    fn ticks_are_round() {
        let ticks = |scale: Scale, range: Range<f64>| {
            let range = scale.place(range.start)..scale.place(range.end);
            scale.ticks(&range).into_iter().map(|tick| number(scale.value(tick))).collect::<Vec<_>>()
        };
        assert_eq!(ticks(Scale::Linear, -0.1..1.1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(ticks(Scale::Logarithmic, 0.03..1.2), ["0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(ticks(Scale::Logarithmic, 1e-6..0.02), ["1e-6", "1e-5", "1e-4", "0.001", "0.01"]);
        assert_eq!(
            ticks(Scale::Logarithmic, 0.61..0.69),
            ["0.61", "0.62", "0.63", "0.64", "0.65", "0.66", "0.67", "0.68", "0.69"]
        );
        for exponent in 1..300 {
            let range = 10f64.powi(-exponent)..3.0 * 10f64.powi(exponent);
            assert!((4..=40).contains(&ticks(Scale::Logarithmic, range).len()), "{exponent}");
        }
    }

    #[test]
    fn a_front_has_no_point_that_is_worse_in_both() {
        let points = [(3.0, 1.0), (1.0, 4.0), (2.0, 5.0), (2.0, 2.0), (2.0, 2.0), (4.0, 1.0)];
        assert_eq!(front(&points), [(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)]);
        let points = [(0.01, 3.0), (100.0, 0.5)].to_vec();
        let logarithmic = Chart { x_scale: Scale::Logarithmic, ..chart(vec![]) };
        let image = drawn(&[Chart { series: vec![Series { name: "a", points, style: Style::Front }], ..logarithmic }]);
        assert!(has_colour(&image, COLOURS[0]));
    }

    #[test]
    fn smoothing_starts_as_the_mean() {
        let means: Vec<f64> = smoothed(&[(0.0, 4.0), (1.0, 2.0), (2.0, 0.0)]).map(|point| point.1).collect();
        assert_eq!(means, [4.0, 3.0, 2.0]);
    }
}
