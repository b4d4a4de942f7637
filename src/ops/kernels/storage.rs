//! Values of tensors on the CPU, and their sums.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// The values of a contiguous tensor of `f32`.
///
/// # Errors
/// If the tensor is of another type, or not contiguous.
pub fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected a tensor of f32") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&values[start..end])
}

/// The values of a contiguous tensor of `f32`, to be changed.
///
/// # Errors
/// If the tensor is of another type, or not contiguous.
pub fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected a tensor of f32") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&mut values[start..end])
}

/// Calls `read` with the values of contiguous tensors of `f32` on the CPU.
///
/// # Errors
/// If a tensor is of another type, on another device or not contiguous, and the errors of `read`.
pub fn with_values<const N: usize, R>(tensors: [&Tensor; N], read: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let stored = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&stored) {
        let Storage::Cpu(storage) = &**storage else { bail!("expected a tensor on the CPU") };
        *slice = values(storage, layout)?;
    }
    read(slices)
}

/// The rows of a matrix of `f32`. The values of a row lie next to one another, and the rows may lie apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    values: &'a [f32],
    stride: usize,
    count: usize,
    width: usize,
}

impl<'a> Rows<'a> {
    /// The rows of a tensor.
    ///
    /// # Errors
    /// If the tensor is of another type, not a matrix, or if the values of a row lie apart.
    pub fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let CpuStorage::F32(values) = storage else { bail!("expected a tensor of f32") };
        let ((count, width), &[stride, 1]) = (layout.shape().dims2()?, layout.stride()) else {
            bail!("expected a matrix whose rows are contiguous")
        };
        Ok(Self { values: &values[layout.start_offset()..], stride, count, width })
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The values of a row.
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.values[index * self.stride..][..self.width]
    }
}

/// Calls `read` with the rows of matrices of `f32` on the CPU.
///
/// # Errors
/// Those of [`Rows::new`], if a tensor is on another device, and the errors of `read`.
pub fn with_rows<const N: usize, R>(tensors: [&Tensor; N], read: impl FnOnce([Rows; N]) -> Result<R>) -> Result<R> {
    let stored = tensors.map(Tensor::storage_and_layout);
    let mut rows = [Rows { values: &[], stride: 0, count: 0, width: 0 }; N];
    for (rows, (storage, layout)) in rows.iter_mut().zip(&stored) {
        let Storage::Cpu(storage) = &**storage else { bail!("expected a tensor on the CPU") };
        *rows = Rows::new(storage, layout)?;
    }
    read(rows)
}

/// Sums `term(x)`. Short runs are added in single precision, and their sums in double precision.
pub fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f64 {
    const RUN: usize = 64 * LANES;
    let mut total = 0.0;
    for run in x.chunks(RUN) {
        let (vectors, rest) = run.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for vector in vectors {
            sums.iter_mut().zip(vector).for_each(|(sum, &x)| *sum += term(x));
        }
        total += f64::from(sums.iter().sum::<f32>() + rest.iter().map(|&x| term(x)).sum::<f32>());
    }
    total
}

/// Gradient of the bias: one value per channel, for `channels` channels of `area` pixels.
pub fn bias_gradient(channels: usize, area: usize, gradient: &[f32]) -> Vec<f32> {
    let of_planes: Vec<f64> = gradient.par_chunks(area).map(|plane| sum(plane, |value| value)).collect();
    let of_channel = |channel| of_planes.iter().skip(channel).step_by(channels).sum::<f64>() as f32;
    (0..channels).map(of_channel).collect()
}

/// Rows whose values are added one after the other. The number is fixed, so that sums do not depend on the number of cores.
pub const BLOCK: usize = 64;
/// Values that compilers put in one vector.
pub const LANES: usize = 16;

/// Adds every row of `rows` to `sums`.
pub fn add_rows(sums: &mut [f32], rows: &[f32]) {
    for row in rows.chunks(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
}

/// Sums over the rows of `x [rows, width]`.
pub fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    let of_block = |block: &[f32]| {
        let mut sums = vec![0.0; width];
        add_rows(&mut sums, block);
        sums
    };
    let blocks: Vec<Vec<f32>> = x.par_chunks(BLOCK * width).map(of_block).collect();
    let mut total = vec![0.0; width];
    blocks.iter().for_each(|sums| add_rows(&mut total, sums));
    total
}
