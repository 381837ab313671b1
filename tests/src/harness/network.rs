//! Machines that are network namespaces of this one: each has an address, and all hang on one switch, which can lose what
//! they send each other.
//!
//! ```text
//!   namespace n1: eth0 ──veth── to-n1 ┐
//!   namespace n2: eth0 ──veth── to-n2 ┼ bridge, in the namespace `switch`; nft drops there
//!   namespace ctl: eth0 ─veth── to-ctl┘
//! ```
//!
//! Their names are mounted where only this thread and what it starts can see them. So no two runs meet, and not even a test
//! that is killed leaves any behind: namespaces and links go with the last process that has them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns};

use super::mounted::keep_mounts_private;
use super::tools::{dying_with_us, run, tool};

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
const SWITCH: &str = "switch";
/// A table that every packet between two machines passes.
const TABLE: &str = "bridge faults";

/// Where a process runs: beside the test, or on a machine of a [`Network`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    machine: Option<String>,
    address: IpAddr,
}

impl Place {
    /// Beside the test, on the loopback.
    #[must_use]
    pub fn here() -> Place {
        Place { machine: None, address: Ipv4Addr::LOCALHOST.into() }
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Is it on a machine of its own?
    #[must_use]
    pub fn is_apart(&self) -> bool {
        self.machine.is_some()
    }

    /// A command that runs there, and dies with the thread that starts it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let Some(machine) = &self.machine else { return dying_with_us(program) };
        // For the message that names the package.
        let _ = tool("ip");
        let mut command = dying_with_us("ip");
        command.args(["netns", "exec", machine, program]);
        command
    }

    /// Does something on a thread that has this machine's network.
    ///
    /// # Panics
    /// If the thread cannot go there, or `work` panics.
    pub fn visit<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let visitor = scope.spawn(|| {
                if let Some(machine) = &self.machine {
                    let file =
                        fs::File::open(format!("{NAMES}/{machine}")).expect("a machine of the network");
                    setns(file, CloneFlags::CLONE_NEWNET).expect("root may go there");
                }
                work()
            });
            visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// What the switch does to packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault<'a> {
    /// Nothing that this machine sends arrives.
    From(&'a str),
    /// Nothing arrives at this machine.
    To(&'a str),
    /// Nothing goes from the first to the second.
    Between(&'a str, &'a str),
    /// So many percent of what this machine sends or should receive are lost, at random.
    Loss(&'a str, u32),
}

/// The machines and their switch. Dropped, they are gone.
#[derive(Debug)]
pub struct Network {
    machines: Vec<String>,
}

impl Network {
    /// Makes machines of these names. Only the calling thread, and those it starts from now on, can use them.
    ///
    /// # Panics
    /// Without root's rights, or a kernel that has bridges, veth pairs and nf_tables for bridges.
    #[must_use]
    pub fn new(machines: &[&str]) -> Network {
        keep_mounts_private();
        fs::create_dir_all(NAMES).unwrap_or_else(|error| panic!("{NAMES}: {error}"));
        run(tool("mount").args(["-t", "tmpfs", "berth-test", NAMES]));
        let network = Network { machines: machines.iter().map(|&name| name.to_owned()).collect() };
        ip(&format!("netns add {SWITCH}"));
        ip(&format!("-n {SWITCH} link add bridge type bridge"));
        ip(&format!("-n {SWITCH} link set bridge up"));
        for machine in machines {
            let address = network.place(machine).address;
            ip(&format!("netns add {machine}"));
            ip(&format!("-n {SWITCH} link add to-{machine} type veth peer name eth0 netns {machine}"));
            ip(&format!("-n {SWITCH} link set to-{machine} master bridge up"));
            ip(&format!("-n {machine} address add {address}/24 dev eth0"));
            ip(&format!("-n {machine} link set lo up"));
            ip(&format!("-n {machine} link set eth0 up"));
        }
        nft(&format!("add table {TABLE}"));
        nft(&format!("add chain {TABLE} passing {{ type filter hook forward priority 0; policy accept; }}"));
        network
    }

    /// One of them.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn place(&self, machine: &str) -> Place {
        let index = self.machines.iter().position(|name| name == machine);
        let index = index.unwrap_or_else(|| panic!("no machine {machine}"));
        let last = u8::try_from(index + 1).expect("few machines");
        Place { machine: Some(machine.to_owned()), address: Ipv4Addr::new(10, 77, 0, last).into() }
    }

    /// Pulls a machine's plug at the switch, or puts it in again. The machine sees that its carrier is gone.
    ///
    /// # Panics
    /// If that fails.
    pub fn plug(&self, machine: &str, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&format!("-n {SWITCH} link set to-{machine} {state}"));
    }

    /// Adds a fault to those that there are.
    ///
    /// # Panics
    /// If that fails.
    pub fn add(&self, fault: Fault<'_>) {
        let rule = |words: &str| nft(&format!("add rule {TABLE} passing {words} drop"));
        match fault {
            Fault::From(machine) => rule(&format!("iifname to-{machine}")),
            Fault::To(machine) => rule(&format!("oifname to-{machine}")),
            Fault::Between(one, other) => rule(&format!("iifname to-{one} oifname to-{other}")),
            Fault::Loss(machine, percent) => {
                assert!((1..=100).contains(&percent), "{percent} percent");
                for end in ["iifname", "oifname"] {
                    rule(&format!("{end} to-{machine} numgen random mod 100 <= {}", percent - 1));
                }
            }
        }
    }

    /// Ends all that [`Network::add`] began.
    ///
    /// # Panics
    /// If that fails.
    pub fn heal(&self) {
        nft(&format!("flush chain {TABLE} passing"));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The namespaces go with their names and the processes in them.
        for name in self.machines.iter().map(String::as_str).chain([SWITCH]) {
            let _ = Command::new("ip").args(["netns", "delete", name]).stderr(Stdio::null()).status();
        }
        let _ = Command::new("umount").args(["--lazy", NAMES]).stderr(Stdio::null()).status();
    }
}

fn ip(words: &str) {
    run(tool("ip").args(words.split(' ')));
}

fn nft(words: &str) {
    let _ = tool("nft");
    let mut command = tool("ip");
    run(command.args(["netns", "exec", SWITCH, "nft", words]));
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the kernel's network runs in real time")]
mod tests {
    use super::*;
    use std::process::Output;
    use std::time::{Duration, Instant};

    fn ping(from: &Place, to: &Place) -> Output {
        let script = format!("exec 3<>/dev/tcp/{}/9", to.address());
        from.command("timeout").args(["1", "bash", "-c", &script]).output().expect("bash")
    }

    /// A closed port refuses at once; a machine that cannot be reached lets one wait.
    fn reaches(from: &Place, to: &Place) -> bool {
        String::from_utf8_lossy(&ping(from, to).stderr).contains("refused")
    }

    /// The kernel asks for a neighbour's address once a second, and takes up to a second to notice a carrier: a way that has
    /// just been healed may need several tries.
    fn comes_to_reach(from: &Place, to: &Place) -> bool {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !reaches(from, to) {
            if Instant::now() > deadline {
                return false;
            }
        }
        true
    }

    #[test]
    fn what_the_switch_drops_does_not_arrive() {
        let network = Network::new(&["one", "two"]);
        let (one, two) = (network.place("one"), network.place("two"));
        let both = |network: &Network, reached: bool| {
            let ways = [(&one, &two), (&two, &one)];
            if reached {
                assert_eq!(ways.map(|(from, to)| comes_to_reach(from, to)), [true, true], "{network:?}");
            } else {
                assert_eq!(ways.map(|(from, to)| reaches(from, to)), [false, false], "{network:?}");
            }
        };
        both(&network, true);
        for fault in [
            Fault::From("one"),
            Fault::To("one"),
            Fault::Between("one", "two"),
            Fault::Between("two", "one"),
            Fault::Loss("two", 100),
        ] {
            network.add(fault);
            both(&network, false);
            network.heal();
            both(&network, true);
        }
        network.plug("two", false);
        both(&network, false);
        network.plug("two", true);
        both(&network, true);
        assert!(
            !two.visit(|| fs::read_to_string("/proc/thread-self/net/dev").expect("there")).contains("to-")
        );
    }

    #[test]
    fn nobody_else_sees_the_machines() {
        let seen = || fs::read_dir(NAMES).map_or(0, Iterator::count);
        let before = seen();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _network = Network::new(&["one"]);
                assert_eq!(seen(), 2);
            });
        });
        assert_eq!(seen(), before);
    }
}
