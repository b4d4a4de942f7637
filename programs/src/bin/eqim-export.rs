//! See [`eqim_programs::export`].

use std::process::ExitCode;

fn main() -> ExitCode {
    eqim_programs::export::main(std::env::args_os()).into()
}
