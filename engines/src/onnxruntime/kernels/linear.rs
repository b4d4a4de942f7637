//! Linear layers of a few rows, as phases of a team.

use eqim::ops::function::LANES;

use super::dot::{self, Blocks};
use super::rows::{self, Levels};
use super::team::{Shared, Worker};
#[cfg(target_os = "linux")]
use crate::pages::LargePages;

/// Number of columns in one part of a phase. A part reads enough memory for its overhead not to count, and a layer has
/// enough parts for the workers to end at about the same time. Many rows share the loads of four blocks.
fn columns_of_part(rows: usize, columns_of_worker: usize) -> usize {
    let is_narrow = rows <= 4 && columns_of_worker < 32 * LANES;
    if is_narrow { 2 * LANES } else { 4 * LANES }
}

/// A linear layer (`nn.Linear`), as it is stored in the bundle.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// Number of elements of an input row.
    pub inputs: usize,
    /// Number of elements of an output row.
    pub outputs: usize,
    /// The weight.
    pub weight: Weight<'a>,
    /// The bias, `[outputs]`.
    pub bias: &'a [f32],
}

/// The weight of a linear layer.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// FP32, `[outputs, inputs]`.
    Float(&'a [f32]),
    /// INT8, for rows that are quantized at run time.
    Int8 {
        /// Levels in blocks, `[outputs/LANES, inputs/GROUP, LANES, GROUP]`.
        levels: &'a [i8],
        /// Sums of the levels, `[outputs]`.
        sums: &'a [i32],
        /// Scales, `[outputs]`.
        scales: &'a [f32],
    },
}

#[cfg(target_os = "linux")]
impl Linear<'_> {
    /// Size of the weight in bytes.
    pub fn bytes(&self) -> usize {
        match self.weight {
            Weight::Float(weight) => size_of_val(weight),
            Weight::Int8 { levels, .. } => size_of_val(levels),
        }
    }

    /// Moves the weight to large pages.
    ///
    /// # Safety
    /// As for [`LargePages::copy`].
    pub unsafe fn move_to(&mut self, pages: &mut LargePages) {
        match &mut self.weight {
            // SAFETY: the caller promises it.
            Weight::Float(weight) => *weight = unsafe { pages.copy(weight) },
            // SAFETY: the caller promises it.
            Weight::Int8 { levels, .. } => *levels = unsafe { pages.copy(levels) },
        }
    }
}

/// Buffers for the rows of a layer, which are used for one layer after another.
#[derive(Debug, Default)]
pub struct Buffers {
    floats: Vec<f32>,
    levels: Vec<u8>,
    scales: Vec<Levels>,
    outputs: Vec<f32>,
}

impl Buffers {
    /// Shares the buffers among the workers of a team, for layers of `rows` rows with at most these numbers of inputs
    /// and outputs.
    pub fn share(&mut self, rows: usize, inputs: usize, outputs: usize) -> Activations<'_> {
        Activations {
            rows,
            floats: Shared::fit(&mut self.floats, rows * inputs),
            levels: Shared::fit(&mut self.levels, rows * inputs),
            scales: Shared::fit(&mut self.scales, rows),
            outputs: Shared::fit(&mut self.outputs, rows * outputs),
        }
    }
}

/// The buffers of a team.
pub struct Activations<'a> {
    /// Number of rows.
    pub rows: usize,
    floats: Shared<'a, f32>,
    levels: Shared<'a, u8>,
    scales: Shared<'a, Levels>,
    outputs: Shared<'a, f32>,
}

impl Linear<'_> {
    /// Applies the layer to all rows. `input` computes an input row. `put` receives a row, the number of a column, and
    /// the outputs from that column on. Takes two phases.
    pub fn apply(
        &self,
        worker: &mut Worker,
        buffers: &Activations,
        input: impl Fn(usize, &mut [f32]),
        put: impl Fn(usize, usize, &mut [f32]),
    ) {
        let &Self { inputs, outputs, weight, bias } = self;
        let rows = buffers.rows;
        worker.phase(rows, |row| {
            let range = row * inputs..(row + 1) * inputs;
            // SAFETY: every part writes only its own row.
            unsafe {
                let floats = buffers.floats.get_mut(range.clone());
                input(row, floats);
                if matches!(weight, Weight::Int8 { .. }) {
                    buffers.scales.get_mut(row..row + 1)[0] = rows::quantize(floats, buffers.levels.get_mut(range));
                }
            }
        });
        let share = columns_of_part(rows, outputs / worker.workers());
        worker.streams(outputs.div_ceil(share), |part| {
            let columns = part * share..outputs.min((part + 1) * share);
            // SAFETY: every part writes only its own columns, and the inputs are complete.
            let output = |row: usize, column: usize, count: usize| unsafe {
                buffers.outputs.columns_mut(row, outputs, column, count)
            };
            match weight {
                Weight::Float(weight) => {
                    // SAFETY: no worker writes inputs in this phase.
                    let x = unsafe { buffers.floats.get(0..rows * inputs) };
                    let weight = &weight[columns.start * inputs..columns.end * inputs];
                    dot::float(weight, x, inputs, |row, column, sum| {
                        let column = columns.start + column;
                        output(row, column, 1)[0] = sum + bias[column];
                    });
                }
                Weight::Int8 { levels, sums, scales } => {
                    // SAFETY: no worker writes inputs in this phase.
                    let x = unsafe { (buffers.levels.get(0..rows * inputs), buffers.scales.get(0..rows)) };
                    let blocks = Blocks {
                        levels: &levels[columns.start * inputs..columns.end * inputs],
                        sums: &sums[columns.clone()],
                        scales: &scales[columns.clone()],
                        bias: &bias[columns.clone()],
                    };
                    dot::integer(blocks, x, inputs, |row, block| {
                        let y = output(row, columns.start + block * LANES, LANES);
                        y.as_chunks_mut().0.first_mut().expect("one block")
                    });
                }
            }
            (0..rows).for_each(|row| put(row, columns.start, output(row, columns.start, columns.len())));
        });
    }
}
