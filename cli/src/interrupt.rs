//! What the programs do on SIGINT (Ctrl-C) and SIGTERM: they remove their temporary files and end.

#[cfg(unix)]
pub(crate) use unix::{start, wait_if_interrupted};

#[cfg(unix)]
mod unix {
    use std::sync::atomic::{AtomicBool, Ordering};

    use eqim::{Result, ResultExt, temporary};
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level;

    static INTERRUPTED: AtomicBool = AtomicBool::new(false);

    /// Starts the thread that waits for a signal. It ends the process with exit code 128 and the number of the signal,
    /// as shells report it.
    ///
    /// # Errors
    /// [`eqim::Error::run`] if the system has no thread left.
    pub(crate) fn start() -> Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM]).or_run("signals")?;
        let wait = move || {
            if let Some(signal) = signals.forever().next() {
                INTERRUPTED.store(true, Ordering::SeqCst);
                // The other threads still work, so the process ends without destructors of native libraries.
                temporary::remove_all(|| low_level::exit(128 + signal));
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop).or_run("signals")
    }

    /// Waits for the end of the process if a signal has arrived. Without its temporary files the work fails, and its
    /// message would mislead.
    pub(crate) fn wait_if_interrupted() {
        while INTERRUPTED.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
}

/// Other systems end the process.
#[cfg(not(unix))]
pub(crate) fn start() -> eqim::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
pub(crate) fn wait_if_interrupted() {}
