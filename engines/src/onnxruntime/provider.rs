//! Execution providers of ONNX Runtime, as text such as `openvino:GPU,precision=FP16`.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use eqim::{Error, Result};

/// Name of an execution provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum ProviderName {
    /// ONNX Runtime's own kernels, and those of this crate.
    Cpu,
    /// CUDA, on NVIDIA's GPUs.
    Cuda,
    /// ROCm, on AMD's GPUs.
    Rocm,
    /// MIGraphX, on AMD's GPUs.
    MiGraphX,
    /// OpenVINO, on Intel's processors and other CPUs.
    OpenVino,
    /// Core ML, on Apple's processors.
    CoreMl,
    /// DirectML, on the GPUs of Windows.
    DirectMl,
    /// XNNPACK, on CPUs.
    Xnnpack,
    /// WebGPU, on GPUs with Vulkan, Metal or Direct3D 12.
    WebGpu,
    /// TensorRT for RTX, on NVIDIA's GPUs.
    NvRtx,
}

/// An execution provider, on one device, with options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// The execution provider.
    pub name: ProviderName,
    /// The device: a number from 0, or a word of the provider, for example `GPU` or `NPU` of OpenVINO.
    pub device: Option<String>,
    /// The provider's own options.
    pub options: Vec<(String, String)>,
}

/// The execution providers of an engine. The default is the CPU.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Providers {
    /// Execution provider of ONNX Runtime: cpu, cuda, rocm, migraphx, openvino, coreml, directml, xnnpack, webgpu or
    /// nvrtx. May be repeated: a node of a graph runs on the first provider that takes it. Nodes run on the CPU only if
    /// cpu is the last provider [default: cpu]
    #[arg(long = "provider", value_name = "NAME[:DEVICE][,KEY=VALUE]…")]
    pub order: Vec<Provider>,

    /// Shared library with the execution providers that ONNX Runtime itself does not have (a plugin)
    #[arg(long = "provider-library", value_name = "FILE", requires = "order")]
    pub library: Option<PathBuf>,
}

impl ProviderName {
    /// The name in ONNX Runtime, for example `CUDAExecutionProvider`.
    pub(super) fn in_onnxruntime(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
            Self::Rocm => "ROCMExecutionProvider",
            Self::MiGraphX => "MIGraphXExecutionProvider",
            Self::OpenVino => "OpenVINOExecutionProvider",
            Self::CoreMl => "CoreMLExecutionProvider",
            Self::DirectMl => "DmlExecutionProvider",
            Self::Xnnpack => "XnnpackExecutionProvider",
            Self::WebGpu => "WebGpuExecutionProvider",
            Self::NvRtx => "NvTensorRTRTXExecutionProvider",
        }
    }
}

impl Display for ProviderName {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().expect("no variant is skipped").get_name())
    }
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A comma begins an option if `KEY=` follows. Other commas belong to the device or to a value, such as JSON.
        let mut parts: Vec<String> = vec![];
        for part in text.split(',') {
            match (parts.last_mut(), is_option(part)) {
                (Some(last), false) => *last += &format!(",{part}"),
                _ => parts.push(part.into()),
            }
        }
        let (first, options) = parts.split_first().ok_or("is empty")?;
        let (name, device) = first.split_once(':').map_or((&first[..], None), |(name, device)| (name, Some(device)));
        let name = ProviderName::from_str(name, true).map_err(|_| {
            let names: Vec<_> = ProviderName::value_variants().iter().map(ToString::to_string).collect();
            format!("`{name}` is not an execution provider, expected one of {}", names.join(", "))
        })?;
        if device == Some("") {
            return Err(format!("the device is empty, expected {name}:DEVICE or {name}"));
        }
        let options = options.iter().filter_map(|part| part.split_once('='));
        let options: Vec<_> = options.map(|(key, value)| (key.to_string(), value.to_string())).collect();
        if let Some((key, _)) = options.iter().find(|(_, value)| value.is_empty()) {
            return Err(format!("the option {key} has no value, expected {key}=VALUE"));
        }
        match name {
            ProviderName::Cpu if device.is_some() || !options.is_empty() => {
                Err("cpu has no devices and no options".into())
            }
            _ => Ok(Self { name, device: device.map(Into::into), options }),
        }
    }
}

/// Whether a part of a provider's text is `KEY=VALUE`.
fn is_option(part: &str) -> bool {
    let is_key = |key: &str| {
        !key.is_empty() && key.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '.' | '-'))
    };
    part.split_once('=').is_some_and(|(key, _)| is_key(key))
}

impl Display for Provider {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(device) = &self.device {
            write!(f, ":{device}")?;
        }
        self.options.iter().try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

impl Providers {
    /// The providers other than the CPU.
    pub fn accelerators(&self) -> impl Iterator<Item = &Provider> {
        self.order.iter().filter(|provider| provider.name != ProviderName::Cpu)
    }

    /// Whether the CPU is the only provider.
    pub fn is_cpu(&self) -> bool {
        self.accelerators().next().is_none()
    }

    /// Whether nodes may run on the CPU.
    pub fn with_cpu(&self) -> bool {
        self.order.last().is_none_or(|last| last.name == ProviderName::Cpu)
    }

    /// Checks the order, and that a library has a use.
    ///
    /// # Errors
    /// [`Error::input`] naming the provider.
    pub fn check(&self) -> Result<()> {
        for (index, provider) in self.order.iter().enumerate() {
            if self.order[..index].iter().any(|other| other.name == provider.name) {
                return Err(Error::setting("provider", format!("{} is named twice", provider.name)));
            }
            if provider.name == ProviderName::Cpu && index + 1 < self.order.len() {
                let next = &self.order[index + 1];
                let problem = format!("{next} follows cpu, which takes every node: name cpu last");
                return Err(Error::setting("provider", problem));
            }
        }
        if let Some(library) = self.library.as_ref().filter(|_| self.is_cpu()) {
            let problem = "is the library of an execution provider, but the only provider is cpu: name that provider";
            return Err(Error::input(library.display(), problem));
        }
        Ok(())
    }
}

impl Display for Providers {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.order.iter().map(ToString::to_string).collect();
        f.write_str(&if names.is_empty() { ProviderName::Cpu.to_string() } else { names.join(" and ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn providers(order: &[&str], library: Option<&str>) -> Providers {
        let order = order.iter().map(|text| text.parse().unwrap()).collect();
        Providers { order, library: library.map(Into::into) }
    }

    #[test]
    fn a_provider_is_read_and_written_in_one_form() {
        let json = "openvino,load_config={\"CPU\":{\"A\":\"b\",\"C\":1}},num_streams=1";
        for text in
            ["cpu", "cuda", "cuda:1", "openvino:GPU.0,precision=FP16", "openvino:HETERO:GPU,CPU", "nvrtx,a=b=c", json]
        {
            assert_eq!(text.parse::<Provider>().unwrap().to_string(), text);
        }
        assert_eq!(json.parse::<Provider>().unwrap().options.len(), 2);
        assert_eq!("OpenVINO".parse::<Provider>().unwrap().name, ProviderName::OpenVino);
    }

    #[test]
    fn what_is_not_a_provider_is_refused() {
        for (text, expected) in [
            ("tpu", "`tpu` is not an execution provider, expected one of cpu, cuda,"),
            ("", "`` is not an execution provider"),
            ("cuda:", "the device is empty, expected cuda:DEVICE"),
            ("cuda,fast", "`cuda,fast` is not an execution provider"),
            ("cuda,=1", "`cuda,=1` is not an execution provider"),
            ("cuda,fast=", "the option fast has no value"),
            ("cpu:0", "cpu has no devices"),
            ("cpu,a=b", "cpu has no devices"),
        ] {
            let error = text.parse::<Provider>().unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_cpu_is_last_and_nothing_is_named_twice() {
        assert!(providers(&[], None).with_cpu() && providers(&["cpu"], None).with_cpu());
        assert!(providers(&["openvino", "cpu"], None).with_cpu() && !providers(&["openvino"], None).with_cpu());
        for valid in [providers(&["cuda", "cpu"], None), providers(&["openvino"], Some("plugin.so"))] {
            valid.check().unwrap();
        }
        for (wrong, expected) in [
            (providers(&["cpu", "cuda"], None), "cuda follows cpu"),
            (providers(&["cuda", "cuda:1"], None), "cuda is named twice"),
            (providers(&["cpu"], Some("plugin.so")), "the only provider is cpu"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
