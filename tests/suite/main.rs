//! Tests of the workspace as a whole, on the fixtures. They are one program, so that Cargo links once.

mod common;

mod batch;
mod bench;
mod checkpoints;
mod classes;
mod demo;
mod end_to_end;
mod eval;
mod examples;
mod gpu;
mod hostile;
mod int8;
mod io;
mod jobs;
mod kernels;
mod outpainting;
mod parity;
mod properties;
mod providers;
mod scheduler;
mod serve;
mod tensorrt;
mod texts;
mod tiles;
mod trace;
