//! Low-rank adapters (Hu et al., LoRA, ICLR 2022): a small file that changes a generator.
//!
//! For a weight `NAME.weight [output, input]` the file holds `NAME.lora_A.weight [rank, input]` and `NAME.lora_B.weight
//! [output, rank]`, the names of the Python package `peft`. The merged weight is `W + scale · B · A`. Other tensors of the
//! file take the place of those of the generator.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::CLASS_TABLE;
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
    let mut found = read(&mut file)?;
    let adapted: Vec<String> =
        found.keys().filter_map(|name| Some(format!("{}{WEIGHT}", name.strip_suffix(A)?))).collect();
    if adapted.is_empty() {
        return Err(Error::input(path.display(), format!("has no tensor NAME{A}, so it is no low-rank adapter")));
    }
    if let Some(text) = file.text(KEY) {
        let description: Description = serde_json::from_str(text).or_input(path.display())?;
        let base = fingerprint(weights, &adapted).map_err(|error| error.about(path.display()))?;
        if base != description.base {
            return Err(Error::input(path.display(), "was trained on other weights than those of this generator"));
        }
        config.generator.class_num = description.generator.class_num;
        config.generator.class_names = description.generator.class_names;
    }
    for weight in &adapted {
        merge_one(path, scale, weight, &mut found, weights)?;
    }
    replace(path, found, weights)?;
    let (rows, classes) = (weights.find(CLASS_TABLE)?.dim(0)?, config.generator.class_num);
    if rows != classes {
        let problem = format!("tensor {CLASS_TABLE} has {rows} rows, expected one for each of {classes} classes");
        return Err(Error::input(path.display(), problem));
    }
    config.check().map_err(|error| error.about(path.display()))
}

/// The tensors of an adapter, by their names in the model.
fn read(file: &mut TensorFile) -> Result<BTreeMap<String, Tensor>> {
    let stored: Vec<String> = file.tensors().into_keys().collect();
    let mut found = BTreeMap::new();
    for name in stored {
        let tensor = file.read(&name)?.to_dtype(DType::F32)?;
        check_finite(&name, &tensor).map_err(|error| error.about(file.path().display()))?;
        found.insert(name.strip_prefix(PREFIX).unwrap_or(&name).to_string(), tensor);
    }
    Ok(found)
}

/// Merges the two matrices of a weight, and takes them out of `found`.
fn merge_one(
    path: &Path,
    scale: f64,
    weight: &str,
    found: &mut BTreeMap<String, Tensor>,
    weights: &mut Weights,
) -> Result<()> {
    let bad = |problem: String| Error::input(path.display(), problem);
    let base = weights.find(weight).map_err(|error| error.about(path.display()))?;
    let [a, b] = names(weight).map(|name| found.remove(&name).ok_or(bad(format!("tensor {name} is missing"))));
    let (a, b) = (a?, b?);
    let fits = matches!((base.dims(), a.dims(), b.dims()), ([o, i], [r, ai], [bo, br]) if (o, i, r) == (bo, ai, br));
    if !fits {
        let (base, a, b) = (base.dims(), a.dims(), b.dims());
        return Err(bad(format!("the adapter of {weight} {base:?} has matrices {a:?} and {b:?}")));
    }
    let merged = merged(base, &a, &b, scale)?;
    weights.insert(weight.to_string(), &merged)
}

/// Puts tensors in the place of those of the generator. A table of classes can have other rows.
fn replace(path: &Path, found: BTreeMap<String, Tensor>, weights: &mut Weights) -> Result<()> {
    for (name, tensor) in found {
        let expected = weights.find(&name).map_err(|error| error.about(path.display()))?.dims();
        let same_rows = expected.first() == tensor.dims().first() || name == CLASS_TABLE;
        if !same_rows || expected.get(1..) != tensor.dims().get(1..) {
            let problem = format!("tensor {name} has shape {:?}, expected {expected:?}", tensor.dims());
            return Err(Error::input(path.display(), problem));
        }
        weights.insert(name, &tensor)?;
    }
    Ok(())
}
