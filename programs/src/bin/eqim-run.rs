//! See [`eqim_programs::run`].

use std::process::ExitCode;

fn main() -> ExitCode {
    eqim_programs::run::main(std::env::args_os()).into()
}
