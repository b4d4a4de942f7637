//! The flow-matching head that samples a token (reference: `generator/diffloss.py`, `diffusion/flows.py`).

use crate::config::GeneratorConfig;
use crate::ops::{Dim, Ops, OpsExt, Unary, function};
use crate::{Error, Result};

/// Constant that the norms of the flow head add to the variance.
pub const EPS: f32 = 1e-6;
const TIME_BASE: f64 = 10000.0;
const END: i64 = i64::MAX;

/// Name of the flow head's module.
pub const FLOW_HEAD: &str = "diffloss";
/// Name of the network in the flow head's module.
const NET: &str = "diffloss.net";
/// Name of the module that projects the tokens at the input.
pub const INPUT_PROJ: &str = "input_proj";
/// Name of the module that projects the conditions at the input.
pub const COND_EMBED: &str = "cond_embed";
/// Name of the module that embeds times.
pub const TIME_EMBED: &str = "time_embed";
/// Name of the module that computes the velocities at the output.
pub const OUTPUT: &str = "final_layer.linear";

/// Embeds times `t [S]` as `[S, W]`: a sinusoid, cosines first, followed by an MLP.
///
/// # Errors
/// Errors of the interpreter.
fn embed_time<O: Ops>(o: &mut O, config: &GeneratorConfig, t: &O::Tensor) -> Result<O::Tensor> {
    let &GeneratorConfig { time_dim, flow_dim, .. } = config;
    let half = time_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|k| (-TIME_BASE.ln() * k as f64 / half as f64).exp() as f32).collect();
    o.scope(TIME_EMBED, |o| {
        let frequencies = o.constant(&[1, half], &frequencies)?;
        let t = o.reshape(t, &[Dim::Rest, Dim::Is(1)])?;
        let angles = o.mul(&t, &frequencies)?;
        let (cos, sin) = (o.unary(Unary::Cos, &angles)?, o.unary(Unary::Sin, &angles)?);
        let sinusoid = o.concat(&[&cos, &sin], 1)?;
        let h = o.linear("mlp.0", &sinusoid, time_dim, flow_dim)?;
        let h = o.unary(Unary::Silu, &h)?;
        o.linear("mlp.2", &h, flow_dim, flow_dim)
    })
}

/// Shifts, scales and gates of the adaptive layer norms, computed from `y [M, W]`. They depend on time and condition
/// but not on the token. The results are `[M, 3W]` for every residual block, then `[M, 2W]` for the final layer.
fn modulations<O: Ops>(o: &mut O, config: &GeneratorConfig, y: &O::Tensor) -> Result<Vec<O::Tensor>> {
    let &GeneratorConfig { flow_dim, flow_depth, .. } = config;
    let y = o.unary(Unary::Silu, y)?;
    let mut all = Vec::with_capacity(flow_depth + 1);
    for j in 0..flow_depth {
        let name = format!("res_blocks.{j}.adaLN_modulation.1");
        all.push(o.linear(&name, &y, flow_dim, 3 * flow_dim)?);
    }
    all.push(o.linear("final_layer.adaLN_modulation.1", &y, flow_dim, 2 * flow_dim)?);
    Ok(all)
}

/// Velocity `[rows, E]` for the projected tokens `h = input_proj(x)`, `[rows, W]`, with `modulations` of `rows` rows
/// each.
fn head<O: Ops>(o: &mut O, config: &GeneratorConfig, mut h: O::Tensor, modulations: &[O::Tensor]) -> Result<O::Tensor> {
    let &GeneratorConfig { flow_dim, flow_depth, embed, .. } = config;
    let width = flow_dim as i64;
    for (j, modulation) in modulations[..flow_depth].iter().enumerate() {
        h = o.scope(&format!("res_blocks.{j}"), |o| {
            let shift = o.slice(modulation, 1, 0, width)?;
            let scale = o.slice(modulation, 1, width, 2 * width)?;
            let gate = o.slice(modulation, 1, 2 * width, 3 * width)?;
            let x = o.layer_norm("in_ln", &h, flow_dim, EPS)?;
            let x = o.modulate(&x, &shift, &scale)?;
            let x = o.linear("mlp.0", &x, flow_dim, flow_dim)?;
            let x = o.unary(Unary::Silu, &x)?;
            let x = o.linear("mlp.2", &x, flow_dim, flow_dim)?;
            o.gated_residual(&h, &gate, &x)
        })?;
    }
    let x = o.scope("final_layer", |o| {
        let shift = o.slice(&modulations[flow_depth], 1, 0, width)?;
        let scale = o.slice(&modulations[flow_depth], 1, width, 2 * width)?;
        let x = o.layer_normalization(&h, None, flow_dim, EPS)?;
        o.modulate(&x, &shift, &scale)
    })?;
    o.linear(OUTPUT, &x, flow_dim, embed)
}

/// Velocity `v(x, t, c) [rows, E]` of tokens `x [rows, E]` at times `t [rows]` with conditions `c [rows, D]`.
///
/// # Errors
/// Errors of the interpreter.
pub fn velocity<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    x: &O::Tensor,
    t: &O::Tensor,
    c: &O::Tensor,
) -> Result<O::Tensor> {
    let &GeneratorConfig { dim, flow_dim, embed, .. } = config;
    o.scope(NET, |o| {
        let time = embed_time(o, config, t)?;
        let condition = o.linear(COND_EMBED, c, dim, flow_dim)?;
        let y = o.add(&time, &condition)?;
        let modulations = modulations(o, config, &y)?;
        let h = o.linear(INPUT_PROJ, x, embed, flow_dim)?;
        head(o, config, h, &modulations)
    })
}

/// Classifier-free guidance. `v [G, B, E]` holds the velocities of the conditional stream (first) and of the
/// unconditional stream (last). The result is `v_u + guidance·(v_c - v_u)`, `[B, E]`, for `guidance [B]`. With one
/// stream (G = 1), the result is `v` itself.
///
/// # Errors
/// Errors of the interpreter.
pub fn guide<O: Ops>(o: &mut O, config: &GeneratorConfig, v: &O::Tensor, guidance: &O::Tensor) -> Result<O::Tensor> {
    let embed = Dim::Is(config.embed);
    let conditional = o.slice(v, 0, 0, 1)?;
    let unconditional = o.slice(v, 0, -1, END)?;
    let conditional = o.reshape(&conditional, &[Dim::Rest, embed])?;
    let unconditional = o.reshape(&unconditional, &[Dim::Rest, embed])?;
    let difference = o.sub(&conditional, &unconditional)?;
    let guidance = o.reshape(guidance, &[Dim::Rest, Dim::Is(1)])?;
    let difference = o.mul(&guidance, &difference)?;
    o.add(&unconditional, &difference)
}

/// Samples a token `[B, E]` from `noise [B, E]`. The velocity is evaluated at `times [S]`, and each evaluation is
/// followed by an update with the factors `updates [S, 2, 3]` (see [`Tableau`](crate::request::solver::Tableau)).
///
/// `z [G·B, D]` holds the conditions of B rows. With guidance (G = 2), the conditions of the unconditional stream
/// follow; both streams share the token. The modulations of all times are computed outside the loop, with one matrix
/// product per layer.
///
/// # Errors
/// Errors of the interpreter.
pub fn sample<O: Ops>(
    o: &mut O,
    config: &GeneratorConfig,
    z: &O::Tensor,
    noise: &O::Tensor,
    guidance: &O::Tensor,
    times: &O::Tensor,
    updates: &O::Tensor,
) -> Result<O::Tensor> {
    let &GeneratorConfig { dim, flow_dim, embed, .. } = config;
    let (one, batch, width) = (Dim::Is(1), Dim::Of(noise, 0), Dim::Is(embed));
    o.scope(NET, |o| {
        let time = embed_time(o, config, times)?;
        let time = o.reshape(&time, &[Dim::Rest, Dim::Is(1), Dim::Is(flow_dim)])?;
        let condition = o.linear(COND_EMBED, z, dim, flow_dim)?;
        let y = o.add(&time, &condition)?;
        let y = o.reshape(&y, &[Dim::Rest, Dim::Is(flow_dim)])?;
        let mut sequences = vec![];
        for (j, modulation) in modulations(o, config, &y)?.iter().enumerate() {
            let width = if j < config.flow_depth { 3 } else { 2 } * flow_dim;
            sequences.push(o.reshape(modulation, &[Dim::Of(&time, 0), Dim::Of(z, 0), Dim::Is(width)])?);
        }
        for part in 0..3 {
            let factors = o.slice(updates, 2, part, part + 1)?;
            sequences.push(o.reshape(&factors, &[Dim::Rest, Dim::Is(2), one, one])?);
        }

        // The point, and the held value. No solver reads the held value before it is set.
        let state = o.expand(noise, &[Dim::Is(2), batch, width])?;
        let inputs: Vec<&O::Tensor> = sequences.iter().chain([&state, guidance]).collect();
        let [state] = o.function(function::FLOW_SOLVER, &inputs, |o, inputs| Ok([solve(o, config, inputs)?]))?;
        let point = o.slice(&state, 0, 0, 1)?;
        o.reshape(&point, &[Dim::Rest, width])
    })
}

/// Solves the ODE. `inputs` are, for S evaluations and R = G·B rows, the modulations `[S, R, 3W]` of every residual block
/// and `[S, R, 2W]` of the final layer, the three factors `[S, 2, 1, 1]` of every update, the state `[2, B, E]` and
/// `guidance [B]`. Returns the last state.
///
/// # Errors
/// Errors of the interpreter.
fn solve<O: Ops>(o: &mut O, config: &GeneratorConfig, inputs: &[O::Tensor]) -> Result<O::Tensor> {
    let &GeneratorConfig { flow_dim, flow_depth, embed, .. } = config;
    let (one, width) = (Dim::Is(1), Dim::Is(embed));
    let [sequences @ .., state, guidance] = inputs else {
        return Err(Error::run(function::FLOW_SOLVER, "expected a state and the guidance"));
    };
    let sequences: Vec<&O::Tensor> = sequences.iter().collect();
    o.fold(&sequences, state, |o, now, state| {
        let (modulations, factors) = now.split_at(flow_depth + 1);
        let point = o.slice(state, 0, 0, 1)?;
        let held = o.slice(state, 0, 1, 2)?;
        let x = o.reshape(&point, &[Dim::Rest, width])?;
        let h = o.linear(INPUT_PROJ, &x, embed, flow_dim)?;
        // Both streams share the token.
        let rows = o.reshape(&modulations[flow_depth], &[Dim::Rest, Dim::Of(state, 1), Dim::Is(2 * flow_dim)])?;
        let h = o.expand(&h, &[Dim::Of(&rows, 0), Dim::Of(state, 1), Dim::Is(flow_dim)])?;
        let h = o.reshape(&h, &[Dim::Rest, Dim::Is(flow_dim)])?;
        let v = head(o, config, h, modulations)?;
        let v = o.reshape(&v, &[Dim::Rest, Dim::Of(state, 1), width])?;
        let v = guide(o, config, &v, guidance)?;
        let v = o.reshape(&v, &[one, Dim::Rest, width])?;
        let point = o.mul(&factors[0], &point)?;
        let held = o.mul(&factors[1], &held)?;
        let velocity = o.mul(&factors[2], &v)?;
        let sum = o.add(&point, &held)?;
        o.add(&sum, &velocity)
    })
}
