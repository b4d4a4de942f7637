//! Which products run in INT8, and how: the rules, in one place.
//!
//! For TensorRT convolutions are W8A8 and matrices weight-only: the step and the ODE's loop multiply them with a row or two
//! a stream, and the time is that of reading them. The modulations of all steps are a product of many rows, but one that is
//! run once a token where the loop's are run a hundred times; W8A8 gains a few percent there, and costs four times the
//! error (measured on the demo model: 3.9 % of a token against 0.9 %). It is there for who runs large batches.

use std::collections::BTreeSet;

use eqim::bundle::Int8Target;
use eqim::model::{Stage, keeps_full_precision};
use eqim::{Error, Result};
use regex::Regex;

use crate::int8::Affine;
use crate::table::Table;

/// How one product with a weight runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scheme {
    /// As in the bundle's precision.
    Float,
    /// The weight in 8 bits, dequantized where it is used: for products that reading the weight takes the time of.
    WeightOnly,
    /// Weight and activations in 8 bits (W8A8), activations by a calibrated scale.
    Static {
        /// Of the activations, zero point 0.
        scale: f32,
    },
    /// Weight and activations in 8 bits, activations by the range they have when it runs.
    Dynamic,
    /// Weight, input and output in 8 bits, by calibrated ranges.
    Integer {
        /// Of the input.
        input: Affine,
        /// Of the output.
        output: Affine,
    },
}

/// A product with a weight, as the rules see it.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// The stage that is run.
    pub stage: Stage,
    /// Scope of the weight.
    pub scope: &'a str,
    /// Shape of the weight, `[out, in]` of a matrix, `[out, in, ...]` of a convolution.
    pub shape: &'a [usize],
}

/// The stages that `--int8` means by itself: those that take the time of every image.
pub const STAGES: [Stage; 3] = [Stage::Step, Stage::Flow, Stage::Decoder];

/// Below as many inputs or outputs a product is not worth quantizing.
const NARROW: usize = 16;

/// The rules and what they refer to.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What the graphs are for.
    pub target: Int8Target,
    /// Stages that may run in INT8.
    pub stages: BTreeSet<Stage>,
    /// Scopes to leave as they are.
    pub exclude: Vec<Regex>,
    /// Matrices to run W8A8 where they would be weight-only.
    pub w8a8: Vec<Regex>,
    /// The only scope that may run in INT8, where one is looked at alone.
    pub only: Option<String>,
    /// Scopes that the sensitivity search left out.
    pub left_out: BTreeSet<String>,
    /// Ranges of activations.
    pub table: Table,
}

impl Policy {
    /// The rules for `target` with what a table's sensitivity search found.
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

    /// How a product runs.
    ///
    /// # Errors
    /// [`Error::input`] when the table knows nothing of it.
    pub fn scheme(&self, product: Product) -> Result<Scheme> {
        if !self.stages.contains(&product.stage) || self.is_excluded(product.scope) || !is_worth_it(&product) {
            return Ok(Scheme::Float);
        }
        let convolution = product.shape.len() > 2;
        Ok(match self.target {
            Int8Target::TensorRt if convolution || self.w8a8.iter().any(|pattern| pattern.is_match(product.scope)) => {
                Scheme::Static { scale: self.table.entry(product.scope)?.scale }
            }
            Int8Target::TensorRt => Scheme::WeightOnly,
            Int8Target::Cpu if convolution => {
                let entry = self.table.entry(product.scope)?;
                Scheme::Integer { input: entry.input.affine()?, output: entry.output.affine()? }
            }
            Int8Target::Cpu => Scheme::Dynamic,
        })
    }

    fn is_excluded(&self, scope: &str) -> bool {
        let another = self.only.as_ref().is_some_and(|only| only != scope);
        another || self.left_out.contains(scope) || self.exclude.iter().any(|pattern| pattern.is_match(scope))
    }
}

fn is_worth_it(product: &Product) -> bool {
    let Product { scope, shape, .. } = product;
    // Convolutions over columns see one token where the others see its pixels.
    let columns = shape.len() == 3;
    !keeps_full_precision(scope) && !columns && shape[0].min(shape[1]) >= NARROW
}

/// Compiles the patterns of a setting.
///
/// # Errors
/// [`Error::setting`] for one that is not a regular expression.
pub fn patterns(field: &'static str, texts: &[String]) -> Result<Vec<Regex>> {
    let bad = |text: &String, error| Error::setting(field, format!("is {text}")).because(error);
    texts.iter().map(|text| Regex::new(text).map_err(|error| bad(text, error))).collect()
}
