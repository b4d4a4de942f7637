//! Writes animated PNGs (<https://www.w3.org/TR/png-3/#apng-frame-based-animation>) frame by frame.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use ndarray::Array3;

use crate::picture::bytes;
use crate::{Error, Result, files};

/// Frames per second.
const RATE: u16 = 6;
/// Duration of the last frame in seconds.
const PAUSE: u16 = 2;

/// Writes `count` frames, each `[3, height, width]` with values in -1..1, as an animation that repeats forever. `frame`
/// is called with the index of one frame after another. `path` is replaced only once the file is complete.
///
/// # Errors
/// [`Error::run`] if the file cannot be written; errors of `frame`.
pub fn write(
    path: &Path,
    (width, height): (usize, usize),
    count: usize,
    mut frame: impl FnMut(usize) -> Result<Array3<f32>>,
) -> Result<()> {
    let failed = |error: png::EncodingError| Error::run(path.display(), "cannot be written").because(error);
    files::write_beside(path, |beside| {
        let file = File::create(beside).map_err(|error| failed(error.into()))?;
        let mut encoder = png::Encoder::new(BufWriter::new(file), width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_animated(count as u32, 0).map_err(failed)?;
        encoder.set_frame_delay(1, RATE).map_err(failed)?;
        let mut writer = encoder.write_header().map_err(failed)?;
        for index in 0..count {
            if index + 1 == count {
                writer.set_frame_delay(PAUSE, 1).map_err(failed)?;
            }
            writer.write_image_data(&bytes(frame(index)?.view())).map_err(failed)?;
        }
        writer.finish().map_err(failed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let frame = |index: usize| Array3::from_shape_fn((3, 2, 5), |(c, y, x)| ((c + y + x + index) as f32).sin());
        write(&path, (5, 2), 3, |index| Ok(frame(index))).unwrap();
        let mut reader = png::Decoder::new(std::io::BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let control = reader.info().animation_control.unwrap();
        assert_eq!((control.num_frames, control.num_plays), (3, 0));
        for index in 0..3 {
            let mut found = vec![0; 3 * 2 * 5];
            reader.next_frame(&mut found).unwrap();
            assert_eq!(found, bytes(frame(index).view()), "frame {index}");
        }
        let stopped = write(&folder.path().join("b.png"), (5, 2), 2, |_| Err(Error::run("frame", "is missing")));
        assert!(stopped.is_err() && !folder.path().join("b.png").exists());
    }
}
