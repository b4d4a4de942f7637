//! The quantization report as text.

use std::path::Path;

use eqim::{Result, files};
use eqim_cli::table;
use eqim_export::quantization::{QuantizationReport, SpeedPair, StageQuality, decibels};
use eqim_export::write::{REPORT_FILE, REPORT_TEXT_FILE};

/// The report as text.
pub fn text(report: &QuantizationReport) -> String {
    let title = format!(
        "FP32 against INT8 for {} (the rest in {}), same noise, {} steps, guidance {}, on ONNX Runtime:",
        report.target, report.precision, report.steps, report.cfg
    );
    let tables = [stages(report), images(report), rollouts(report), tokens(report)];
    format!("{}\n\n{title}\n\n{}\n", report.verdict, tables.join("\n\n"))
}

/// Writes the report to `folder`, as JSON and as text.
///
/// # Errors
/// [`eqim::Error::run`] if a file cannot be written.
pub fn write(report: &QuantizationReport, folder: &Path) -> Result<()> {
    files::write_json(&folder.join(REPORT_FILE), report)?;
    files::write(&folder.join(REPORT_TEXT_FILE), text(report).as_bytes())
}

fn stages(report: &QuantizationReport) -> String {
    let stage = |stage: &StageQuality| {
        let int8 = if stage.int8 { "INT8" } else { "" };
        let mut row = vec![stage.stage.clone(), int8.into(), format!("{:.1e}", stage.relative_error)];
        row.extend(times(stage.times.or(stage.gained_nothing)));
        row.extend(stage.gained_nothing.map(|_| "not faster, not quantized".into()));
        row
    };
    let image = |pair| {
        let mut row = vec!["image of 16 tokens".into(), String::new(), String::new()];
        row.extend(times(Some(pair)));
        row
    };
    let [fp32, int8] = [report.bytes.fp32, report.bytes.int8].map(|bytes| bytes as f64 / 1e6);
    let mut size = vec!["size, MB".into(), String::new(), String::new()];
    size.extend([format!("{fp32:.1}"), format!("{int8:.1}"), format!("{:.2}×", fp32 / int8)]);
    let rows = report.stages.iter().map(stage).chain(report.end_to_end.map(image)).chain([size]);
    table::text(&["stage", "", "error", "FP32 ms", "INT8 ms", "speed", ""], rows)
}

/// Times in FP32 and INT8 in milliseconds, and the speedup of INT8.
fn times(pair: Option<SpeedPair>) -> [String; 3] {
    let milliseconds = |seconds: f64| format!("{:.2}", 1e3 * seconds);
    pair.map_or_else(Default::default, |pair| {
        [milliseconds(pair.fp32), milliseconds(pair.int8), format!("{:.2}×", pair.speedup())]
    })
}

fn images(report: &QuantizationReport) -> String {
    let rows = report.images.iter().map(|image| {
        let name = format!("class {}, seed {}", image.class, image.seed);
        vec![name, format!("{:.2e}", image.relative_error), decibels(image.psnr), format!("{:.4}", image.ssim)]
    });
    table::text(&["images of 16 tokens", "token error", "PSNR", "SSIM"], rows)
}

fn rollouts(report: &QuantizationReport) -> String {
    let rows = report.rollouts.iter().map(|rollout| {
        let (name, error) = (format!("{} tokens", rollout.tokens), format!("{:.2e}", rollout.relative_error));
        let drift = format!("{:.2} of {:.2}", rollout.largest_drift, rollout.largest_value);
        vec![name, error, decibels(rollout.psnr), format!("{:.4}", rollout.ssim), drift]
    });
    table::text(&["rollout", "token error", "PSNR", "SSIM", "largest drift"], rows)
}

/// A table of the tokens 0, 1, 3, 7, 15 and so on.
fn tokens(report: &QuantizationReport) -> String {
    let shown = report.positions.iter().filter(|position| (position.token + 1).is_power_of_two());
    let rows = shown.map(|position| {
        let (error, cosine) = (format!("{:.2e}", position.relative_error), format!("{:.6}", position.cosine));
        vec![position.token.to_string(), error, cosine]
    });
    table::text(&["token", "error", "cosine"], rows)
}
