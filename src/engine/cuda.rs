//! Settings of an NVIDIA GPU as a device of Candle.

use candle_core::cuda::cudarc::driver::{result, sys};
use candle_core::{Device, Error, Result};

/// Configures a GPU that was opened with one stream for all threads.
///
/// # Errors
/// If the device is no GPU, or if the driver refuses a setting.
pub fn configure(device: &Device) -> Result<()> {
    let gpu = device.as_cuda_device()?;
    // SAFETY: no tensor is used in two streams, because there is only one.
    unsafe { gpu.disable_event_tracking() };
    // By default every transfer from the GPU gives freed memory back to the driver, and the next step waits for new memory.
    let mut kept = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the GPU is that of a context, its pool is valid as long as the GPU, and the attribute is a 64-bit number.
    unsafe {
        let pool =
            result::device::get_default_mem_pool(gpu.cuda_stream().context().cu_device()).map_err(Error::wrap)?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut kept).cast()).map_err(Error::wrap)
    }
}
