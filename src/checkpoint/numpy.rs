//! NumPy's scalars and arrays in a pickle.

use super::pickle::{Id, Pickle};

/// A type of NumPy's, such as `<f8`.
struct Type<'a> {
    /// Kind and bytes per value, such as `f8`.
    code: &'a str,
    big_endian: bool,
}

/// Reads the call of `numpy.dtype(code, …)` with its state `(version, byte order, …)`.
fn dtype(pickle: &Pickle, id: Id) -> Option<Type<'_>> {
    let ("numpy.dtype", arguments) = pickle.call(id)? else { return None };
    let code = pickle.text(*pickle.sequence(arguments)?.first()?)?;
    let order = pickle.state(id).and_then(|state| pickle.text(*pickle.sequence(state)?.get(1)?));
    Some(Type { code, big_endian: order == Some(">") })
}

/// Bytes of one value in little-endian order.
fn little<const N: usize>(bytes: &[u8], big_endian: bool) -> Option<[u8; N]> {
    let mut value: [u8; N] = bytes.try_into().ok()?;
    if big_endian {
        value.reverse();
    }
    Some(value)
}

/// The number that the scalar at `id` is. `None` if it is not a scalar of NumPy's, or not a number.
pub fn scalar(pickle: &Pickle, id: Id) -> Option<f64> {
    let (function, arguments) = pickle.call(id)?;
    if !matches!(function, "numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar") {
        return None;
    }
    let &[kind, bytes] = pickle.sequence(arguments)? else { return None };
    let (Type { code, big_endian }, bytes) = (dtype(pickle, kind)?, pickle.bytes(bytes)?);
    Some(match code {
        "f8" => f64::from_le_bytes(little(&bytes, big_endian)?),
        "f4" => f64::from(f32::from_le_bytes(little(&bytes, big_endian)?)),
        "f2" => f64::from(half::f16::from_le_bytes(little(&bytes, big_endian)?)),
        "i8" => i64::from_le_bytes(little(&bytes, big_endian)?) as f64,
        "u8" => u64::from_le_bytes(little(&bytes, big_endian)?) as f64,
        "i4" => f64::from(i32::from_le_bytes(little(&bytes, big_endian)?)),
        "u4" => f64::from(u32::from_le_bytes(little(&bytes, big_endian)?)),
        "i2" => f64::from(i16::from_le_bytes(little(&bytes, big_endian)?)),
        "u2" => f64::from(u16::from_le_bytes(little(&bytes, big_endian)?)),
        "i1" => f64::from(i8::from_le_bytes(little(&bytes, big_endian)?)),
        "u1" => f64::from(u8::from_le_bytes(little(&bytes, big_endian)?)),
        _ => return None,
    })
}

/// An array whose values are in the pickle.
pub struct Array<'a> {
    /// Kind and bytes per value, such as `f4`.
    pub code: &'a str,
    /// Whether the values are in big-endian order.
    pub big_endian: bool,
    /// Sizes of the axes.
    pub shape: Vec<usize>,
    /// The value that holds the bytes.
    pub bytes: Id,
}

/// Reads the state `(version, shape, type, Fortran order, bytes)` of the array at `id`. `None` if it is not an array in
/// row-major order.
pub fn array(pickle: &Pickle, id: Id) -> Option<Array<'_>> {
    let (function, _) = pickle.call(id)?;
    if !matches!(function, "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct") {
        return None;
    }
    let &[_, shape, kind, fortran, bytes] = pickle.sequence(pickle.state(id)?)? else { return None };
    let Type { code, big_endian } = dtype(pickle, kind)?;
    let shape = pickle.sizes(shape)?;
    // In one dimension both orders are the same.
    let row_major = pickle.boolean(fortran) == Some(false) || shape.len() < 2;
    row_major.then_some(Array { code, big_endian, shape, bytes })
}
