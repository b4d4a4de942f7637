//! See [`eqim_programs::bench`].

use std::process::ExitCode;

fn main() -> ExitCode {
    eqim_programs::bench::main(std::env::args_os()).into()
}
