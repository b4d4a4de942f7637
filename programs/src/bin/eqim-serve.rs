//! See [`eqim_serve`].

use std::process::ExitCode;

fn main() -> ExitCode {
    eqim_serve::main(std::env::args_os()).into()
}
