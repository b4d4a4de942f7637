//! Properties of 8-bit quantization, histograms and estimators.

use candle_core::{Device, Tensor};
use eqim::close::largest;
use eqim_calibration::int8::{
    Affine, CPU_WEIGHT_LEVELS, WEIGHT_LEVELS, representable, round_bias, round_symmetric, round_weight,
};
use eqim_calibration::{Estimator, Histogram, Range};
use half::f16;
use proptest::collection::vec;
use proptest::prelude::*;

const ESTIMATORS: [Estimator; 5] =
    [Estimator::Max, Estimator::Percentile(99.0), Estimator::Percentile(100.0), Estimator::Entropy, Estimator::Mse];

fn histogram(values: &[f32]) -> Histogram {
    let mut histogram = Histogram::default();
    histogram.add(values).unwrap();
    histogram
}

/// Values of very different magnitudes, including zeros.
fn values() -> impl Strategy<Value = Vec<f32>> {
    let sizes = prop_oneof![Just(0.0f32), -1e-3f32..1e-3, -10.0f32..10.0, -5e4f32..5e4];
    vec(sizes, 1..400)
}

proptest! {
    #[test]
    fn scales_are_numbers_of_fp16_and_not_smaller(scale in 0.0f32..60000.0) {
        let rounded = representable(scale).unwrap();
        prop_assert!(rounded > 0.0 && rounded >= scale);
        prop_assert_eq!(f16::from_f32(rounded).to_f32(), rounded);
        // The next smaller FP16 number is below the scale.
        let below = f16::from_bits(f16::from_f32(rounded).to_bits() - 1).to_f32();
        prop_assert!(below < scale || rounded == f16::from_bits(1).to_f32());
    }

    #[test]
    fn within_the_range_rounding_moves_by_half_a_step(low in -100.0f32..=0.0, high in 0.0f32..100.0, at in 0.0f32..=1.0) {
        let value = low + at * (high - low);
        let affine = Affine::covering(low, high).unwrap();
        let half = affine.scale * 0.501;
        // The zero point is also rounded, so the ends of the range can lie half a step outside the levels.
        prop_assert!((affine.round(value) - value).abs() <= 2.0 * half);
        prop_assert_eq!(affine.round(0.0), 0.0);
        prop_assert_eq!(affine.round(affine.round(value)), affine.round(value));

        let range = Range { low, high };
        let scale = range.scale().unwrap();
        prop_assert!((round_symmetric(value, scale) - value).abs() <= 0.501 * scale);
        prop_assert_eq!(round_symmetric(round_symmetric(value, scale), scale), round_symmetric(value, scale));
    }

    #[test]
    fn beyond_the_range_values_are_cut(high in 0.01f32..100.0, beyond in 1.1f32..100.0) {
        let affine = Affine::covering(0.0, high).unwrap();
        prop_assert_eq!(affine.round(high * beyond), affine.round(high * 1.05));
        prop_assert_eq!(affine.round(-high * beyond), 0.0);
    }

    #[test]
    fn dynamic_ranges_hold_their_values(values in values()) {
        let affine = Affine::dynamic(&values);
        prop_assert!(affine.scale.is_finite() && affine.scale > 0.0);
        for value in values {
            prop_assert!((affine.round(value) - value).abs() <= affine.scale * 1.01);
        }
    }

    #[test]
    fn weights_are_rounded_by_channel(values in vec(-3.0f32..3.0, 12), dead in 0usize..3, exponent in -20i32..8) {
        let mut values: Vec<f32> = values.into_iter().map(|value| value * 2.0f32.powi(exponent)).collect();
        values[4 * dead..4 * dead + 4].fill(0.0);
        let weight = Tensor::from_slice(&values, (3, 4), &Device::Cpu).unwrap();
        for levels in [WEIGHT_LEVELS, CPU_WEIGHT_LEVELS] {
            let rounded = round_weight(&weight, levels).unwrap();
            prop_assert!(rounded.scales.iter().all(|scale| scale.is_finite() && *scale > 0.0));
            prop_assert_eq!(rounded.scales[dead], 1.0);
            prop_assert!(rounded.levels.iter().all(|level| f32::from(*level).abs() <= levels));
            let back = rounded.tensor(&[3, 4]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (i, (value, back)) in values.iter().zip(back).enumerate() {
                prop_assert!((value - back).abs() <= 0.501 * rounded.scales[i / 4], "{value} became {back}");
            }
        }
    }

    #[test]
    fn biases_are_rounded_to_the_sums_steps(bias in -50.0f32..50.0, input in 1e-4f32..1.0, weight in 1e-4f32..1.0) {
        let step = f64::from(input) * f64::from(weight);
        let rounded = f64::from(round_bias(bias, input, weight));
        if rounded.abs() < f64::from(i32::MAX) {
            prop_assert!((rounded * step - f64::from(bias)).abs() <= 0.501 * step);
        }
    }

    #[test]
    fn a_histogram_does_not_depend_on_the_order(values in values(), cut in 0usize..400) {
        let cut = cut.min(values.len());
        let whole = histogram(&values);
        let mut parts = Histogram::default();
        parts.add(&values[cut..]).unwrap();
        parts.add(&values[..cut]).unwrap();
        prop_assert_eq!(&whole, &parts);
        prop_assert_eq!(whole.samples(), values.len() as u64);
        let text = serde_json::to_string(&whole).unwrap();
        prop_assert_eq!(serde_json::from_str::<Histogram>(&text).unwrap(), whole);
    }

    #[test]
    fn every_estimator_stays_within_what_was_seen(values in values()) {
        let histogram = histogram(&values);
        let largest = largest(&values);
        prop_assert_eq!(histogram.largest(), largest);
        for estimator in ESTIMATORS {
            let threshold = estimator.threshold(&histogram);
            prop_assert!(threshold.is_finite() && threshold <= largest, "{estimator}: {threshold}");
            prop_assert_eq!(threshold > 0.0, largest > 0.0, "{}", estimator);
            let range = Range::of(&histogram, estimator);
            prop_assert!(range.low <= 0.0 && range.high >= 0.0 && range.high.max(-range.low) <= threshold);
            let scale = range.scale().unwrap();
            prop_assert!(scale.is_finite() && scale > 0.0);
            let affine = range.affine().unwrap();
            prop_assert!(affine.scale.is_finite() && affine.scale > 0.0);
        }
        prop_assert_eq!(Estimator::Max.threshold(&histogram), largest);
        prop_assert_eq!(Estimator::Percentile(100.0).threshold(&histogram), largest);
    }

    #[test]
    fn mse_is_not_worse_than_max(values in vec(-1.0f32..1.0, 200..400), outlier in 1.0f32..200.0) {
        let values = [values, vec![outlier]].concat();
        let histogram = histogram(&values);
        let error = |estimator: Estimator| {
            let step = estimator.threshold(&histogram) / 127.0;
            values.iter().map(|value| ((value / step).round().clamp(-127.0, 127.0) * step - value).powi(2)).sum::<f32>()
        };
        // The search knows every value only to the width of a bin.
        prop_assert!(error(Estimator::Mse) <= 1.1 * error(Estimator::Max) + 1e-3);
    }
}

#[test]
fn an_outlier_is_cut_by_all_but_max() {
    let mut values: Vec<f32> = (0..100_000).map(|i| (i as f32 * 0.7).sin()).collect();
    values.push(100.0);
    let histogram = histogram(&values);
    for estimator in [Estimator::Percentile(99.9), Estimator::Entropy, Estimator::Mse] {
        let threshold = estimator.threshold(&histogram);
        assert!((0.5..60.0).contains(&threshold), "{estimator}: {threshold}");
    }
    assert_eq!(Estimator::Max.threshold(&histogram), 100.0);
}

#[test]
fn constant_activations_have_scales() {
    for (value, expected) in
        [(0.0, 0.0), (3.5, 3.5), (-1e-30, 1e-30), (f32::MIN_POSITIVE / 8.0, f32::MIN_POSITIVE / 8.0)]
    {
        let histogram = histogram(&[value; 100]);
        for estimator in ESTIMATORS {
            assert_eq!(estimator.threshold(&histogram), expected, "{estimator} of {value}");
            let range = Range::of(&histogram, estimator);
            assert!(range.scale().unwrap() > 0.0 && range.affine().unwrap().scale > 0.0);
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused_and_leave_the_rest() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut histogram = histogram(&[1.0, 2.0]);
        let before = histogram.clone();
        assert!(histogram.add(&[0.5, bad, 1.0]).unwrap_err().to_string().contains("not finite"));
        assert_eq!(histogram, before);
    }
    assert!(Range { low: 0.0, high: f32::MAX }.scale().is_err());
    assert!(representable(f32::NAN).is_err());
}

#[test]
fn a_stored_histogram_is_checked() {
    let whole = serde_json::to_value(histogram(&[0.5, -3.0, 2.0])).unwrap();
    serde_json::from_value::<Histogram>(whole.clone()).unwrap();
    let refused = |key: &str, value: serde_json::Value| {
        let mut edited = whole.clone();
        edited[key] = value;
        assert!(serde_json::from_value::<Histogram>(edited.clone()).is_err(), "{key} is {}", edited[key]);
    };
    for end in [-4.0, 0.0, 2.0, 5.0, 1e300] {
        refused("end", end.into());
    }
    for (key, value) in [("low", 1.0), ("low", -1e30), ("low", -1e300), ("high", -1.0), ("high", 1e30), ("high", 1e300)]
    {
        refused(key, value.into());
    }
    let counts = |edit: &dyn Fn(&mut Vec<u64>)| {
        let mut counts = serde_json::from_value(whole["counts"].clone()).unwrap();
        edit(&mut counts);
        refused("counts", counts.into());
    };
    counts(&Vec::clear);
    counts(&|counts| counts.truncate(2047));
    counts(&|counts| counts.push(0));
    counts(&|counts| counts.fill(0));
    counts(&|counts| counts.fill(u64::MAX));
}

#[test]
fn estimators_are_named() {
    for text in ["max", "entropy", "mse", "percentile:99.9"] {
        assert_eq!(text.parse::<Estimator>().unwrap().to_string(), text);
    }
    assert_eq!("percentile".parse::<Estimator>().unwrap(), Estimator::Percentile(99.99));
    for text in ["mean", "percentile:0", "percentile:101", "percentile:NaN", "max:1", ""] {
        assert!(text.parse::<Estimator>().is_err(), "{text}");
    }
}
