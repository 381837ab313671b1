//! Which processors the shards' threads are pinned to.

use std::fmt;
use std::io;
use std::str::FromStr;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use thiserror::Error;

/// Threads if nobody says how many.
const THREADS_DEFAULT: usize = 2;

/// A list of processors as `taskset -c` takes it: `0,2-3`. Ascending, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

/// Why a list of processors is none, or cannot be used.
#[derive(Debug, Error)]
pub enum AffinityError {
    /// Not a list.
    #[error("{0:?} is not a list of processors like 0,2-3")]
    Malformed(String),
    /// A processor that the process may not use.
    #[error("processor {cpu} is outside the process's affinity mask ({allowed})")]
    NotAllowed {
        /// The processor asked for.
        cpu: usize,
        /// What there is.
        allowed: CpuList,
    },
    /// The kernel does not tell or take the mask.
    #[error("affinity mask: {0}")]
    Kernel(#[from] io::Error),
}

impl FromStr for CpuList {
    type Err = AffinityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || AffinityError::Malformed(text.to_owned());
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |digits: &str| {
                let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
                digits.parse::<usize>().ok().filter(|cpu| plain && *cpu < CpuSet::count())
            };
            let (first, last) = (number(first).ok_or_else(malformed)?, number(last).ok_or_else(malformed)?);
            if first > last {
                return Err(malformed());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(CpuList(cpus))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, cpu) in self.0.iter().enumerate() {
            write!(f, "{}{cpu}", if position == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl CpuList {
    /// The processors that the process may use.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn allowed() -> Result<CpuList, AffinityError> {
        let set = sched_getaffinity(Pid::from_raw(0)).map_err(io::Error::from)?;
        Ok(CpuList((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// One processor per thread: of those wished for, else of those allowed. More threads than processors share
    /// them in turn. Without a number of threads: one for each processor wished for, else one or two.
    ///
    /// # Errors
    /// If a processor wished for is not allowed.
    pub fn assign(
        &self,
        wished: Option<&CpuList>,
        threads: Option<usize>,
    ) -> Result<Vec<usize>, AffinityError> {
        if let Some(cpu) = wished.and_then(|wished| wished.0.iter().find(|cpu| !self.0.contains(cpu))) {
            return Err(AffinityError::NotAllowed { cpu: *cpu, allowed: self.clone() });
        }
        let cpus = &wished.unwrap_or(self).0;
        let threads = match (threads, wished) {
            (Some(threads), _) => threads,
            (None, Some(wished)) => wished.0.len(),
            (None, None) => THREADS_DEFAULT.min(cpus.len()),
        };
        Ok(cpus.iter().copied().cycle().take(threads).collect())
    }
}

/// Binds the calling thread to one processor.
///
/// # Errors
/// If the kernel refuses.
pub fn pin_thread(cpu: usize) -> Result<(), AffinityError> {
    let mut set = CpuSet::new();
    set.set(cpu).map_err(io::Error::from)?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(io::Error::from)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{AffinityError, CpuList, pin_thread};

    fn list(text: &str) -> CpuList {
        text.parse().expect("a list of processors")
    }

    #[test]
    fn parses_numbers_and_ranges() {
        assert_eq!(list("3,0-1,1"), CpuList(vec![0, 1, 3]));
        assert_eq!(list("0,2-3").to_string(), "0,2,3");
        for wrong in ["", "a", "1-", "-1", "3-1", "1,,2", "+1", "99999999999999999999", "4096"] {
            assert!(matches!(wrong.parse::<CpuList>(), Err(AffinityError::Malformed(_))), "{wrong:?}");
        }
    }

    #[test]
    fn assigns_within_the_mask() {
        let allowed = list("2-5");
        assert_eq!(allowed.assign(None, None).expect("allowed"), [2, 3]);
        assert_eq!(list("7").assign(None, None).expect("allowed"), [7]);
        assert_eq!(allowed.assign(Some(&list("3,5")), None).expect("allowed"), [3, 5]);
        assert_eq!(allowed.assign(Some(&list("3")), Some(2)).expect("allowed"), [3, 3]);
        let error = allowed.assign(Some(&list("1-2")), None).expect_err("1 is not allowed");
        assert!(matches!(error, AffinityError::NotAllowed { cpu: 1, .. }));
    }

    #[test]
    fn pins_the_thread() {
        let cpu = CpuList::allowed().expect("the mask").assign(None, Some(1)).expect("one processor")[0];
        std::thread::spawn(move || {
            pin_thread(cpu).expect("an allowed processor");
            assert_eq!(CpuList::allowed().expect("the mask"), CpuList(vec![cpu]));
        })
        .join()
        .expect("the pinned thread");
    }
}
