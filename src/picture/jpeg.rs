//! Finds out whether all pixels of a JPEG are there. The decoder replaces those that are missing without an error.

use std::borrow::Cow;
use std::collections::BTreeMap;

use image::{DynamicImage, ImageFormat};

/// End marker.
const END: [u8; 2] = [0xff, 0xd9];

/// Bytes that are put behind the data of a JPEG without an end. If pixels are missing, the decoder takes them from these
/// bytes, so the pictures differ.
const TAILS: [[u8; 256]; 2] = [[0x5a; 256], [0xc3; 256]];

/// Width and height in the header of a JPEG. `None` if it has none.
pub fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    Scans::of(bytes).size
}

/// The bytes of a JPEG whose pixels are all there, with an end marker. `None` if pixels are missing.
///
/// Cameras and web pages write zeros, text or nothing in the place of the end marker. A copy that was interrupted looks
/// the same, except that data of the pixels are missing.
pub fn completed(bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    let scans = Scans::of(bytes);
    if scans.has_end {
        return Some(bytes.into());
    }
    if !scans.have_all_coefficients() {
        return None;
    }
    let data = without_filling(bytes);
    let with = |tail: &[u8]| [data, tail, &END].concat();
    let whole = with(&[]);
    let picture = decoded(&whole)?;
    TAILS.iter().all(|tail| decoded(&with(tail)).as_ref() == Some(&picture)).then(|| whole.into())
}

fn decoded(bytes: &[u8]) -> Option<DynamicImage> {
    image::load_from_memory_with_format(bytes, ImageFormat::Jpeg).ok()
}

/// The bytes without the zeros and fill bytes at their end.
fn without_filling(bytes: &[u8]) -> &[u8] {
    let mut end = bytes.iter().rposition(|byte| !matches!(byte, 0 | 0xff)).map_or(0, |last| last + 1);
    // In the data, a byte 0xff is followed by a zero.
    while bytes[end..].starts_with(&[0xff, 0]) {
        end += 2;
    }
    &bytes[..end]
}

/// The scans of a JPEG.
#[derive(Default)]
struct Scans {
    /// Whether there is an end marker behind the last scan.
    has_end: bool,
    /// Width and height of the picture.
    size: Option<(u32, u32)>,
    /// The coefficients of each component that have all their bits, as a bit mask.
    coefficients: BTreeMap<u8, u64>,
}

impl Scans {
    /// Walks through the segments.
    fn of(bytes: &[u8]) -> Self {
        let (mut scans, mut at) = (Self::default(), 2);
        while let Some(&[0xff, marker, ..]) = bytes.get(at..) {
            match marker {
                0xd9 => return Self { has_end: true, ..scans },
                // Fill bytes, and markers without a length.
                0xff => at += 1,
                0x01 | 0xd0..=0xd8 => at += 2,
                _ => {
                    let Some(&[high, low, ..]) = bytes.get(at + 2..) else { return scans };
                    let end = at + 2 + usize::from(u16::from_be_bytes([high, low]));
                    let segment = bytes.get(at + 4..end).unwrap_or_default();
                    at = end;
                    match marker {
                        0xc4 | 0xc8 | 0xcc => {}
                        0xc0..=0xcf => scans.add_frame(segment),
                        0xda => {
                            scans.add_scan(segment);
                            at += data_length(bytes.get(at..).unwrap_or_default());
                        }
                        _ => {}
                    }
                }
            }
        }
        scans
    }

    /// Adds the size and the components of the picture. The segment holds its precision, height and width, the number of
    /// components, and three bytes for each.
    fn add_frame(&mut self, segment: &[u8]) {
        if let Some(&[high, low, left, right]) = segment.get(1..5) {
            let side = |bytes| u32::from(u16::from_be_bytes(bytes));
            self.size = Some((side([left, right]), side([high, low])));
        }
        for component in segment.get(6..).unwrap_or_default().chunks_exact(3) {
            self.coefficients.entry(component[0]).or_default();
        }
    }

    /// Adds the coefficients of a scan. The segment holds the number of components, two bytes for each, the first and
    /// the last coefficient, and the number of the bits that later scans add.
    fn add_scan(&mut self, segment: &[u8]) {
        let Some((&count, rest)) = segment.split_first() else { return };
        let Some((components, &[first, last, bits])) = rest.split_at_checked(2 * usize::from(count)) else { return };
        if first > last || last > 63 || bits & 0xf != 0 {
            return;
        }
        let mask = (u64::MAX >> (63 - (last - first))) << first;
        for component in components.chunks_exact(2) {
            *self.coefficients.entry(component[0]).or_default() |= mask;
        }
    }

    fn have_all_coefficients(&self) -> bool {
        !self.coefficients.is_empty() && self.coefficients.values().all(|mask| *mask == u64::MAX)
    }
}

/// Length of compressed data: up to a marker that is neither a stuffed byte nor a restart.
fn data_length(bytes: &[u8]) -> usize {
    let is_end = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7);
    bytes.windows(2).position(is_end).unwrap_or(bytes.len())
}

#[cfg(test)]
mod tests {
    use image::codecs::jpeg::JpegEncoder;
    use image::{Rgb, RgbImage};

    use super::*;

    /// A JPEG with its end marker.
    fn jpeg(width: u32, height: u32) -> Vec<u8> {
        let picture = RgbImage::from_fn(width, height, |x, y| Rgb([(7 * x) as u8, (5 * y) as u8, (x * y) as u8]));
        let mut bytes = vec![];
        JpegEncoder::new_with_quality(&mut bytes, 90).encode_image(&picture).unwrap();
        assert!(bytes.ends_with(&END));
        bytes
    }

    #[test]
    fn odd_ends_do_not_matter() {
        let whole = jpeg(40, 24);
        let data = &whole[..whole.len() - 2];
        let pixels = decoded(&whole).unwrap();
        let ends: [&[u8]; 6] = [
            &[],
            &[0; 512],
            b"<html>a page</html>",
            &[0xff; 9],
            &[0xff, 0xff, 0xff, 0xd9],
            b"\xff\xd9moov\xff\xda\x01",
        ];
        for end in ends {
            let bytes = [data, end].concat();
            let completed = completed(&bytes).unwrap_or_else(|| panic!("{end:?}"));
            assert!(decoded(&completed).unwrap() == pixels, "{end:?}");
        }
    }

    #[test]
    fn missing_pixels_are_found() {
        let whole = jpeg(40, 24);
        let data = whole.len() - 2;
        for length in [0, 2, 20, 200, data / 2, data - 20, data - 4] {
            for filling in [0, 512] {
                let bytes = [&whole[..length], &vec![0; filling]].concat();
                assert!(completed(&bytes).is_none(), "{length} of {data} bytes and {filling} zeros");
            }
        }
    }

    #[test]
    fn a_progressive_jpeg_needs_all_scans() {
        let (frame, start) = (b"\xff\xd8\xff\xc2\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00", |first, last, bits| {
            [0xff, 0xda, 0, 8, 1, 1, 0, first, last, bits, 0x12]
        });
        let scans = [start(0, 0, 0), start(1, 63, 1), start(1, 63, 0x10)];
        for count in 0..=3 {
            let bytes = [&frame[..], &scans[..count].concat()].concat();
            assert_eq!(Scans::of(&bytes).have_all_coefficients(), count == 3);
        }
    }
}
