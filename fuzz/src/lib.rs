//! Tries the readers of eqim on hostile and mutated inputs: each input is read, or refused by a message that names the
//! file, in bounded time and memory.
//!
//! A [`Target`] is a reader with inputs that it accepts, its seeds, and with hostile inputs. [`Guard::run`](runner::Guard::run) mutates
//! the seeds. A mutation depends only on the seed of the run, the target and the number of the case, so each case can be
//! repeated alone.

pub mod mutate;
pub mod runner;
pub mod small;
pub mod target;
pub mod targets;
pub mod torch;

pub use target::Target;
