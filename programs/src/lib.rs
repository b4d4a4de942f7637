//! The command-line programs as functions of their arguments. The executables in `src/bin/` and the console scripts of the
//! Python package call the same ones.

pub mod bench;
pub mod eval;
pub mod export;
pub mod run;
pub mod train;
