//! Rules that choose the products to run in INT8, and their schemes.
//!
//! For TensorRT, convolutions are W8A8 and matrices are weight-only. The step and the ODE's loop multiply the matrices
//! with one or two rows per guidance stream, so the time is spent on reading the weights. The modulations of all ODE
//! steps are one product of many rows. It runs once per token, while the products inside the loop run a hundred times.
//! W8A8 gains a few percent there, but has four times the error of weight-only (measured on the demo model: 3.9 % of a
//! token instead of 0.9 %). [`Policy::w8a8`] selects W8A8, for large batches.

use std::collections::BTreeSet;

use eqim::bundle::Int8Target;
use eqim::model::{Stage, keeps_full_precision};
use eqim::ops::function::{GROUP, LANES};
use eqim::{Error, Result};
use regex::Regex;

use crate::int8::Affine;
use crate::table::Table;

/// Scheme of one product with a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// Not quantized: runs in the precision of the bundle.
    Float,
    /// Weight in 8 bits, dequantized before the product. For products that spend their time on reading the weight.
    WeightOnly,
    /// Weight and activations in 8 bits (W8A8), with a calibrated scale for the activations.
    Static {
        /// Scale of the activations. The zero point is 0.
        scale: f32,
    },
    /// Weight and activations in 8 bits. The scale of the activations is computed at run time.
    Dynamic,
    /// Weight, input and output in 8 bits, with calibrated ranges.
    Integer {
        /// Quantization of the input.
        input: Affine,
        /// Quantization of the output.
        output: Affine,
    },
}

/// Properties of a product with a weight that the rules depend on.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Stage that runs the product.
    pub stage: Stage,
    /// Scope of the weight.
    pub scope: &'a str,
    /// Shape of the weight: `[out, in]` for a matrix, `[out, in, ...]` for a convolution.
    pub shape: &'a [usize],
}

/// Default stages of `--int8`. On a CPU these are all stages, because prefill and step share weights, which then are stored
/// once. For TensorRT they are the stages that take most of the time of every image.
pub fn default_stages(target: Int8Target) -> &'static [Stage] {
    match target {
        Int8Target::Cpu => &Stage::ALL,
        Int8Target::TensorRt => &[Stage::Step, Stage::Flow, Stage::Decoder],
    }
}

/// Minimum number of input and output channels. Smaller products are not quantized.
const NARROW: usize = 16;

/// Rules for INT8, with their settings.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Target of the graphs.
    pub target: Int8Target,
    /// Stages that may run in INT8.
    pub stages: BTreeSet<Stage>,
    /// Patterns of scopes to exclude from INT8.
    pub exclude: Vec<Regex>,
    /// Patterns of matrices to run in W8A8 instead of weight-only.
    pub w8a8: Vec<Regex>,
    /// The only scopes that may run in INT8, if not all of the stages may: the sensitivity search quantizes one scope alone.
    pub only: Option<BTreeSet<String>>,
    /// Scopes that the sensitivity search excludes from INT8.
    pub left_out: BTreeSet<String>,
    /// Calibration table, with the ranges of the activations.
    pub table: Table,
}

impl Policy {
    /// The rules for `target`. Scopes that the table's sensitivity search excludes are left out of INT8.
    pub fn new(target: Int8Target, stages: impl IntoIterator<Item = Stage>, table: Table) -> Self {
        let left_out = table.sensitivity.as_ref().map_or(BTreeSet::new(), |found| found.exclude.clone());
        Self {
            target,
            stages: stages.into_iter().collect(),
            exclude: vec![],
            w8a8: vec![],
            only: None,
            left_out,
            table,
        }
    }

    /// Chooses the scheme of a product.
    ///
    /// # Errors
    /// [`Error::input`] if the table does not have the product's scope; [`Error::run`] if FP16 cannot represent a
    /// scale.
    pub fn scheme(&self, product: Product) -> Result<Scheme> {
        if !self.stages.contains(&product.stage) || self.is_excluded(product.scope) || !is_worth_it(&product) {
            return Ok(Scheme::Float);
        }
        // 2-D convolutions run over pixels, of which there are many per token. 1-D convolutions run over tokens.
        let (pixels, columns) = (product.shape.len() > 3, product.shape.len() == 3);
        let w8a8 = || self.w8a8.iter().any(|pattern| pattern.is_match(product.scope));
        Ok(match self.target {
            Int8Target::TensorRt if columns => Scheme::Float,
            Int8Target::TensorRt if pixels || w8a8() => {
                Scheme::Static { scale: self.table.entry(product.scope)?.scale }
            }
            Int8Target::TensorRt => Scheme::WeightOnly,
            Int8Target::Cpu if pixels => {
                let entry = self.table.entry(product.scope)?;
                Scheme::Integer { input: entry.input.affine()?, output: entry.output.affine()? }
            }
            Int8Target::Cpu if fits_blocks(product.shape) => Scheme::Dynamic,
            Int8Target::Cpu => Scheme::Float,
        })
    }

    fn is_excluded(&self, scope: &str) -> bool {
        let another = self.only.as_ref().is_some_and(|only| !only.contains(scope));
        another || self.left_out.contains(scope) || self.exclude.iter().any(|pattern| pattern.is_match(scope))
    }
}

fn is_worth_it(product: &Product) -> bool {
    !keeps_full_precision(product.scope) && product.shape[0].min(product.shape[1]) >= NARROW
}

/// Whether the layout of [`Scheme::Dynamic`] can hold a weight.
fn fits_blocks(shape: &[usize]) -> bool {
    shape[0].is_multiple_of(LANES) && shape[1..].iter().product::<usize>().is_multiple_of(GROUP)
}

/// Compiles the regular expressions of a setting.
///
/// # Errors
/// [`Error::setting`] if a text is not a regular expression.
pub fn patterns(field: &'static str, texts: &[String]) -> Result<Vec<Regex>> {
    let bad = |text: &String, error| Error::setting(field, format!("is {text}")).because(error);
    texts.iter().map(|text| Regex::new(text).map_err(|error| bad(text, error))).collect()
}
