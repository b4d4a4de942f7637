//! Registration of execution providers with ONNX Runtime.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use eqim::{Error, Result};
use ort::device::Device;
use ort::environment::Environment;
use ort::ep::{self, ArbitrarilyConfigurableExecutionProvider, ExecutionProvider, ExecutionProviderDispatch};
use ort::memory::{AllocationDevice, DeviceType};
use ort::session::builder::SessionBuilder;

use super::failure::failed;
use super::provider::{Provider, ProviderName, Providers};

/// Adds the execution providers to a session. `threads` limits the threads of those that run on a CPU.
///
/// # Errors
/// [`Error::input`] if ONNX Runtime or the library does not have a provider or a device; [`Error::run`] if a provider
/// does not start.
pub(super) fn register(
    environment: &Environment,
    mut builder: SessionBuilder,
    providers: &Providers,
    threads: Option<usize>,
) -> Result<SessionBuilder> {
    if let Some(library) = &providers.library {
        load(environment, library)?;
    }
    for provider in providers.accelerators() {
        let refused = |error: String| Error::run(format!("provider {provider}"), error);
        if is_built_in(provider.name).map_err(failed("ONNX Runtime"))? {
            let dispatch = built_in(provider, &options(provider, threads))?;
            builder = builder.with_execution_providers([dispatch]).map_err(|error| refused(error.to_string()))?;
        } else if let Some(library) = &providers.library {
            let device = device_of(environment, provider, library)?;
            // `ort` gives a provider the options that begin with its name.
            let prefix = provider.name.in_onnxruntime();
            let options = options(provider, threads).into_iter();
            let options: Vec<_> = options.map(|(key, value)| (format!("{prefix}.{key}"), value)).collect();
            builder = builder.with_devices([device], Some(&options)).map_err(|error| refused(error.to_string()))?;
        } else {
            let problem = format!("{} is not part of this ONNX Runtime: {}", provider.name, source(provider.name));
            return Err(Error::setting("provider", problem));
        }
    }
    Ok(builder)
}

/// Loads the library of execution providers, once per process.
fn load(environment: &Environment, library: &Path) -> Result<()> {
    static LOADED: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    // Without a slash, the name of a library would be searched in the folders of the system.
    let path = std::path::absolute(library).map_err(|error| Error::input_caused(library.display(), error))?;
    if loaded.contains(&path) {
        return Ok(());
    }
    if !path.is_file() {
        return Err(Error::input(
            library.display(),
            "is not a file, expected the shared library of an execution provider",
        ));
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    environment.register_ep_library(name, &path).map_err(|error| {
        Error::input(library.display(), "cannot be used as a library of execution providers").because(error)
    })?;
    loaded.push(path);
    Ok(())
}

/// The device of a library's execution provider.
fn device_of<'a>(environment: &'a Environment, provider: &Provider, library: &Path) -> Result<Device<'a>> {
    let name = provider.name.in_onnxruntime();
    let all: Vec<_> =
        environment.devices().filter(|device| device.ep().is_ok_and(|ep| ep != "CPUExecutionProvider")).collect();
    let kinds: Vec<_> = all.iter().filter(|device| device.ep().is_ok_and(|ep| ep == name)).map(kind).collect();
    let found = all.into_iter().filter(|device| device.ep().is_ok_and(|ep| ep == name));
    let chosen = match provider.device.as_deref() {
        None => found.into_iter().next(),
        Some(wanted) => match wanted.parse::<usize>() {
            Ok(index) => found.into_iter().nth(index),
            Err(_) => found.into_iter().find(|device| kind(device).eq_ignore_ascii_case(wanted)),
        },
    };
    chosen.ok_or_else(|| {
        let offered = if kinds.is_empty() {
            "it offers none for the processors of this machine".into()
        } else {
            format!("expected a number below {} or one of {}", kinds.len(), kinds.join(", "))
        };
        let wanted = provider.device.as_ref().map_or(String::new(), |device| format!(" {device}"));
        Error::input(library.display(), format!("has no device{wanted} for {}: {offered}", provider.name))
    })
}

fn kind(device: &Device) -> &'static str {
    match device.hardware_device().ty() {
        DeviceType::CPU => "CPU",
        DeviceType::GPU => "GPU",
        DeviceType::FPGA => "FPGA",
        DeviceType::NPU => "NPU",
    }
}

/// All options of a provider. What the user gave replaces what follows from other settings.
fn options(provider: &Provider, threads: Option<usize>) -> BTreeMap<String, String> {
    let threads = threads_option(provider.name).zip(threads.map(|threads| threads.to_string()));
    let chosen = |key: &str| provider.options.iter().any(|(found, _)| found == key);
    // OpenVINO computes in FP16 on a GPU, unless it is told to keep the precision of the graph.
    let precision = (provider.name == ProviderName::OpenVino && !chosen("load_config"))
        .then(|| ("precision", "ACCURACY".to_string()));
    let implied = [threads, precision].into_iter().flatten().map(|(key, value)| (key.to_string(), value));
    implied.chain(provider.options.iter().cloned()).collect()
}

/// The option for the number of threads, if a provider runs on the CPU.
fn threads_option(name: ProviderName) -> Option<&'static str> {
    match name {
        ProviderName::OpenVino => Some("num_of_threads"),
        ProviderName::Xnnpack => Some("intra_op_num_threads"),
        _ => None,
    }
}

/// Where a device's memory is, if it is not the memory of the CPU.
pub(super) fn memory(provider: &Provider) -> Option<(AllocationDevice<'static>, i32)> {
    let device = match provider.name {
        ProviderName::Cuda | ProviderName::NvRtx => AllocationDevice::CUDA,
        ProviderName::Rocm => AllocationDevice::HIP,
        ProviderName::DirectMl => AllocationDevice::DIRECTML,
        ProviderName::WebGpu => AllocationDevice::WEBGPU_BUFFER,
        ProviderName::Cpu
        | ProviderName::MiGraphX
        | ProviderName::OpenVino
        | ProviderName::CoreMl
        | ProviderName::Xnnpack => return None,
    };
    Some((device, provider.device.as_ref().and_then(|device| device.parse().ok()).unwrap_or_default()))
}

fn is_built_in(name: ProviderName) -> ort::Result<bool> {
    match name {
        ProviderName::Cpu => ep::CPU::is_available(),
        ProviderName::Cuda => ep::CUDA::is_available(),
        ProviderName::Rocm => ep::ROCm::is_available(),
        ProviderName::MiGraphX => ep::MIGraphX::is_available(),
        ProviderName::OpenVino => ep::OpenVINO::is_available(),
        ProviderName::CoreMl => ep::CoreML::is_available(),
        ProviderName::DirectMl => ep::DirectML::is_available(),
        ProviderName::Xnnpack => ep::XNNPACK::is_available(),
        ProviderName::WebGpu => ep::WebGPU::is_available(),
        ProviderName::NvRtx => ep::NVRTX::is_available(),
    }
}

/// A provider that is part of ONNX Runtime.
fn built_in(provider: &Provider, options: &BTreeMap<String, String>) -> Result<ExecutionProviderDispatch> {
    let refused = |problem: String| Error::setting("provider", format!("{provider}: {problem}"));
    let index = || match provider.device.as_deref().map(str::parse::<i32>) {
        None => Ok(0),
        Some(Ok(index)) if index >= 0 => Ok(index),
        Some(_) => Err(refused(format!("the device of {} is a number from 0", provider.name))),
    };
    let no_options = || match options.keys().next() {
        None => Ok(()),
        Some(key) => Err(refused(format!("{} has no option {key}", provider.name))),
    };
    let no_device = || match &provider.device {
        None => Ok(()),
        Some(_) => Err(refused(format!("{} has no devices", provider.name))),
    };
    let word = |default: &str| provider.device.clone().unwrap_or_else(|| default.into());
    let dispatch = match provider.name {
        ProviderName::Cpu => ep::CPU::default().into(),
        ProviderName::Cuda => set(ep::CUDA::default().with_device_id(index()?), options).into(),
        ProviderName::Rocm => set(ep::ROCm::default().with_device_id(index()?), options).into(),
        ProviderName::MiGraphX => {
            no_options()?;
            ep::MIGraphX::default().with_device_id(index()?).into()
        }
        ProviderName::OpenVino => set(ep::OpenVINO::default().with_device_type(word("CPU")), options).into(),
        ProviderName::CoreMl => {
            let units = [("MLComputeUnits".to_string(), word("ALL"))].into();
            set(set(ep::CoreML::default(), &units), options).into()
        }
        ProviderName::DirectMl => {
            no_options()?;
            ep::DirectML::default().with_device_id(index()?).into()
        }
        ProviderName::Xnnpack => {
            no_device()?;
            set(ep::XNNPACK::default(), options).into()
        }
        ProviderName::WebGpu => set(ep::WebGPU::default().with_device_id(index()?), options).into(),
        ProviderName::NvRtx => set(ep::NVRTX::default().with_device_id(index()?.unsigned_abs()), options).into(),
    };
    let dispatch: ExecutionProviderDispatch = dispatch;
    Ok(dispatch.error_on_failure())
}

fn set<E: ArbitrarilyConfigurableExecutionProvider>(provider: E, options: &BTreeMap<String, String>) -> E {
    options.iter().fold(provider, |provider, (key, value)| provider.with_arbitrary_config(key, value))
}

/// Where to get a provider.
fn source(name: ProviderName) -> &'static str {
    match name {
        ProviderName::Cpu => "every ONNX Runtime has it",
        ProviderName::Cuda => "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-gpu",
        ProviderName::Rocm => "point ORT_DYLIB_PATH at the library of AMD's build of ONNX Runtime for ROCm",
        ProviderName::MiGraphX => "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-migraphx",
        ProviderName::OpenVino => {
            "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-openvino, or give the provider's \
             library, for example that of onnxruntime-ep-openvino"
        }
        ProviderName::CoreMl => "point ORT_DYLIB_PATH at the library of the Python package onnxruntime for macOS",
        ProviderName::DirectMl => "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-directml",
        ProviderName::Xnnpack => "point ORT_DYLIB_PATH at a library that was built with --use_xnnpack",
        ProviderName::WebGpu => {
            "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-webgpu, or give the provider's \
             library, for example that of onnxruntime-ep-webgpu"
        }
        ProviderName::NvRtx => {
            "give the provider's library, for example that of the Python package onnxruntime-ep-nv-tensorrt-rtx"
        }
    }
}
