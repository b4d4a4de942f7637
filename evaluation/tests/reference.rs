//! The distances, compared with torch-fidelity, prdc, clean-fid and NumPy on the same features and images
//! (`tests/evaluation/reference.py`).

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use eqim_evaluation::features::{Features, Origin};
use eqim_evaluation::frechet::{self, Moments};
use eqim_evaluation::network::Outputs;
use eqim_evaluation::random::Random;
use eqim_evaluation::resize::Protocol;
use eqim_evaluation::{inception, kernel, neighbours};
use ndarray::{Array2, Array3};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/evaluation")
}

fn expected(part: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder().join("expected.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    match &all[part] {
        Value::Array(entries) => entries.clone(),
        entry => vec![entry.clone()],
    }
}

fn matrix(name: &str) -> Array2<f32> {
    let tensors = candle_core::safetensors::load(folder().join("features.safetensors"), &Device::Cpu).unwrap();
    let tensor: &Tensor = &tensors[name];
    Array2::from_shape_vec(tensor.dims2().unwrap(), tensor.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

fn number(entry: &Value, key: &str) -> f64 {
    entry[key].as_f64().unwrap_or_else(|| panic!("{key} of {entry}"))
}

/// Asserts that values agree within `relative` of the larger of the expected value and `least`.
fn close(name: &str, found: f64, expected: f64, (relative, least): (f64, f64)) {
    let limit = relative * expected.abs().max(least);
    let difference = (found - expected).abs();
    println!("{name}: {found} for {expected}");
    assert!(difference <= limit, "{name}: {found}, expected {expected}, differs by {difference:e}");
}

#[test]
fn frechet_distance_is_torch_fidelitys() {
    for entry in expected("fid") {
        let [a, b] = ["first", "second"].map(|key| Moments::of(matrix(entry[key].as_str().unwrap()).view()).unwrap());
        let found = frechet::distance(&a, &b).unwrap();
        close("NumPy", found, number(&entry, "numpy"), (1e-9, 1.0));
        // Its root of a covariance without full rank is less exact.
        close("torch-fidelity", found, number(&entry, "torch_fidelity"), (1e-6, 1.0));
    }
}

#[test]
fn statistics_of_adm_are_read() {
    let entry = &expected("adm")[0];
    let a = Moments::of(matrix(entry["features"].as_str().unwrap()).view()).unwrap();
    for file in entry["files"].as_array().unwrap() {
        let read = Features::read(&folder().join(file.as_str().unwrap())).unwrap();
        close("ADM", frechet::distance(&a, &read.moments).unwrap(), number(entry, "numpy"), (1e-9, 1.0));
    }
}

#[test]
fn random_numbers_are_numpys() {
    let entry = &expected("random")[0];
    let found = Random::new(number(entry, "seed") as u32).permutation(300);
    let permutation: Vec<usize> = serde_json::from_value(entry["permutation_of_300"].clone()).unwrap();
    assert_eq!(found, permutation);
}

#[test]
fn kernel_distance_is_torch_fidelitys() {
    for entry in expected("kid") {
        let [a, b] = ["first", "second"].map(|key| matrix(entry[key].as_str().unwrap()));
        let [subsets, subset_size, seed] =
            ["subsets", "subset_size", "seed"].map(|key| entry[key].as_u64().unwrap() as usize);
        let settings = kernel::Settings { subsets, subset_size, seed: seed as u32 };
        let (mean, deviation) = kernel::distance(a.view(), b.view(), settings).unwrap();
        close("mean", mean, number(&entry, "mean"), (1e-6, 1e-3));
        close("deviation", deviation.unwrap(), number(&entry, "deviation"), (1e-6, 1e-3));
    }
}

#[test]
fn precision_and_recall_are_those_of_prdc() {
    for entry in expected("prc") {
        let [real, fake] = ["real", "fake"].map(|key| matrix(entry[key].as_str().unwrap()));
        let found = neighbours::shares(real.view(), fake.view(), entry["k"].as_u64().unwrap() as usize).unwrap();
        for (key, share) in [
            ("precision", found.precision),
            ("recall", found.recall),
            ("density", found.density),
            ("coverage", found.coverage),
        ] {
            close(key, share, number(&entry, key), (1e-12, 1.0));
        }
    }
}

#[test]
fn inception_score_is_torch_fidelitys() {
    for entry in expected("isc") {
        let seed = entry["shuffle"].as_bool().unwrap().then(|| entry["seed"].as_u64().unwrap() as u32);
        let settings = inception::Settings { splits: entry["splits"].as_u64().unwrap() as usize, seed };
        let (mean, deviation) = inception::score(matrix("logits").view(), settings).unwrap();
        close("mean", mean, number(&entry, "mean"), (1e-6, 1.0));
        close("deviation", deviation, number(&entry, "deviation"), (1e-6, 1.0));
    }
}

#[test]
fn resizing_is_that_of_clean_fid_and_tensorflow() {
    let tensors = candle_core::safetensors::load(folder().join("resize.safetensors"), &Device::Cpu).unwrap();
    let array = |name: &str| -> Array3<f32> {
        let tensor = tensors[name].to_dtype(candle_core::DType::F32).unwrap();
        Array3::from_shape_vec(tensor.dims3().unwrap(), tensor.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
    };
    let image = array("image");
    for (name, protocol) in [("clean", Protocol::Clean), ("legacy", Protocol::Legacy)] {
        for size in [64, 150] {
            let (found, expected) = (protocol.resize(image.view(), (size, size)), array(&format!("{name}_{size}")));
            assert_eq!(found.dim(), expected.dim());
            for (found, expected) in found.iter().zip(&expected) {
                let difference = (found - expected).abs();
                assert!(difference <= 1e-4, "{name}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn features_that_are_not_finite_are_refused() {
    let origin = Origin {
        images: "photos".into(),
        network: "network.onnx".into(),
        identity: String::new(),
        resize: Protocol::Clean,
        crops: None,
    };
    let mut features = matrix("a");
    features[[7, 3]] = f32::NAN;
    let error = Features::new(origin, &[Outputs { features, logits: None }]).unwrap_err().to_string();
    assert_eq!(error, "photos: the output of network.onnx for image 7 is not finite");
}
