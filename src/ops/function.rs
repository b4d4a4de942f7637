//! Names of the functions that the model's graphs call (ONNX `FunctionProto`). A runtime that has a kernel for a
//! function runs the kernel. Any other runtime runs the function's body.

/// Domain of the functions.
pub const DOMAIN: &str = "eqim";
/// Version of the domain. It changes when a function does.
pub const VERSION: i64 = 1;

/// The loop that solves the flow head's ODE: [`crate::model::flow::sample`].
pub const FLOW_SOLVER: &str = "FlowSolver";
/// One block of the transformer for one token: [`crate::model::transformer::step`].
pub const TRANSFORMER_BLOCK: &str = "TransformerBlock";
/// A matrix product in INT8 whose activations are quantized at run time.
pub const DYNAMIC_LINEAR: &str = "DynamicLinear";

/// Name of a variant of a function. Bodies that differ, because other products are in INT8, are different variants.
pub fn variant(name: &str, variant: usize) -> String {
    if variant == 0 { name.into() } else { format!("{name}_{variant}") }
}

/// Name of the function that `name` is a variant of.
pub fn of_variant(name: &str) -> &str {
    match name.rsplit_once('_') {
        Some((function, variant)) if variant.parse::<usize>().is_ok() => function,
        _ => name,
    }
}

/// Output channels in one block of a [`DYNAMIC_LINEAR`] weight.
pub const LANES: usize = 16;
/// Input channels in one block of a [`DYNAMIC_LINEAR`] weight.
pub const GROUP: usize = 4;

/// Order of the elements of a weight `[outputs, inputs]` in blocks `[outputs/LANES, inputs/GROUP, LANES, GROUP]`: the
/// index in the weight, for every index in the blocks. A kernel reads the blocks one after the other.
pub fn block_order(outputs: usize, inputs: usize) -> impl Iterator<Item = usize> {
    let index = move |lane: usize, input: usize| lane * inputs + input;
    (0..outputs).step_by(LANES).flat_map(move |first| {
        (0..inputs).step_by(GROUP).flat_map(move |start| {
            (first..first + LANES).flat_map(move |lane| (start..start + GROUP).map(move |input| index(lane, input)))
        })
    })
}
