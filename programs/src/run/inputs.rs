//! Conversion of flags, and of the files that they name, to a request that fits the model.

use std::path::Path;

use candle_core::DType;
use eqim::checkpoint::tensors::TensorFile;
use eqim::engine::Engine;
use eqim::engine::candle;
use eqim::generate::finish::Finish;
use eqim::generate::plan;
use eqim::generate::tiles::Tiling;
use eqim::long::is_folder;
use eqim::picture::{self, Side};
use eqim::request::settings::Settings;
use eqim::request::{Noise, Request};
use eqim::{Config, Error, Result};
use ndarray::{Array3, Axis, Ix3};

/// Beginning of the images.
#[derive(Debug)]
pub enum Prefix {
    /// Tokens `[1 or B, n, E]`.
    Tokens(Array3<f32>),
    /// Pixels `[3, height, width]`, in the order of generation.
    Picture(Array3<f32>),
}

/// Inputs of a run.
#[derive(Debug)]
pub struct Inputs {
    /// The request. Its prefix is not set yet.
    pub request: Request,
    /// Prefix of the request, to be encoded by an engine.
    pub prefix: Option<Prefix>,
    /// Postprocessing of the images.
    pub finish: Finish,
    /// Tiling of the decoder; `None` decodes the image as a whole.
    pub tiling: Option<Tiling>,
}

/// Checks the settings, and reads the files that the settings and `noise` name. `output` is the path of the image.
///
/// # Errors
/// [`Error::setting`] if a setting does not fit the model; [`Error::input`] if a file does not fit the model.
pub fn read(settings: &Settings, noise: Option<&Path>, output: Option<&Path>, config: &Config) -> Result<Inputs> {
    let (mut request, tiling) = plan::check(settings, output.is_some_and(is_folder), config)?;
    let prefix = settings.prefix.as_ref();
    let prefix = prefix.map(|path| Prefix::read(path, &request, settings.direction.unwrap_or_default(), config));
    let prefix = prefix.transpose()?;
    let finish = finish(settings, prefix.as_ref(), config)?;
    if let Some(path) = noise {
        let expected = request.tokens - prefix.as_ref().map_or(0, |prefix| prefix.tokens(config));
        let fits = |found: usize| {
            let problem = "the length of the image without its prefix";
            let problem = format!("has noise for {found} tokens, expected {expected}: {problem}");
            (found == expected).then_some(()).ok_or_else(|| about("noise")(Error::input(path.display(), problem)))
        };
        let file = TensorFile::open(path).map_err(about("noise"))?;
        request.noise = Noise::Given(read_tokens("noise", file, "noise", &[request.classes.len()], config, fits)?);
    }
    Ok(Inputs { request, prefix, finish, tiling })
}

/// Checks that a prefix of `given` tokens, read from `path`, leaves a token of the image to generate.
///
/// # Errors
/// [`Error::setting`] naming the prefix.
pub fn check_length(path: &Path, given: usize, tokens: usize) -> Result<()> {
    if given < tokens {
        return Ok(());
    }
    let problem =
        format!("has {given} tokens and the image {tokens}, so no token is left to generate: increase tokens");
    Err(about("prefix")(Error::input(path.display(), problem)))
}

/// Postprocessing of the images.
///
/// # Errors
/// [`Error::setting`] if pixels are to be kept and the prefix has none.
pub fn finish(settings: &Settings, prefix: Option<&Prefix>, config: &Config) -> Result<Finish> {
    let keeps = settings.keep_prefix_pixels.unwrap_or_default();
    let kept = match prefix {
        Some(Prefix::Picture(pixels)) if keeps => Some(pixels.clone()),
        _ if keeps => {
            let problem = "needs a PNG or JPEG as the prefix: tokens have no pixels";
            return Err(Error::setting("keep_prefix_pixels", problem));
        }
        _ => None,
    };
    let side = settings.direction.unwrap_or_default();
    Ok(Finish { kept, side, token_width: config.tokenizer.token_width() })
}

impl Prefix {
    /// Reads the prefix of a request: a picture, or tokens for one row or for all rows of the request.
    ///
    /// # Errors
    /// [`Error::setting`] naming the prefix if the file does not fit the model, or is as long as the images.
    pub fn read(path: &Path, request: &Request, side: Side, config: &Config) -> Result<Self> {
        let field = "prefix";
        let fits = |given| check_length(path, given, request.tokens);
        if picture::is_picture(path).map_err(about(field))? {
            let prefix = Self::read_picture(path, config, side)?;
            fits(prefix.tokens(config))?;
            return Ok(prefix);
        }
        let neither = |error| about(field)(error).advise("; it is not a PNG or JPEG either");
        let file = TensorFile::open(path).map_err(neither)?;
        Ok(Self::Tokens(read_tokens(field, file, "tokens", &[1, request.classes.len()], config, fits)?))
    }

    fn read_picture(path: &Path, config: &Config, side: Side) -> Result<Self> {
        let token_width = config.tokenizer.token_width();
        let height = config.tokenizer.image_height();
        let beginning = |image| picture::beginning(path, image, height, token_width, side);
        let read = picture::load(path).and_then(beginning).map_err(about("prefix"))?;
        let (width, height) = read.original;
        let (_, scaled_height, kept) = read.pixels.dim();
        eqim_cli::note(format_args!(
            "prefix {}: {width}×{height} pixels, scaled to {}×{scaled_height}, {} cut on the {}: {} tokens",
            path.display(),
            read.scaled,
            read.scaled - kept,
            if side == Side::Right { "left" } else { "right" },
            kept / token_width,
        ));
        Ok(Self::Picture(read.pixels))
    }

    /// Length of the prefix in tokens.
    pub fn tokens(&self, config: &Config) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.dim().1,
            Self::Picture(pixels) => pixels.dim().2 / config.tokenizer.token_width(),
        }
    }

    /// Encodes the prefix to tokens `[rows, n, E]`.
    ///
    /// # Errors
    /// If the encoder fails.
    pub fn encode(&self, engine: &dyn Engine, rows: usize) -> Result<Array3<f32>> {
        let encoded;
        let tokens = match self {
            Self::Tokens(tokens) => tokens,
            Self::Picture(pixels) => {
                let pixels = pixels.view().insert_axis(Axis(0));
                encoded = engine.encode_tokens(pixels)?;
                &encoded
            }
        };
        let (_, count, embed) = tokens.dim();
        let repeated = tokens.broadcast((rows, count, embed)).map(|tokens| tokens.to_owned());
        repeated.ok_or_else(|| Error::run(engine.name(), format!("encoded a picture as {:?}", tokens.dim())))
    }
}

/// Reads the tensor `key` of a `.safetensors`. It must have a number of rows that `rows` contains, at least one token,
/// a number of tokens that `fits` accepts, and finite floating-point values. Only a tensor of the right shape is read.
fn read_tokens(
    field: &'static str,
    mut file: TensorFile,
    key: &str,
    rows: &[usize],
    config: &Config,
    fits: impl Fn(usize) -> Result<()>,
) -> Result<Array3<f32>> {
    let path = file.path().to_path_buf();
    let bad = |problem: String| about(field)(Error::input(path.display(), problem));
    let Some((dtype, shape)) = file.tensors().get(key).map(|info| (info.dtype, info.shape.clone())) else {
        let mut names: Vec<String> = file.tensors().into_keys().collect();
        names.sort();
        return Err(bad(format!("has no tensor `{key}` (it has: {})", names.join(", "))));
    };
    let embed = config.generator.embed;
    if !matches!(shape[..], [batch, (1..), values] if rows.contains(&batch) && values == embed) {
        let mut rows: Vec<String> = rows.iter().map(usize::to_string).collect();
        rows.dedup();
        let expected = format!("[{}, tokens, {embed}]: one row per class, {embed} values per token", rows.join(" or "));
        return Err(bad(format!("`{key}` has shape {shape:?}, expected {expected}")));
    }
    let float = [DType::F32, DType::F16, DType::BF16, DType::F64];
    if !DType::try_from(dtype).is_ok_and(|dtype| float.contains(&dtype)) {
        return Err(bad(format!("`{key}` is of type {dtype}, expected F32, F16, BF16 or F64")));
    }
    fits(shape[1])?;
    let array = candle::to_array::<Ix3>(&file.read(key).map_err(about(field))?.to_dtype(DType::F32)?)?;
    if array.iter().any(|value| !value.is_finite()) {
        return Err(bad(format!("`{key}` has a value that is not finite")));
    }
    Ok(array)
}

/// Adds the setting that names a file to an input error about the file.
pub fn about(field: &'static str) -> impl Fn(Error) -> Error {
    move |error| match error.is_input() {
        true => Error::setting(field, error),
        false => error,
    }
}
