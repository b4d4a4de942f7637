//! A build without MPI has no other ranks.

/// The ranks of MPI, which this build does not have.
#[derive(Debug)]
pub enum World {}

// The functions of the other `World`, which nobody can call.
impl World {
    pub fn join() -> Result<Self, String> {
        Err("share a training, but this build is without MPI: build eqim-train with `--features mpi`".into())
    }

    pub fn rank(&self) -> usize {
        match *self {}
    }

    pub fn size(&self) -> usize {
        match *self {}
    }

    pub fn local(&self) -> usize {
        match *self {}
    }

    pub fn call(&self, _: usize) {
        match *self {}
    }

    pub fn has_called(&self, _: usize) -> bool {
        match *self {}
    }

    pub fn sum<T>(&self, _: &mut [T]) {
        match *self {}
    }

    pub fn swap(&self, _: usize, _: &[f32], _: &mut [f32]) {
        match *self {}
    }

    pub fn broadcast<T>(&self, _: usize, _: &mut [T]) {
        match *self {}
    }

    pub fn send(&self, _: usize, _: &[f32]) {
        match *self {}
    }

    pub fn receive(&self, _: usize, _: &mut [f32]) {
        match *self {}
    }

    pub fn abort(&self, _: u8) {
        match *self {}
    }
}
