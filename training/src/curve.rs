//! Loss curves: a plot of the metrics of a training run.

use std::path::Path;

use eqim::Result;
use eqim_cli::chart::{self, Chart, Scale, Series, Style};

use crate::metrics::Record;

/// Plots the metrics `names` over the steps and writes the plot to `path` as a PNG. Each metric has a thin line for its
/// values and a thick line for the smoothed values. Records without a value of a metric are skipped.
///
/// # Errors
/// The errors of [`chart::draw`].
pub fn draw(path: &Path, title: &str, records: &[Record], names: &[&str]) -> Result<()> {
    let y = if let [name] = names { name } else { "value" };
    let series = names.iter().map(|name| series(records, name)).collect();
    chart::draw(path, &[Chart { title, x: "step", x_scale: Scale::Linear, y, series }])
}

fn series<'a>(records: &[Record], name: &'a str) -> Series<'a> {
    let value = |record: &Record| record.values.get(name).copied().flatten();
    let points = records.iter().filter_map(|record| Some((record.step as f64, value(record)?))).collect();
    Series { name, points, style: Style::Noisy }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn records_that_lack_a_name_are_left_out() {
        let record = |step, values: &[(&str, Option<f64>)]| Record {
            step,
            values: values.iter().map(|&(name, value)| (name.to_string(), value)).collect::<BTreeMap<_, _>>(),
        };
        let records = [
            record(1, &[("loss", Some(3.0))]),
            record(2, &[("loss", None), ("validation_loss", Some(4.0))]),
            record(3, &[("loss", Some(2.0))]),
        ];
        assert_eq!(series(&records, "loss").points, [(1.0, 3.0), (3.0, 2.0)]);
        assert_eq!(series(&records, "validation_loss").points, [(2.0, 4.0)]);
        assert_eq!(series(&records, "absent").points, []);
    }
}
