//! The examples, run as their documentation says.

use serde_json::Value;

use crate::common::bins::Workplace;
use crate::common::file;

#[test]
fn a_checkpoint_is_exported_an_image_generated_and_a_panorama_streamed() {
    let place = Workplace::empty();
    let weights = file("assets/demo/model.safetensors").display().to_string();
    let exported = place.run(&format!("export_checkpoint {weights} bundle")).succeeded().stdout;
    assert!(exported.contains("-[✓] rollout") && !exported.contains("-[x]"), "{exported}");
    place.run("generate_image bundle image.png").succeeded();
    let bundle: Value = serde_json::from_slice(&place.read("bundle/config.json")).unwrap();
    // An image per class.
    let height = bundle["model"]["generator"]["class_num"].as_u64().unwrap() as u32 * 256;
    assert_eq!(image::image_dimensions(place.path("image.png")).unwrap(), (256, height));
    place.run("contact_sheet sheet.png 2 image.png image.png image.png").succeeded();
    assert_eq!(image::image_dimensions(place.path("sheet.png")).unwrap(), (2 * 256 + 4, 2 * height + 4));
    place.run("contact_sheet sheet.png 0 image.png").failed(1, &["expected SHEET.png COLUMNS PICTURE"]);
    place.run("stream_panorama bundle 70 panorama.png").succeeded();
    assert_eq!(image::image_dimensions(place.path("panorama.png")).unwrap(), (70 * 16, 256));
    place.run("stream_panorama bundle 70").failed(1, &["expected BUNDLE TOKENS PANORAMA.png"]);
}
