//! Inner products of a few rows with every column of a weight. The columns are read once, one after the other.

use eqim::ops::function::{GROUP, LANES};
use pulp::{Arch, Simd, WithSimd};

use super::rows::Levels;

/// Products of the rows `x [rows, inputs]` with columns of an FP32 weight, `weight [columns, inputs]`. `put` receives
/// the row, the column and the product.
pub fn float(weight: &[f32], x: &[f32], inputs: usize, put: impl FnMut(usize, usize, f32)) {
    Arch::new().dispatch(Float { weight, x, inputs, put });
}

struct Float<'a, F> {
    weight: &'a [f32],
    x: &'a [f32],
    inputs: usize,
    put: F,
}

impl<F: FnMut(usize, usize, f32)> WithSimd for Float<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (columns, rows) = (self.weight.len() / self.inputs, self.x.len() / self.inputs);
        match rows {
            // Memory is the limit. One stream of weights is fastest.
            1 => (0..columns).for_each(|column| self.tile::<S, 1, 1, 4>(simd, 0, column)),
            2 => (0..columns).for_each(|column| self.tile::<S, 2, 1, 4>(simd, 0, column)),
            // Arithmetic is the limit. Two columns share the loads of the rows.
            _ => {
                (0..columns / 2).for_each(|pair| self.rows::<S, 2>(simd, 2 * pair, rows));
                (columns / 2 * 2..columns).for_each(|column| self.rows::<S, 1>(simd, column, rows));
            }
        }
    }
}

impl<F: FnMut(usize, usize, f32)> Float<'_, F> {
    /// Products of all rows with `C` columns.
    #[inline(always)]
    fn rows<S: Simd, const C: usize>(&mut self, simd: S, column: usize, rows: usize) {
        let fours = rows / 4 * 4;
        (0..fours).step_by(4).for_each(|row| self.tile::<S, 4, C, 1>(simd, row, column));
        match rows - fours {
            1 => self.tile::<S, 1, C, 1>(simd, fours, column),
            2 => self.tile::<S, 2, C, 1>(simd, fours, column),
            3 => self.tile::<S, 3, C, 1>(simd, fours, column),
            _ => {}
        }
    }

    /// Products of `R` rows with `C` columns. Every product is the sum of `U` sums that do not wait for one another.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const C: usize, const U: usize>(&mut self, simd: S, row: usize, column: usize) {
        let inputs = self.inputs;
        let w: [&[f32]; C] = std::array::from_fn(|c| &self.weight[(column + c) * inputs..][..inputs]);
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * inputs..][..inputs]);
        // Whole runs of `U` vectors, and the elements after them.
        let run = U * size_of::<S::f32s>() / size_of::<f32>();
        let whole = inputs / run * run;
        let w_vectors = w.map(|w| S::as_simd_f32s(&w[..whole]).0);
        let x_vectors = x.map(|x| S::as_simd_f32s(&x[..whole]).0);
        let mut sums = [[[simd.splat_f32s(0.0); U]; C]; R];
        for first in (0..w_vectors[0].len()).step_by(U) {
            for u in 0..U {
                for r in 0..R {
                    for c in 0..C {
                        let (x, w) = (x_vectors[r][first + u], w_vectors[c][first + u]);
                        sums[r][c][u] = simd.mul_add_e_f32s(x, w, sums[r][c][u]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, sums) in sums.iter().enumerate() {
                let sum = sums[1..].iter().fold(sums[0], |sum, &other| simd.add_f32s(sum, other));
                let rest: f32 = w[c][whole..].iter().zip(&x[r][whole..]).map(|(w, x)| w * x).sum();
                (self.put)(row + r, column + c, simd.reduce_sum_f32s(sum) + rest);
            }
        }
    }
}

/// Blocks of [`LANES`] columns of an INT8 weight.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// Levels, `[blocks, inputs/GROUP, LANES, GROUP]`.
    pub levels: &'a [i8],
    /// Sums of the levels of every column.
    pub sums: &'a [i32],
    /// Scale of every column.
    pub scales: &'a [f32],
    /// Bias of every column.
    pub bias: &'a [f32],
}

/// Products of rows in 8 bits, `x [rows, inputs]` with one [`Levels`] per row, with the columns of an INT8 weight.
/// `output` gives the place for the results of a row and a block.
pub fn integer<'y>(
    blocks: Blocks,
    (x, rows): (&[u8], &[Levels]),
    inputs: usize,
    output: impl Fn(usize, usize) -> &'y mut [f32; LANES],
) {
    let product = Product { blocks, x, rows, inputs, output };
    product.check();
    match Instructions::detect() {
        // SAFETY: the processor has these instructions, and the sizes fit.
        #[cfg(target_arch = "x86_64")]
        Instructions::Vnni => unsafe { x86::vnni(&product) },
        // SAFETY: the processor has these instructions, and the sizes fit.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { x86::avx2(&product) },
        // SAFETY: the sizes fit.
        Instructions::Portable => unsafe { product.run::<Portable>() },
    }
}

/// The instructions that this processor has for products of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instructions {
    /// AVX-512 with VNNI: four products of bytes and their sum in 32 bits.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// AVX2: two products of bytes and their sum in 16 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Those of every processor.
    Portable,
}

impl Instructions {
    /// The fastest of this processor.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f") {
                return Self::Vnni;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// Arithmetic with the columns of one block.
///
/// # Safety
/// The processor must have the instructions. Pointers must be valid for one block: `LANES · GROUP` levels, and `LANES`
/// numbers of every other kind.
trait Arithmetic {
    /// Whether there are registers for [`Product::tile`] with six rows and four blocks.
    const WIDE: bool;
    /// Sums of all columns.
    type Sums: Copy;
    /// Levels of a group of inputs.
    type Weights: Copy;

    unsafe fn zero() -> Self::Sums;
    unsafe fn load(levels: *const i8) -> Self::Weights;
    /// Adds the products with the four bytes `x`.
    unsafe fn add(sums: Self::Sums, x: i32, weights: Self::Weights) -> Self::Sums;
    /// `y = (sums - zero · level_sums) · (scale · scales) + bias`
    unsafe fn finish(sums: Self::Sums, row: Levels, columns: Columns, y: *mut f32);
}

/// What a block has for every column.
#[derive(Clone, Copy)]
struct Columns {
    sums: *const i32,
    scales: *const f32,
    bias: *const f32,
}

struct Product<'a, F> {
    blocks: Blocks<'a>,
    x: &'a [u8],
    rows: &'a [Levels],
    inputs: usize,
    output: F,
}

impl<'y, F: Fn(usize, usize) -> &'y mut [f32; LANES]> Product<'_, F> {
    /// Panics if the sizes do not fit.
    fn check(&self) {
        let Blocks { levels, sums, scales, bias } = self.blocks;
        let columns = sums.len();
        assert!(columns.is_multiple_of(LANES) && scales.len() == columns && bias.len() == columns);
        assert!(self.inputs.is_multiple_of(GROUP) && levels.len() == columns * self.inputs);
        assert!(self.x.len() == self.rows.len() * self.inputs);
    }

    /// # Safety
    /// The processor must have the instructions of `A`, and the sizes must fit.
    #[inline(always)]
    unsafe fn run<A: Arithmetic>(&self) {
        let (blocks, rows) = (self.blocks.sums.len() / LANES, self.rows.len());
        // SAFETY: the tiles are inside of the rows and blocks.
        unsafe {
            if rows <= 4 || !A::WIDE {
                // Memory is the limit. One stream of weights is fastest.
                for block in 0..blocks {
                    let fours = rows / 4 * 4;
                    for row in (0..fours).step_by(4) {
                        self.tile::<A, 4, 1>(row, block);
                    }
                    match rows - fours {
                        1 => self.tile::<A, 1, 1>(fours, block),
                        2 => self.tile::<A, 2, 1>(fours, block),
                        3 => self.tile::<A, 3, 1>(fours, block),
                        _ => {}
                    }
                }
                return;
            }
            // Arithmetic is the limit. Rows and blocks share the loads of one another.
            let fours = blocks / 4 * 4;
            for block in (0..fours).step_by(4) {
                self.rows::<A, 4>(block);
            }
            for block in fours..blocks {
                self.rows::<A, 1>(block);
            }
        }
    }

    /// All rows, with `C` blocks.
    ///
    /// # Safety
    /// As for [`Product::run`]; the blocks must exist.
    #[inline(always)]
    unsafe fn rows<A: Arithmetic, const C: usize>(&self, block: usize) {
        let (rows, sixes) = (self.rows.len(), self.rows.len() / 6 * 6);
        // SAFETY: the tiles are inside of the rows.
        unsafe {
            for row in (0..sixes).step_by(6) {
                self.tile::<A, 6, C>(row, block);
            }
            match rows - sixes {
                1 => self.tile::<A, 1, C>(sixes, block),
                2 => self.tile::<A, 2, C>(sixes, block),
                3 => self.tile::<A, 3, C>(sixes, block),
                4 => self.tile::<A, 4, C>(sixes, block),
                5 => self.tile::<A, 5, C>(sixes, block),
                _ => {}
            }
        }
    }

    /// `R` rows with `C` blocks.
    ///
    /// # Safety
    /// As for [`Product::run`]; the rows and blocks must exist.
    #[inline(always)]
    unsafe fn tile<A: Arithmetic, const R: usize, const C: usize>(&self, row: usize, block: usize) {
        let &Self { inputs, blocks, x, .. } = self;
        let steps = inputs / GROUP;
        // SAFETY: all offsets are inside of the rows and blocks, and the caller has the instructions.
        unsafe {
            let levels = blocks.levels.as_ptr().add(block * LANES * inputs);
            let x = x.as_ptr().add(row * inputs);
            let mut sums = [[A::zero(); C]; R];
            for step in 0..steps {
                let levels = levels.add(step * LANES * GROUP);
                let mut weights = [A::load(levels); C];
                for (c, weights) in weights.iter_mut().enumerate().skip(1) {
                    *weights = A::load(levels.add(c * LANES * inputs));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = x.add(r * inputs + step * GROUP).cast::<i32>().read_unaligned();
                    for (sums, &weights) in sums.iter_mut().zip(&weights) {
                        *sums = A::add(*sums, x, weights);
                    }
                }
            }
            for c in 0..C {
                let first = (block + c) * LANES;
                let columns = Columns {
                    sums: blocks.sums.as_ptr().add(first),
                    scales: blocks.scales.as_ptr().add(first),
                    bias: blocks.bias.as_ptr().add(first),
                };
                for (r, sums) in sums.iter().enumerate() {
                    A::finish(sums[c], self.rows[row + r], columns, (self.output)(row + r, block + c).as_mut_ptr());
                }
            }
        }
    }
}

/// Arithmetic of every processor.
struct Portable;

impl Arithmetic for Portable {
    const WIDE: bool = false;
    type Sums = [i32; LANES];
    type Weights = [[i8; GROUP]; LANES];

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn load(levels: *const i8) -> Self::Weights {
        // SAFETY: the caller passes a whole block.
        unsafe { levels.cast::<Self::Weights>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add(mut sums: Self::Sums, x: i32, weights: Self::Weights) -> Self::Sums {
        let x = x.to_ne_bytes();
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum += weights.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x)).sum::<i32>();
        }
        sums
    }

    #[inline(always)]
    unsafe fn finish(sums: Self::Sums, row: Levels, columns: Columns, y: *mut f32) {
        for (lane, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller passes pointers to whole blocks.
            unsafe {
                let sum = (sum - row.zero * *columns.sums.add(lane)) as f32;
                *y.add(lane) = sum * (row.scale * *columns.scales.add(lane)) + *columns.bias.add(lane);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Arithmetic, Columns, GROUP, LANES, Levels, Product};

    /// # Safety
    /// The sizes must fit.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn vnni<'y, F: Fn(usize, usize) -> &'y mut [f32; LANES]>(product: &Product<F>) {
        // SAFETY: this function has the instructions.
        unsafe { product.run::<Vnni>() }
    }

    /// # Safety
    /// The sizes must fit.
    #[target_feature(enable = "avx2")]
    pub unsafe fn avx2<'y, F: Fn(usize, usize) -> &'y mut [f32; LANES]>(product: &Product<F>) {
        // SAFETY: this function has the instructions.
        unsafe { product.run::<Avx2>() }
    }

    /// AVX-512 with VNNI.
    pub(super) struct Vnni;

    // The callers have the instructions, and pass pointers to whole blocks.
    impl Arithmetic for Vnni {
        const WIDE: bool = true;
        type Sums = __m512i;
        type Weights = __m512i;

        #[inline(always)]
        unsafe fn zero() -> __m512i {
            // SAFETY: see above.
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        unsafe fn load(levels: *const i8) -> __m512i {
            // SAFETY: see above.
            unsafe { _mm512_loadu_si512(levels.cast()) }
        }

        #[inline(always)]
        unsafe fn add(sums: __m512i, x: i32, weights: __m512i) -> __m512i {
            // SAFETY: see above.
            unsafe { _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(x), weights) }
        }

        #[inline(always)]
        unsafe fn finish(sums: __m512i, row: Levels, columns: Columns, y: *mut f32) {
            // SAFETY: see above.
            unsafe {
                let of_zero = _mm512_mullo_epi32(_mm512_loadu_si512(columns.sums.cast()), _mm512_set1_epi32(row.zero));
                let sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, of_zero));
                let scales = _mm512_mul_ps(_mm512_loadu_ps(columns.scales), _mm512_set1_ps(row.scale));
                let scaled = _mm512_mul_ps(sums, scales);
                _mm512_storeu_ps(y, _mm512_add_ps(scaled, _mm512_loadu_ps(columns.bias)));
            }
        }
    }

    /// AVX2. The sum of two products of bytes is in 16 bits, which suffices for weights of 64 levels.
    pub(super) struct Avx2;

    // The callers have the instructions, and pass pointers to whole blocks.
    impl Arithmetic for Avx2 {
        const WIDE: bool = false;
        type Sums = [__m256i; 2];
        type Weights = [__m256i; 2];

        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: see above.
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        unsafe fn load(levels: *const i8) -> Self::Weights {
            // SAFETY: see above.
            unsafe { [_mm256_loadu_si256(levels.cast()), _mm256_loadu_si256(levels.add(LANES * GROUP / 2).cast())] }
        }

        #[inline(always)]
        unsafe fn add(mut sums: Self::Sums, x: i32, weights: Self::Weights) -> Self::Sums {
            for (sum, weights) in sums.iter_mut().zip(weights) {
                // SAFETY: see above.
                unsafe {
                    let pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(x), weights);
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                }
            }
            sums
        }

        #[inline(always)]
        unsafe fn finish(sums: Self::Sums, row: Levels, columns: Columns, y: *mut f32) {
            for (half, sums) in sums.into_iter().enumerate() {
                let first = half * LANES / 2;
                // SAFETY: see above.
                unsafe {
                    let of_levels = _mm256_loadu_si256(columns.sums.add(first).cast());
                    let of_zero = _mm256_mullo_epi32(of_levels, _mm256_set1_epi32(row.zero));
                    let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, of_zero));
                    let scales = _mm256_mul_ps(_mm256_loadu_ps(columns.scales.add(first)), _mm256_set1_ps(row.scale));
                    let bias = _mm256_loadu_ps(columns.bias.add(first));
                    _mm256_storeu_ps(y.add(first), _mm256_add_ps(_mm256_mul_ps(sums, scales), bias));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from 0 to `most` that repeat only after a long time.
    fn numbers(count: usize, most: u64) -> impl Iterator<Item = u64> {
        (1..=count as u64).map(move |i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % (most + 1))
    }

    /// Products of a weight of `columns` columns with `rows` rows, computed by `run`, which receives the product.
    fn products(
        rows: usize,
        inputs: usize,
        columns: usize,
        run: impl FnOnce(Blocks, (&[u8], &[Levels]), &mut [f32]),
    ) -> Vec<f32> {
        let levels: Vec<i8> = numbers(inputs * columns, 128).map(|level| (level as i16 - 64) as i8).collect();
        let sums: Vec<i32> = numbers(columns, 2000).map(|sum| sum as i32 - 1000).collect();
        let scales: Vec<f32> = numbers(columns, 100).map(|scale| scale as f32 / 64.0).collect();
        let bias: Vec<f32> = numbers(columns, 100).map(|bias| bias as f32).collect();
        let x: Vec<u8> = numbers(rows * inputs, 255).map(|x| x as u8).collect();
        let of_rows: Vec<Levels> = numbers(rows, 255).map(|zero| Levels { scale: 0.5, zero: zero as i32 }).collect();
        let mut y = vec![f32::NAN; rows * columns];
        run(Blocks { levels: &levels, sums: &sums, scales: &scales, bias: &bias }, (&x, &of_rows), &mut y);
        y
    }

    fn by<A: Arithmetic>(rows: usize, inputs: usize, columns: usize) -> Vec<f32> {
        products(rows, inputs, columns, |blocks, (x, of_rows), y| {
            let y = super::super::team::Shared::new(y);
            // SAFETY: no two results have the same place.
            let output = |row: usize, block: usize| unsafe {
                let start = row * columns + block * LANES;
                y.get_mut(start..start + LANES).try_into().unwrap()
            };
            let product = Product { blocks, x, rows: of_rows, inputs, output };
            product.check();
            // SAFETY: the caller checked that the processor has the instructions.
            unsafe { product.run::<A>() };
        })
    }

    const SIZES: [(usize, usize, usize); 8] =
        [(1, 4, 16), (2, 1280, 32), (3, 20, 64), (4, 8, 16), (5, 64, 80), (8, 12, 64), (13, 36, 96), (17, 4, 144)];

    #[test]
    fn integers_are_exact_in_all_instructions() {
        for (rows, inputs, columns) in SIZES {
            let expected = products(rows, inputs, columns, |blocks, (x, of_rows), y| {
                for (i, y) in y.iter_mut().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let weight = |input: usize| {
                        let at = (column / LANES * inputs + input / GROUP * GROUP) * LANES;
                        i32::from(blocks.levels[at + column % LANES * GROUP + input % GROUP])
                    };
                    let sum: i32 = (0..inputs).map(|input| weight(input) * i32::from(x[row * inputs + input])).sum();
                    let Levels { scale, zero } = of_rows[row];
                    *y = (sum - zero * blocks.sums[column]) as f32 * (scale * blocks.scales[column])
                        + blocks.bias[column];
                }
            });
            let sizes = format!("{rows} rows of {inputs}, {columns} columns");
            assert_eq!(by::<Portable>(rows, inputs, columns), expected, "portable, {sizes}");
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx2") {
                    assert_eq!(by::<x86::Avx2>(rows, inputs, columns), expected, "AVX2, {sizes}");
                }
                if Instructions::detect() == Instructions::Vnni {
                    assert_eq!(by::<x86::Vnni>(rows, inputs, columns), expected, "VNNI, {sizes}");
                }
            }
        }
    }

    #[test]
    fn extreme_bytes_do_not_saturate() {
        let (levels, x) = ([-64i8; 64 * LANES], [255u8; 64]);
        let blocks = Blocks { levels: &levels, sums: &[0; LANES], scales: &[1.0; LANES], bias: &[0.0; LANES] };
        let mut y = [0.0; LANES];
        let y = super::super::team::Shared::new(&mut y);
        integer(blocks, (&x, &[Levels { scale: 1.0, zero: 0 }]), 64, |_, _| {
            // SAFETY: there is one result.
            unsafe { y.get_mut(0..LANES) }.try_into().unwrap()
        });
        // SAFETY: the product is done.
        assert_eq!(unsafe { y.get(0..LANES) }, [-64.0 * 255.0 * 64.0; LANES]);
    }

    #[test]
    fn floats_are_the_sums_of_products() {
        for (rows, inputs, columns) in [(1, 3, 1), (2, 1280, 5), (3, 20, 9), (4, 16, 4), (11, 37, 6)] {
            let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 16.0;
            let weight: Vec<f32> = (0..columns * inputs).map(value).collect();
            let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
            let mut found = vec![f32::NAN; rows * columns];
            float(&weight, &x, inputs, |row, column, sum| found[row * columns + column] = sum);
            for (i, found) in found.iter().enumerate() {
                let (x, w) = (&x[i / columns * inputs..][..inputs], &weight[i % columns * inputs..][..inputs]);
                let expected: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                // These values are multiples of 1/256, and their sums are exact.
                assert_eq!(f64::from(*found), expected, "{rows} rows of {inputs}, {columns} columns");
            }
        }
    }
}
