//! Lines of jobs, and names of classes.

use std::path::{Path, PathBuf};

use eqim::generate::memory::check_memory;
use eqim::request::jobs::{self, Line, check_id};
use eqim::{Config, Result};

use super::{Place, write};
use crate::small;
use crate::target::{Hostile, Target};

/// All targets with requests.
pub(super) fn all() -> Result<Vec<Box<dyn Target>>> {
    let place = Place::new()?;
    let path = place.path("jobs.jsonl");
    Ok(vec![
        Box::new(Jobs { _place: place, path, config: small::config() }),
        Box::new(ClassNames { config: small::config() }),
    ])
}

/// Reads a file of jobs, and makes their requests.
struct Jobs {
    _place: Place,
    path: PathBuf,
    config: Config,
}

impl Target for Jobs {
    fn name(&self) -> &'static str {
        "jobs"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        let all =
            br#"{"id": "a", "class": 1, "tokens": 16, "seed": 7, "cfg": 3.5, "cfg_schedule": "linear", "steps": 4}
{"class": ["water", "none"], "width": 32, "solver": "heun", "prefix": "start.png", "direction": "left"}
{"id": 3, "classes": "forest:0-8,sky:6-", "tokens": 40, "tile": 8, "overlap": 2, "keep_prefix_pixels": false}
"#;
        vec![all.to_vec(), b"\xef\xbb\xbf{\"class\": \"sky\"}\r\n\r\n".to_vec()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        let long = format!("{{\"class\": {:?}}}", "x".repeat(1 << 20));
        let spans: Vec<String> = (0..100_000).map(|token| format!("1:{token}-{}", token + 1)).collect();
        vec![
            ("a long name", long.into_bytes()),
            ("100000 spans", format!("{{\"tokens\": 100000, \"classes\": \"{}\"}}", spans.join(",")).into_bytes()),
            ("two million lines", b"{}\n".repeat(2 << 20)),
            ("nested lists", [b"{\"class\": ".to_vec(), b"[".repeat(1 << 20)].concat()),
            ("UTF-16", b"\xff\xfe{\0}\0".to_vec()),
            ("a huge image", br#"{"tokens": 18446744073709551615, "steps": 18446744073709551615}"#.to_vec()),
        ]
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        write(&self.path, input)?;
        let text = jobs::read(&self.path)?;
        for line in Line::all(&self.path, &text)? {
            let read = line.read().and_then(|(id, settings)| {
                check_id(&id)?;
                check_memory(&settings.request(&self.config)?, &self.config, None)
            });
            read.map_err(|error| error.about(format!("{} line {}", self.path.display(), line.number)))?;
        }
        Ok(String::new())
    }
}

/// Names the classes of the small model.
struct ClassNames {
    config: Config,
}

impl Target for ClassNames {
    fn name(&self) -> &'static str {
        "class-names"
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        vec![b"tench\ngoldfish\nwhite shark\n".to_vec(), b"\xef\xbb\xbfa\r\nb\r\na\r\n\r\n".to_vec()]
    }

    fn hostile(&self) -> Vec<Hostile> {
        vec![("a million names", b"crane\n".repeat(1 << 20)), ("one long name", vec![b'x'; 1 << 20])]
    }

    fn path(&self) -> Option<&Path> {
        None
    }

    fn read(&mut self, input: &[u8]) -> Result<String> {
        let mut generator = self.config.generator.clone();
        generator.name_classes(&String::from_utf8_lossy(input))?;
        Ok(String::new())
    }
}
