//! Names of settings in Python.

/// Keywords with another name than their setting: reserved words of Python, and names that image generators share.
pub const KEYWORDS: [(&str, &str); 4] = [
    ("class_", "class"),
    ("guidance_scale", "cfg"),
    ("guidance_schedule", "cfg_schedule"),
    ("num_inference_steps", "steps"),
];

/// The keyword of a setting.
pub fn keyword_of(setting: &str) -> &str {
    KEYWORDS.iter().find(|(_, name)| *name == setting).map_or(setting, |(keyword, _)| keyword)
}
