//! cli (stand-in until the helper's version lands)

/// Runs a program and turns its result into an exit code.
pub fn main(run: impl FnOnce() -> eqim::Result<()>) -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code().into()
        }
    }
}
