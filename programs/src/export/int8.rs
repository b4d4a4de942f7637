//! The INT8 flags of `eqim-export onnx` and `eqim-export trt`: writes graphs in INT8 and measures their quality and
//! speed.

use std::path::{Path, PathBuf};

use clap::Args;
use eqim::bundle::{Int8Target, Precision};
use eqim::engine::candle::CandleEngine;
use eqim::model::Stage;
use eqim::weights::Weights;
use eqim::{Config, Error, Result};
use eqim_calibration::policy::{default_stages, patterns};
use eqim_calibration::{Policy, Preview, Table, plan};
use eqim_cli::flags::tolerance;
use eqim_cli::say;
use eqim_export::quantization::{self, LEAST_SPEEDUP, Pair, QuantizationReport, Settings, SpeedPair};
use eqim_export::validate::validate_preview;
use eqim_export::write::{self, Draft, Options};

use super::report;

/// The first operator set in which `QuantizeLinear` and `DequantizeLinear` support scales in FP16.
const FP16_SCALES_OPSET: i64 = 19;

/// INT8 settings.
#[derive(Args)]
pub struct Int8 {
    /// Quantize products of these stages to INT8: prefill, step, flow, decoder, encoder [default: step,flow,decoder for
    /// TensorRT, all for a CPU]; everything else is in FP16 in an engine, and in --dtype in a bundle
    #[arg(long, value_name = "STAGES", num_args = 0..=1, value_delimiter = ',', requires = "calibration", group = "precision")]
    pub int8: Option<Vec<Stage>>,
    /// Calibration table of this model, written by eqim-export calibrate
    #[arg(long, value_name = "TABLE.json", requires = "int8")]
    pub calibration: Option<PathBuf>,
    /// Regular expression of scopes to exclude from INT8; can be given several times
    #[arg(long, alias = "keep", value_name = "REGEX", requires = "int8")]
    exclude: Vec<String>,
    /// Regular expression of matrices to run in W8A8 instead of weight-only, for TensorRT; can be given several times
    #[arg(long, value_name = "REGEX", requires = "int8")]
    w8a8: Vec<String>,
    /// Minimum PSNR of an image of 16 tokens against FP32, dB
    #[arg(long, value_name = "DB", default_value_t = 30.0, requires = "int8", value_parser = tolerance)]
    min_psnr: f32,
    /// Write the INT8 result even if it is slower than FP32 or below --min-psnr
    #[arg(long, requires = "int8")]
    force: bool,
}

impl Int8 {
    /// The policy that the flags specify; `None` without `--int8`.
    ///
    /// # Errors
    /// [`Error::input`] if the table or a pattern does not fit the model.
    pub fn policy(&self, config: &Config, weights: &Weights, target: Int8Target) -> Result<Option<Policy>> {
        let (Some(stages), Some(path)) = (&self.int8, &self.calibration) else { return Ok(None) };
        let table = Table::read(path)?;
        table.check_model(path, config, weights)?;
        let stages = if stages.is_empty() { default_stages(target).to_vec() } else { stages.clone() };
        let mut policy = Policy::new(target, stages, table);
        policy.exclude = patterns("exclude", &self.exclude)?;
        policy.w8a8 = patterns("w8a8", &self.w8a8)?;
        if target == Int8Target::Cpu && !policy.w8a8.is_empty() {
            return Err(Error::input("--w8a8", "is for TensorRT: on a CPU all products are W8A8"));
        }
        plan(config, &policy)?;
        Ok(Some(policy))
    }

    /// Settings of the report.
    pub fn settings(&self) -> Settings {
        Settings { min_psnr: self.min_psnr, gained_nothing: vec![] }
    }

    /// Makes and prints a report.
    ///
    /// # Errors
    /// [`Error::run`] if the report does not pass and `--force` is not given.
    pub fn judged(&self, pair: &Pair, settings: &Settings) -> Result<QuantizationReport> {
        let report = quantization::measure(pair, settings, |what| say(format_args!("measuring {what}")))?;
        say(report::text(&report));
        if report.passed || self.force {
            return Ok(report);
        }
        let problem = format!(
            "{}, so nothing was written: eqim-export calibrate --sensitivity finds the scopes that cause the error, \
             --exclude leaves scopes out of INT8, --min-psnr sets another limit, --force writes the result anyway",
            report.verdict
        );
        Err(Error::run("INT8", problem))
    }

    /// A draft of a bundle in INT8. If `library` is given, it is validated and contains its report.
    ///
    /// # Errors
    /// [`Error::run`] if the bundle does not compute the same as the preview, or its report does not pass.
    pub fn draft(
        &self,
        output: &Path,
        config: &Config,
        weights: &Weights,
        options: Options,
        mut policy: Policy,
        library: Option<&Path>,
    ) -> Result<Draft> {
        if policy.target == Int8Target::Cpu && options.precision != Precision::Fp32 {
            return Err(Error::input(
                "--int8-target cpu",
                "runs everything outside of INT8 in FP32: omit --dtype fp16",
            ));
        }
        if options.precision == Precision::Fp16 && options.opset < FP16_SCALES_OPSET {
            let problem = format!(
                "is {}, expected at least {FP16_SCALES_OPSET}: older operator sets do not allow scales in FP16",
                options.opset
            );
            return Err(Error::input("--opset", problem));
        }
        // The kernels of functions compute in FP32 and in INT8 for a CPU.
        let functions = policy.target == Int8Target::Cpu;
        let write = |policy: Option<&Policy>, precision| {
            let options = Options { policy, precision, functions, ..options };
            write::draft(output, config, weights, options, |file| say(format_args!("writing {file}")))
        };
        let Some(library) = library else { return write(Some(&policy), options.precision) };
        say("FP32, for comparison:");
        let fp32 = write(None, Precision::Fp32)?;
        say("INT8:");
        let mut int8 = write(Some(&policy), options.precision)?;
        let mut settings = self.settings();
        if policy.target == Int8Target::Cpu && !self.force {
            let pair = Pair::load(&fp32.bundle, &int8.bundle, library)?;
            let gains = |times: &SpeedPair| times.speedup() >= LEAST_SPEEDUP;
            settings.gained_nothing = pair.stage_times()?.into_iter().filter(|(_, times)| !gains(times)).collect();
        }
        if !settings.gained_nothing.is_empty() {
            for (stage, times) in &settings.gained_nothing {
                policy.stages.remove(stage);
                say(format_args!("{} is not faster in INT8 ({:.2}×) and stays in FP32", stage.name(), times.speedup()));
            }
            int8 = write(Some(&policy), options.precision)?;
        }
        check_preview(&int8, config, weights, &policy, library)?;
        let pair = Pair::load(&fp32.bundle, &int8.bundle, library)?;
        let report = self.judged(&pair, &settings)?;
        report::write(&report, &int8.bundle.folder)?;
        Ok(int8)
    }
}

/// Checks that graphs in INT8 compute the same as the preview of the policy.
///
/// # Errors
/// [`Error::run`] if they do not.
pub fn check_preview(draft: &Draft, config: &Config, weights: &Weights, policy: &Policy, library: &Path) -> Result<()> {
    say("Validating on ONNX Runtime against the preview of INT8 on Candle (same inputs):");
    let preview = Preview::engine(config, weights, policy)?;
    let fp32 = CandleEngine::new(config.clone(), weights.clone());
    let checks = validate_preview(&draft.bundle, &preview, &fp32, library, |line| say(line))?;
    if checks.iter().all(|check| check.passed) {
        return Ok(());
    }
    Err(Error::run(
        "validation",
        "what is marked -[x] does not compute what the preview does, so no bundle was written; --no-validate writes the \
         bundle unseen",
    ))
}
