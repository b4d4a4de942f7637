//! Types of PyTorch's storages and of NumPy's arrays.

use candle_core::DType;

/// Names of PyTorch's storages and bytes per value.
const STORAGES: [(&str, u64); 15] = [
    ("FloatStorage", 4),
    ("DoubleStorage", 8),
    ("HalfStorage", 2),
    ("BFloat16Storage", 2),
    ("LongStorage", 8),
    ("IntStorage", 4),
    ("ShortStorage", 2),
    ("CharStorage", 1),
    ("ByteStorage", 1),
    ("BoolStorage", 1),
    ("UntypedStorage", 1),
    ("QInt8Storage", 1),
    ("QUInt8Storage", 1),
    ("ComplexFloatStorage", 8),
    ("ComplexDoubleStorage", 16),
];

/// The class of a storage without its module: `FloatStorage` for `torch.FloatStorage` and for `torch.cuda.FloatStorage`.
fn class(name: &str) -> Option<&str> {
    let (module, class) = name.rsplit_once('.')?;
    (module == "torch" || module.starts_with("torch.")).then_some(class)
}

/// Bytes per value of a storage.
pub fn size(name: &str) -> Option<u64> {
    let class = class(name)?;
    STORAGES.iter().find(|(storage, _)| *storage == class).map(|(_, size)| *size)
}

/// Type of the values of a storage, if it holds weights.
pub fn dtype(name: &str) -> Option<DType> {
    match class(name)? {
        "FloatStorage" | "float32" | "float" => Some(DType::F32),
        "DoubleStorage" | "float64" | "double" => Some(DType::F64),
        "HalfStorage" | "float16" | "half" => Some(DType::F16),
        "BFloat16Storage" | "bfloat16" => Some(DType::BF16),
        _ => None,
    }
}
