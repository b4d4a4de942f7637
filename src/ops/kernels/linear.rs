//! Products with weights, with few passes over the data backward.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::storage::{column_sums, values, with_values};

/// `x [rows, input]` times the transposed `weight [output, input]`, plus `bias [output]` (ONNX `Gemm` with `transB`).
pub struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = layout.shape().dims2()?;
        let output = weight_layout.shape().dims2()?.0;
        let product = x.matmul(weight, (1, rows, output, input), layout, &weight_layout.transpose(0, 1)?)?;
        let CpuStorage::F32(mut y) = product else { bail!("expected a product of f32") };
        let bias = values(bias, bias_layout)?;
        y.par_chunks_mut(output).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        Ok((CpuStorage::F32(y), (rows, output).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, weight, gradient) = (x.detach(), weight.detach(), gradient.contiguous()?);
        let of_bias = with_values([&gradient], |[gradient]| Ok(column_sums(gradient, bias.elem_count())))?;
        let of_bias = Tensor::from_vec(of_bias, bias.shape(), bias.device())?;
        Ok((Some(gradient.matmul(&weight)?), Some(gradient.t()?.matmul(&x)?), Some(of_bias)))
    }
}
