//! What the workspace promises as a whole, tested on the fixtures: one program, so that Cargo links once.

mod common;

mod batch;
mod bench;
mod classes;
mod demo;
mod end_to_end;
mod examples;
mod hostile;
mod int8;
mod jobs;
mod outpainting;
mod parity;
mod properties;
mod tensorrt;
mod texts;
mod tiles;
mod trace;
