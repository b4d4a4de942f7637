//! See [`eqim_programs::eval`].

use std::process::ExitCode;

fn main() -> ExitCode {
    eqim_programs::eval::main(std::env::args_os()).into()
}
