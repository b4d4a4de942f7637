//! Trainings that several processes share.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::place::{MICRO, Place};
use crate::same;

/// Launcher of MPI, as `cargo xtask mpi` sets it.
const LAUNCHER: &str = "EQIM_TEST_MPIRUN";

/// Recipe of 20 steps with batches for four ranks, and more lines in both plans.
fn recipe(place: &Place, name: &str, more: &str) {
    let recipe = MICRO.replace("steps = 6", "steps = 20").replace("checkpoint_every = 3", "checkpoint_every = 10");
    let recipe = recipe.replace("batch_size = 9", "batch_size = 64").replace("batch_size = 3", "batch_size = 8");
    fs::write(place.path(name), recipe.replace("schedule =", &format!("{more}\nschedule ="))).unwrap();
}

fn tokenizer(more: &str) -> String {
    format!("tokenizer --images photos --recipe ranks.toml {more}")
}

fn generator(more: &str) -> String {
    format!("generator --images photos --tokenizer t/tokenizer.safetensors --recipe ranks.toml {more}")
}

/// A command that starts groups of ranks, each with its number of ranks, program and arguments.
fn launch(place: &Place, groups: &[(usize, &str)]) -> Command {
    let launcher = std::env::var_os(LAUNCHER).unwrap_or_else(|| panic!("{LAUNCHER} is not set: use cargo xtask mpi"));
    let mut command = Command::new(launcher);
    command.args(["--allow-run-as-root", "--oversubscribe"]).current_dir(place.path("")).stdin(Stdio::null());
    for (index, (ranks, line)) in groups.iter().enumerate() {
        command.args((index > 0).then_some(":")).args(["-n", &ranks.to_string()]).args(line.split(' '));
    }
    command
}

fn program(line: &str) -> String {
    format!("{} {line}", env!("CARGO_BIN_EXE_eqim-train"))
}

/// Runs a training on several ranks, which has to succeed.
fn trains(place: &Place, ranks: usize, line: &str) -> String {
    let output = launch(place, &[(ranks, &program(line))]).output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{ranks} ranks, {line}: {said}");
    said
}

/// Runs groups of ranks, which have to fail. Returns what they say.
fn fails(place: &Place, groups: &[(usize, &str)], code: i32) -> String {
    let output = launch(place, groups).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(code), "{groups:?}: {said}");
    said
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// Asserts that two runs have the same weights, moments and averages, bit for bit.
fn same_state(place: &Place, a: &str, b: &str) {
    let [a, b] = [a, b].map(|run| place.path(run).join("state.safetensors"));
    same(&a, &b);
}

#[test]
fn a_build_without_mpi_refuses_several_ranks() {
    if cfg!(feature = "mpi") {
        return;
    }
    let place = Place::new();
    let output = place.command("recipe").env("OMPI_COMM_WORLD_SIZE", "4").output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("4 processes: share a training, but this build is without MPI"), "{said}");
    assert!(place.command("recipe").env("OMPI_COMM_WORLD_SIZE", "1").output().unwrap().status.success());
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn processes_that_do_not_find_each_other_are_refused() {
    let place = Place::new();
    let output = place.command("recipe").env("SLURM_STEP_NUM_TASKS", "4").output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("4 processes: were started, but MPI finds 1: start them with mpirun"), "{said}");
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn ranks_train_as_one_process_does() {
    let place = Place::new();
    recipe(&place, "ranks.toml", "");
    recipe(&place, "sharded.toml", "shard_optimizer = true");
    let sharded = |line: String| line.replace("ranks.toml", "sharded.toml");
    place.trains(&tokenizer("-o t"));
    place.trains(&generator("-o g"));
    for ranks in [1, 2, 4] {
        let said = trains(&place, ranks, &tokenizer(&format!("-o t{ranks}")));
        assert_eq!(said.matches("6 photographs").count(), 1, "{said}");
        trains(&place, ranks, &sharded(tokenizer(&format!("-o ts{ranks}"))));
        trains(&place, ranks, &generator(&format!("-o g{ranks}")));
        trains(&place, ranks, &sharded(generator(&format!("-o gs{ranks}"))));
        for run in ["t", "ts", "g", "gs"] {
            same_state(&place, &run[..1], &format!("{run}{ranks}"));
        }
    }
    // Three ranks sum in another order.
    trains(&place, 3, &generator("-o g3 --steps 2"));
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn a_discriminator_is_trained_by_all_ranks() {
    let place = Place::new();
    recipe(&place, "plain.toml", "shard_optimizer = true");
    let text = fs::read_to_string(place.path("plain.toml")).unwrap();
    let adversarial = "[tokenizer]\ndiscriminator_weight = 0.1\ndiscriminator_channels = 8\ndiscriminator_start = 2\n";
    // The discriminator sees 32×32 pixels or more.
    let text = text.replacen("tokens = 4", "tokens = 8", 1);
    fs::write(place.path("ranks.toml"), format!("{adversarial}{text}")).unwrap();
    place.trains(&tokenizer("-o t --steps 6"));
    trains(&place, 4, &tokenizer("-o t4 --steps 6"));
    same_state(&place, "t", "t4");
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn another_number_of_ranks_resumes() {
    let place = Place::new();
    recipe(&place, "ranks.toml", "shard_optimizer = true");
    place.trains(&tokenizer("-o t --steps 10"));
    for (ranks, more) in [(4, "--steps 10"), (2, "--steps 15 --resume"), (1, "--steps 20 --resume")] {
        trains(&place, ranks, &generator(&format!("-o parts {more}")));
    }
    place.trains(&generator("-o whole"));
    same_state(&place, "whole", "parts");
    // A run that is finished can be resumed.
    trains(&place, 2, &generator("-o parts --resume"));
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn ranks_that_differ_are_named() {
    let place = Place::new();
    recipe(&place, "ranks.toml", "");
    recipe(&place, "other.toml", "clip = 0.5");
    let line = program(&tokenizer("-o t"));
    let said = fails(&place, &[(2, &line), (1, &line.replace("ranks.toml", "other.toml"))], 2);
    assert!(
        said.contains("error: rank 2 of 3: training: rank 0 has `clip = 1.0`, this rank has `clip = 0.5`"),
        "{said}"
    );
    assert_eq!(said.matches("error: ").count(), 1, "{said}");

    fs::create_dir_all(place.path("fewer/dusk")).unwrap();
    for index in 0..2 {
        fs::copy(place.path(&format!("photos/dusk/{index}.png")), place.path(&format!("fewer/dusk/{index}.png")))
            .unwrap();
    }
    let said = fails(&place, &[(1, &line), (1, &line.replace("--images photos", "--images fewer"))], 2);
    assert!(said.contains("error: rank 1 of 2: training: rank 0 has `photographs = "), "{said}");

    // An error that all ranks have is written once.
    let said = fails(&place, &[(4, &line.replace("ranks.toml", "missing.toml"))], 2);
    assert!(said.contains("error: rank 0 of 4: missing.toml"), "{said}");
    assert_eq!(said.matches("error: ").count(), 1, "{said}");

    let said = fails(&place, &[(4, &format!("{line} --batch-size 3"))], 2);
    assert!(said.contains("tokenizer.plan.batch_size: is 3, expected at least 4 for 4 ranks"), "{said}");
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn a_rank_that_cannot_write_ends_all() {
    let place = Place::new();
    recipe(&place, "ranks.toml", "");
    place.trains(&tokenizer("-o t --steps 1"));
    // Files of at most one block: latents are larger.
    let script = format!("trap '' XFSZ\nulimit -f 1\nexec {}\n", program(&generator("-o g")));
    fs::write(place.path("full.sh"), script).unwrap();
    let said = fails(&place, &[(1, &program(&generator("-o g"))), (1, "bash full.sh")], 1);
    assert!(said.contains("error: rank 1 of 2: ") && said.contains("g/latents/"), "{said}");
}

/// A training of many steps on three ranks, after its first steps, and the process of its last rank.
fn running(place: &Place) -> (Child, i32) {
    recipe(place, "ranks.toml", "timeout = 3");
    let mut run = launch(place, &[(3, &program(&tokenizer("-o t --steps 1000000")))]);
    let run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while fs::metadata(place.path("t/metrics.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "no step was taken");
        std::thread::sleep(Duration::from_millis(20));
    }
    let variable = |process: &Path| fs::read(process.join("environ")).unwrap_or_default();
    let is_last = |process: &Path| {
        let (environment, line) = (variable(process), fs::read(process.join("cmdline")).unwrap_or_default());
        let has = |text: &str| environment.split(|byte| *byte == 0).any(|it| it == text.as_bytes());
        let here = format!("PWD={}", place.path("").display());
        has("OMPI_COMM_WORLD_RANK=2")
            && has(here.trim_end_matches('/'))
            && line.starts_with(program("").trim().as_bytes())
    };
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let last: Vec<i32> = processes
        .filter(|process| is_last(process))
        .filter_map(|process| process.file_name()?.to_str()?.parse().ok())
        .collect();
    assert_eq!(last.len(), 1, "{last:?}");
    (run, last[0])
}

fn signal(process: i32, name: &str) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn a_rank_that_hangs_is_named_in_time() {
    let place = Place::new();
    let (run, last) = running(&place);
    let start = Instant::now();
    signal(last, "-STOP");
    let output = run.wait_with_output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}: {said}", start.elapsed());
    // The first rank knows which one hangs, unless it does so within an exchange.
    let named = said.contains("rank 2: did not answer within 3 s") || said.contains("one of them hangs");
    assert!(named, "{said}");
}

#[test]
#[ignore = "needs MPI: cargo xtask mpi"]
fn a_rank_that_is_killed_ends_all() {
    let place = Place::new();
    let (run, last) = running(&place);
    let start = Instant::now();
    signal(last, "-KILL");
    let output = run.wait_with_output().unwrap();
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}: {said}", start.elapsed());
    assert!(said.contains("rank 2"), "{said}");
}
