//! How the process is told to end: the first SIGTERM or SIGINT asks to finish what is under way, a second one
//! not to.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Finish what is under way.
    Drain,
    /// End at once.
    Now,
}

/// SIGTERM and SIGINT, blocked and waiting to be taken.
#[derive(Debug)]
pub struct StopSignals(SigSet);

impl StopSignals {
    /// Blocks the signals for this thread and those it starts. To be called before any thread is started: one
    /// that does not block them would be killed by them, and the process with it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn block() -> io::Result<StopSignals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        Ok(StopSignals(set))
    }

    /// Starts a thread that calls `on_stop` for each signal. It ends with the process.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn watch(self, mut on_stop: impl FnMut(Stop) + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let mut stop = Stop::Drain;
            while self.0.wait().is_ok() {
                on_stop(stop);
                stop = Stop::Now;
            }
        })?;
        Ok(())
    }
}
