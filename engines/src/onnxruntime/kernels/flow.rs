//! The kernel of the flow head's loop: [`FLOW_SOLVER`](eqim::ops::function::FLOW_SOLVER).

use eqim::model::flow::EPS;

use super::linear::{Activations, Buffers, Linear};
use super::rows::{self, Norm};
use super::team::{Shared, Worker};

/// Inputs of the loop, for S evaluations, B tokens and R rows.
pub struct Flow<'a> {
    /// The network.
    pub weights: &'a Velocity<'a>,
    /// Modulations of every residual block, `[S, R, 3W]`, and of the final layer, `[S, R, 2W]`.
    pub modulations: Vec<&'a [f32]>,
    /// Factors of the point, of the held value and of the velocity, `[S, 2]` each.
    pub factors: [&'a [f32]; 3],
    /// Guidance of every token, `[B]`.
    pub guidance: &'a [f32],
}

/// Weights of the network that computes the velocity.
pub struct Velocity<'a> {
    /// Projection of the token.
    pub input: Linear<'a>,
    /// The residual blocks.
    pub blocks: Vec<Residual<'a>>,
    /// Computes the velocity.
    pub output: Linear<'a>,
}

/// A residual block.
pub struct Residual<'a> {
    /// Weight and bias of the norm.
    pub norm: Norm<'a>,
    /// First layer of the MLP.
    pub first: Linear<'a>,
    /// Second layer of the MLP.
    pub second: Linear<'a>,
}

/// Buffers of a call.
#[derive(Debug, Default)]
pub struct FlowBuffers {
    h: Vec<f32>,
    hidden: Vec<f32>,
    velocity: Vec<f32>,
    activations: Buffers,
    tokens: Buffers,
}

impl FlowBuffers {
    /// Shares the buffers among the workers of a team, for B tokens and R rows.
    pub fn share(&mut self, tokens: usize, rows: usize, embed: usize, width: usize) -> SharedBuffers<'_> {
        SharedBuffers {
            h: Shared::fit(&mut self.h, rows * width),
            hidden: Shared::fit(&mut self.hidden, rows * width),
            velocity: Shared::fit(&mut self.velocity, rows * embed),
            activations: self.activations.share(rows, width, width.max(embed)),
            tokens: self.tokens.share(tokens, embed, width),
        }
    }
}

/// Buffers of a team.
pub struct SharedBuffers<'a> {
    h: Shared<'a, f32>,
    hidden: Shared<'a, f32>,
    velocity: Shared<'a, f32>,
    activations: Activations<'a>,
    tokens: Activations<'a>,
}

/// One row of a modulation: consecutive vectors of the width of the flow head.
fn vectors<const N: usize>(modulation: &[f32], width: usize, row: usize) -> [&[f32]; N] {
    let row = &modulation[row * N * width..(row + 1) * N * width];
    std::array::from_fn(|part| &row[part * width..(part + 1) * width])
}

impl Flow<'_> {
    /// Runs the loop as one worker of a team. `state [2, B, E]` holds the points and the held values.
    pub fn run(&self, worker: &mut Worker, state: &Shared<f32>, buffers: &SharedBuffers) {
        for evaluation in 0..self.factors[0].len() / 2 {
            self.velocity(worker, evaluation, state, buffers);
            self.update(worker, evaluation, state, buffers);
        }
    }

    /// Computes the velocity of all rows.
    fn velocity(&self, worker: &mut Worker, evaluation: usize, state: &Shared<f32>, buffers: &SharedBuffers) {
        let SharedBuffers { h, hidden, velocity, activations, tokens } = buffers;
        let (embed, width) = (self.weights.input.inputs, self.weights.input.outputs);
        let (count, rows) = (tokens.rows, activations.rows);
        // In every phase of this function, an element is either only read, or used by one part.
        self.weights.input.apply(
            worker,
            tokens,
            |token, x| {
                // SAFETY: see above.
                x.copy_from_slice(unsafe { state.row(token, embed) });
            },
            |token, column, y| {
                // Both streams share the token.
                for row in (token..rows).step_by(count) {
                    // SAFETY: see above.
                    unsafe { h.columns_mut(row, width, column, y.len()) }.copy_from_slice(y);
                }
            },
        );
        let first_row = evaluation * rows;
        for (block, modulation) in self.weights.blocks.iter().zip(&self.modulations) {
            let parts = |row: usize| vectors::<3>(modulation, width, first_row + row);
            block.first.apply(
                worker,
                activations,
                |row, x| {
                    let [shift, scale, _] = parts(row);
                    // SAFETY: see above.
                    rows::layer_norm(unsafe { h.row(row, width) }, block.norm, EPS, x);
                    rows::modulate(x, shift, scale);
                },
                |row, column, y| {
                    rows::silu(y);
                    // SAFETY: see above.
                    unsafe { hidden.columns_mut(row, width, column, y.len()) }.copy_from_slice(y);
                },
            );
            block.second.apply(
                worker,
                activations,
                |row, x| {
                    // SAFETY: see above.
                    x.copy_from_slice(unsafe { hidden.row(row, width) });
                },
                |row, column, y| {
                    let [_, _, gate] = parts(row);
                    // SAFETY: see above.
                    let h = unsafe { h.columns_mut(row, width, column, y.len()) };
                    h.iter_mut().zip(&gate[column..]).zip(y).for_each(|((h, gate), y)| *h += gate * *y);
                },
            );
        }
        let modulation = self.modulations[self.weights.blocks.len()];
        self.weights.output.apply(
            worker,
            activations,
            |row, x| {
                let [shift, scale] = vectors::<2>(modulation, width, first_row + row);
                // SAFETY: see above.
                rows::plain_norm(unsafe { h.row(row, width) }, EPS, x);
                rows::modulate(x, shift, scale);
            },
            |row, column, y| {
                // SAFETY: see above.
                unsafe { velocity.columns_mut(row, embed, column, y.len()) }.copy_from_slice(y);
            },
        );
    }

    /// Applies guidance, and updates the state.
    fn update(&self, worker: &mut Worker, evaluation: usize, state: &Shared<f32>, buffers: &SharedBuffers) {
        let (embed, count, rows) = (self.weights.input.inputs, buffers.tokens.rows, buffers.activations.rows);
        worker.phase(count, |token| {
            // SAFETY: every part uses only the state of its own token, and the velocities are complete.
            let (point, held, conditional, unconditional) = unsafe {
                (
                    state.columns_mut(token, embed, 0, embed),
                    state.columns_mut(count + token, embed, 0, embed),
                    buffers.velocity.row(token, embed),
                    buffers.velocity.row(rows - count + token, embed),
                )
            };
            let [of_point, of_held, of_velocity] =
                self.factors.map(|factors| &factors[2 * evaluation..2 * evaluation + 2]);
            let velocities = conditional.iter().zip(unconditional);
            for ((point, held), (conditional, unconditional)) in point.iter_mut().zip(held).zip(velocities) {
                let velocity = unconditional + self.guidance[token] * (conditional - unconditional);
                let next = |k: usize| of_point[k] * *point + of_held[k] * *held + of_velocity[k] * velocity;
                (*point, *held) = (next(0), next(1));
            }
        });
    }
}
