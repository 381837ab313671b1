//! The reactor's clock: CLOCK_BOOTTIME, which goes on while the machine sleeps, as leases need it to.

use crate::units::Moment;

/// Now. Reading it does not enter the kernel (vDSO).
pub(super) fn now() -> Moment {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills a structure on the stack.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
    let seconds = u64::try_from(time.tv_sec).expect("time since the start is positive");
    let nanoseconds = u64::try_from(time.tv_nsec).expect("a part of a second");
    Moment(seconds * 1_000_000_000 + nanoseconds)
}

#[cfg(test)]
mod tests {
    #[test]
    fn does_not_run_backwards() {
        let first = super::now();
        assert!(super::now() >= first && first.0 > 0);
    }
}
