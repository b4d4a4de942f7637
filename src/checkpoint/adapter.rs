//! Low-rank adapters (Hu et al., LoRA, ICLR 2022): a small file that changes a generator.
//!
//! For a weight `NAME.weight [output, input]` the file holds `NAME.lora_A.weight [rank, input]` and `NAME.lora_B.weight
//! [output, rank]`, the names of the Python package `peft`. The merged weight is `W + scale · B · A`. Other tensors of the
//! file take the place of those of the generator.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::tensors::{self, TensorFile};
use crate::config::GeneratorConfig;
use crate::digest::Hash;
use crate::model::check_finite;
use crate::weights::Weights;
use crate::{Config, Error, Result, ResultExt};

/// Metadata key for the description of an adapter, as JSON.
const KEY: &str = "eqim-adapter";
/// What `peft` writes before the names of a model.
const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const WEIGHT: &str = ".weight";

/// Description of an adapter that eqim wrote.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    /// The generator with the classes of the adapter.
    generator: GeneratorConfig,
    /// [`fingerprint`] of the weights that the adapter changes.
    base: String,
}

/// Names of the two matrices of the adapter of a weight `NAME.weight`.
pub fn names(weight: &str) -> [String; 2] {
    let module = weight.strip_suffix(WEIGHT).unwrap_or(weight);
    [A, B].map(|matrix| format!("{module}{matrix}"))
}

/// The merged weight `W + scale · B · A`, `[output, input]`, of `a [rank, input]` and `b [output, rank]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn merged(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((weight + (b.matmul(a)? * scale)?)?)
}

/// Hash of the values of the weights of these names.
///
/// # Errors
/// If a weight is missing.
fn fingerprint(weights: &Weights, names: &[String]) -> Result<String> {
    let mut hash = Hash::default();
    for name in names.iter().collect::<BTreeSet<_>>() {
        hash.add(format!("{name}\n"));
        hash.add_values(&weights.find(name)?.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(hash.hex())
}

/// Writes an adapter of the weights `adapted` of `base`: their matrices, and the tensors that take the place of others.
///
/// # Errors
/// [`Error::run`] if the file cannot be written.
pub fn write(
    path: &Path,
    generator: &GeneratorConfig,
    (base, adapted): (&Weights, &[String]),
    stored: &[(&str, Tensor)],
) -> Result<()> {
    let base = fingerprint(base, adapted)?;
    let description =
        serde_json::to_string(&Description { generator: generator.clone(), base }).or_run(path.display())?;
    tensors::write(path, stored, HashMap::from([(KEY.into(), description)]))
}

/// Merges the adapter at `path` into a model, in FP32.
///
/// # Errors
/// [`Error::input`] if the adapter was trained on other weights, or naming the tensor that does not fit.
pub fn merge(path: &Path, scale: f64, config: &mut Config, weights: &mut Weights) -> Result<()> {
    let mut file = TensorFile::open(path)?;
    let bad = |problem: String| Error::input(path.display(), problem);
    let mut found = BTreeMap::new();
    let stored: Vec<String> = file.tensors().into_keys().collect();
    for name in stored {
        let tensor = file.read(&name)?.to_dtype(DType::F32)?;
        check_finite(&name, &tensor).map_err(|error| error.about(path.display()))?;
        found.insert(name.strip_prefix(PREFIX).unwrap_or(&name).to_string(), tensor);
    }
    let adapted: Vec<String> =
        found.keys().filter_map(|name| Some(format!("{}{WEIGHT}", name.strip_suffix(A)?))).collect();
    if adapted.is_empty() {
        return Err(bad(format!("has no tensor NAME{A}, so it is no low-rank adapter")));
    }
    if let Some(text) = file.text(KEY) {
        let description: Description = serde_json::from_str(text).or_input(path.display())?;
        let base = fingerprint(weights, &adapted).map_err(|error| error.about(path.display()))?;
        if base != description.base {
            return Err(bad("was trained on other weights than those of this generator".into()));
        }
        config.generator.class_num = description.generator.class_num;
        config.generator.class_names = description.generator.class_names;
    }
    for weight in &adapted {
        let [a, b] = names(weight).map(|name| found.remove(&name).ok_or(name));
        let base = weights.find(weight).map_err(|error| error.about(path.display()))?;
        let (a, b) = match (a, b) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(name), _) | (_, Err(name)) => return Err(bad(format!("tensor {name} is missing"))),
        };
        let fits =
            matches!((base.dims(), a.dims(), b.dims()), ([o, i], [r, ai], [bo, br]) if (o, i, r) == (bo, ai, br));
        if !fits {
            let (base, a, b) = (base.dims(), a.dims(), b.dims());
            return Err(bad(format!("the adapter of {weight} {base:?} has matrices {a:?} and {b:?}")));
        }
        let merged = merged(base, &a, &b, scale)?;
        weights.insert(weight.clone(), &merged)?;
    }
    for (name, tensor) in found {
        let shape = weights.find(&name).map_err(|error| error.about(path.display()))?.dims().to_vec();
        // A table of classes can have other rows.
        if shape.get(1..) != tensor.dims().get(1..)
            || shape.first() != tensor.dims().first() && name != super::CLASS_TABLE
        {
            return Err(bad(format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.dims())));
        }
        weights.insert(name, &tensor)?;
    }
    let rows = weights.find(super::CLASS_TABLE)?.dim(0)?;
    match rows == config.generator.class_num {
        true => config.check().map_err(|error| error.about(path.display())),
        false => {
            let (table, classes) = (super::CLASS_TABLE, config.generator.class_num);
            Err(bad(format!("tensor {table} has {rows} rows, expected one for each of {classes} classes")))
        }
    }
}
