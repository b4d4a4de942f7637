//! Names of tensors as training writes them, and as the model asks for them.

/// Modules that training puts around a model or a part of it: `DataParallel`, `torch.compile`, DeepSpeed. Their names
/// stand before or in the names of the tensors.
const WRAPPERS: [&str; 3] = ["module", "_orig_mod", "_forward_module"];

/// A name without the names of wrappers: `decoder.conv_in.weight` for `module.decoder._orig_mod.conv_in.weight`.
pub fn canonical(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    parts.join(".")
}

/// Names under which Lightning may store the moving average of a tensor: `ema_<part>.<the rest without dots>`. `stored`
/// is the tensor's name in the checkpoint, where each wrapper may be in the average's name too.
pub fn averages(stored: &str) -> Vec<String> {
    let name = canonical(stored);
    let (part, rest) = name.split_once('.').unwrap_or((&name, ""));
    let flat = rest.replace('.', "");
    let inside = stored.split_once(&format!("{part}.")).map(|(_, rest)| rest.replace('.', ""));
    let wrapped = WRAPPERS.iter().map(|wrapper| format!("{wrapper}{flat}"));
    let flats = [flat.clone()].into_iter().chain(inside).chain(wrapped);
    flats.map(|flat| format!("ema_{part}.{flat}")).collect()
}

/// Whether the last part of a name says that the tensor is trained. All others are buffers.
pub fn is_trained(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("weight" | "bias"))
}

/// The prefix that `name` has before `anchor`, with its dot: `model.` for `model.z_proj.weight`, nothing for
/// `z_proj.weight`.
pub fn prefix<'a>(name: &'a str, anchor: &str) -> Option<&'a str> {
    name.strip_suffix(anchor).filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_taken_off_names() {
        for name in
            ["z_proj.weight", "module.z_proj.weight", "_orig_mod.module.z_proj.weight", "z_proj._orig_mod.weight"]
        {
            assert_eq!(canonical(name), "z_proj.weight");
        }
        assert_eq!(canonical("modules.module_list.weight"), "modules.module_list.weight");
    }

    #[test]
    fn averages_of_wrapped_modules_are_found() {
        let plain = averages("decoder.conv_in.weight");
        assert_eq!(plain[0], "ema_decoder.conv_inweight");
        assert!(plain.contains(&"ema_decoder._orig_modconv_inweight".to_string()));
        let inside = averages("module.decoder.mid._orig_mod.block_1.conv1.weight");
        assert!(inside.contains(&"ema_decoder.mid_orig_modblock_1conv1weight".to_string()), "{inside:?}");
    }

    #[test]
    fn prefixes_end_with_a_dot() {
        assert_eq!(prefix("z_proj.weight", "z_proj.weight"), Some(""));
        assert_eq!(prefix("model.z_proj.weight", "z_proj.weight"), Some("model."));
        assert_eq!(prefix("xz_proj.weight", "z_proj.weight"), None);
    }
}
