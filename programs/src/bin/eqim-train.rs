//! See [`eqim_programs::train`].

use std::process::ExitCode;

use mimalloc::MiMalloc;

// Every step allocates and frees gigabytes of tensors. The system allocator returns their pages to the kernel each time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    eqim_programs::train::main(std::env::args_os()).into()
}
