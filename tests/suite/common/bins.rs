//! Runs the programs of the workspace from the command line.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::Fixture;

/// Time limit of a program, far longer than any run on the fixtures. A program that hangs fails its test.
const PATIENCE: Duration = Duration::from_secs(120);

/// Path of the program or example `name`. All programs are built first, because Cargo builds only the programs of the
/// test's own package.
pub fn program(name: &str) -> &'static Path {
    static PROGRAMS: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    PROGRAMS.get_or_init(build).get(name).unwrap_or_else(|| panic!("no program {name}"))
}

fn build() -> BTreeMap<String, PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args([
        "build",
        // The whole workspace, with targets that need development dependencies: Cargo unifies features as for the tests, and
        // compiles no dependency twice.
        "--workspace",
        "--bins",
        "--examples",
        "--message-format=json-render-diagnostics",
    ]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    if eqim_engines::trt::ENABLED {
        cargo.args(["--features", "tensorrt"]);
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let messages = messages.map(|line| serde_json::from_slice::<serde_json::Value>(line).unwrap());
    let executables = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    executables.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_string(), path)).collect()
}

/// A temporary folder that programs run in, so that their command lines stay short.
pub struct Workplace {
    folder: TempDir,
    /// What programs said when they [refused](Workplace::refused) a command line.
    messages: RefCell<String>,
}

/// Result of a program that has ended.
pub struct Finished {
    line: String,
    code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Length and modification time of every file in a folder; `None` for subfolders.
type Listing = BTreeMap<PathBuf, Option<(u64, SystemTime)>>;

impl Workplace {
    /// A folder with nothing in it.
    pub fn empty() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), messages: RefCell::default() }
    }

    /// A folder with a fixture's `generator.pth` and `tokenizer.ckpt`.
    pub fn new(fixture: &Fixture) -> Self {
        let place = Self::empty();
        for file in ["generator.pth", "tokenizer.ckpt"] {
            std::fs::copy(fixture.folder.join(file), place.path(file)).unwrap();
        }
        place
    }

    /// A folder that also has the `bundle` of the fixture.
    pub fn with_bundle(fixture: &Fixture) -> Self {
        let place = Self::new(fixture);
        place.run(&format!("{} --no-validate -o bundle", export_line(fixture))).succeeded();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Runs a command line: a program, and arguments that do not contain spaces.
    pub fn run(&self, line: &str) -> Finished {
        self.run_with(line, &[])
    }

    /// Runs a command line with these environment variables.
    pub fn run_with(&self, line: &str, variables: &[(&str, &str)]) -> Finished {
        let mut words = line.split(' ');
        let mut command = assert_cmd::Command::new(program(words.next().unwrap()));
        command.args(words).envs(variables.iter().copied()).current_dir(self.folder.path()).timeout(PATIENCE);
        let output = command.output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        Finished { line: line.into(), code: output.status.code(), stdout, stderr }
    }

    /// Asserts that a command line fails with exit code 2 and changes no file. The message is compared with a snapshot:
    /// [`Workplace::messages`].
    #[track_caller]
    pub fn refused(&self, line: &str) {
        let before = self.listing();
        let message = self.run(line).failed(2, &[]).stderr;
        assert_eq!(before, self.listing(), "{line}: left something behind");
        let mut messages = self.messages.borrow_mut();
        if !messages.contains(&message) {
            *messages += &format!("$ {line}\n{message}\n");
        }
    }

    /// Takes the messages of all command lines that were refused: each message once, below the first of its command lines.
    pub fn messages(&self) -> String {
        let folder = self.folder.path().display().to_string();
        self.messages.take().replace(&folder, "[folder]").trim_end().to_string()
    }

    /// Names in a subfolder, sorted.
    pub fn listing_of(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// All files and subfolders, at every depth.
    pub fn listing(&self) -> Listing {
        let (mut listing, mut folders) = (Listing::new(), vec![self.folder.path().to_path_buf()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                let metadata = entry.metadata().unwrap();
                if metadata.is_dir() {
                    folders.push(entry.path());
                }
                let file = metadata.is_file().then(|| (metadata.len(), metadata.modified().unwrap()));
                listing.insert(entry.path(), file);
            }
        }
        listing
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        let messages = self.messages.take();
        assert!(messages.is_empty() || std::thread::panicking(), "messages without a snapshot:\n{messages}");
    }
}

impl Finished {
    /// Asserts that the program succeeded.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        self.ended(Some(0));
        self
    }

    /// Asserts that the program failed with exit code `code` and a message on standard error that contains `mentions`.
    #[track_caller]
    pub fn failed(self, code: i32, mentions: &[&str]) -> Self {
        self.ended(Some(code));
        for mention in mentions {
            assert!(self.stderr.contains(mention), "{}: no {mention:?} in {:?}", self.line, self.stderr);
        }
        self
    }

    #[track_caller]
    fn ended(&self, code: Option<i32>) {
        let Self { line, stdout, stderr, .. } = self;
        assert!(self.code == code && !stderr.contains("panicked"), "{line}: {:?}\n{stdout}\n{stderr}", self.code);
    }
}

/// The command line that exports a fixture, without `--output`.
pub fn export_line(fixture: &Fixture) -> String {
    format!("eqim-export onnx --generator generator.pth --tokenizer tokenizer.ckpt --heads {}", fixture.heads)
}
