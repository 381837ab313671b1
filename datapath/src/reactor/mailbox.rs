//! How other threads talk to a reactor: a bounded queue and an eventfd that the ring reads.
//!
//! ```text
//!   post: push, then write the eventfd unless somebody has since the last wake-up
//!   wake: clear "written", then take everything
//! ```
//!
//! The order matters: a message pushed after the queue was taken finds "written" cleared and wakes again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use crossbeam::queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;

use super::Snapshot;
use crate::engine::ports::{ConnectionId, PeerAddress};
use crate::engine::shard::MovedConnection;
use crate::engine::shard_message::{ShardIndex, ShardMessage};
use crate::record::{NodeId, Record, VolumeNumber};

/// Messages that may wait. Other reactors have at most a few for each lane and connection under way, and keep what finds
/// no room.
const MESSAGES_MAX: usize = 4096;

/// What a reactor can be told. `R` is its engine's report.
#[derive(Debug)]
pub enum Message<R> {
    /// Refuse new connections, finish what is under way, then end.
    Drain,
    /// End at once: what is under way fails.
    Abort,
    /// Take over a connected socket.
    Adopt {
        /// The socket.
        socket: OwnedFd,
        /// Where it comes from.
        peer: PeerAddress,
    },
    /// Another shard says something.
    Told {
        /// Which.
        from: ShardIndex,
        /// What.
        message: ShardMessage,
    },
    /// Another reactor hands over a connection.
    Moved(Box<MovedSocket>),
    /// A connection that was handed over is gone.
    Gone {
        /// As it was called here.
        connection: ConnectionId,
    },
    /// A node was called: the connected socket, if it was reached.
    PeerCalled {
        /// Whom.
        node: NodeId,
        /// The socket.
        socket: Option<OwnedFd>,
    },
    /// The record of a volume, as it is in the record store.
    Record(Box<Record>),
    /// The volume with this number and lineage was deleted.
    Deleted {
        /// Its number.
        volume: VolumeNumber,
        /// Its lineage.
        lineage: [u8; 16],
    },
    /// Lead a volume for a while, if nobody else does.
    Tend {
        /// Which volume.
        volume: VolumeNumber,
    },
    /// Compare all replicas in sync of a volume.
    Verify {
        /// Which volume.
        volume: VolumeNumber,
        /// What the reports repeat.
        verify: u64,
    },
    /// Answer as soon as the engine takes requests. No answer means that the reactor has ended.
    TellWhenOpen(SyncSender<()>),
    /// Say how things are. No answer (the channel closes) means that the reactor has ended.
    Inspect(SyncSender<Snapshot<R>>),
}

/// A connection on its way from one reactor to another.
#[derive(Debug)]
pub struct MovedSocket {
    /// From whom.
    pub(super) from: ShardIndex,
    /// As it was called there.
    pub(super) origin: ConnectionId,
    pub(super) socket: OwnedFd,
    pub(super) peer: PeerAddress,
    /// The engine's part.
    pub(super) moved: Box<MovedConnection>,
}

/// Why a message was not taken.
#[derive(Debug, Error)]
pub enum PostError<R> {
    /// Too many are waiting. The message comes back.
    #[error("the reactor has too many messages waiting")]
    Full(Message<R>),
    /// The reactor has ended.
    #[error("the reactor has ended")]
    Ended,
}

#[derive(Debug)]
struct Shared<R> {
    messages: ArrayQueue<Message<R>>,
    wake: EventFd,
    written: AtomicBool,
    ended: AtomicBool,
}

/// The sending end; clones reach the same reactor.
#[derive(Debug)]
pub struct Mailbox<R>(Arc<Shared<R>>);

impl<R> Clone for Mailbox<R> {
    fn clone(&self) -> Self {
        Mailbox(Arc::clone(&self.0))
    }
}

/// The reactor's end.
#[derive(Debug)]
pub struct Inbox<R>(Arc<Shared<R>>);

/// Makes both ends.
///
/// # Errors
/// If the process may open no more files.
pub fn mailbox<R>() -> std::io::Result<(Mailbox<R>, Inbox<R>)> {
    // Not non-blocking: io_uring would then complete the read at once instead of waiting.
    let shared = Arc::new(Shared {
        messages: ArrayQueue::new(MESSAGES_MAX),
        wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        written: AtomicBool::new(false),
        ended: AtomicBool::new(false),
    });
    Ok((Mailbox(Arc::clone(&shared)), Inbox(shared)))
}

impl<R> Mailbox<R> {
    /// Leaves a message and wakes the reactor.
    ///
    /// # Errors
    /// If too many are waiting or the reactor has ended.
    pub fn post(&self, message: Message<R>) -> Result<(), PostError<R>> {
        if self.0.ended.load(Ordering::SeqCst) {
            return Err(PostError::Ended);
        }
        self.0.messages.push(message).map_err(PostError::Full)?;
        if self.0.ended.load(Ordering::SeqCst) {
            // The reactor may have emptied the queue just before: nobody will look again.
            self.0.discard();
            return Err(PostError::Ended);
        }
        if !self.0.written.swap(true, Ordering::SeqCst) {
            self.0.wake.write(1).expect("an eventfd takes a one");
        }
        Ok(())
    }
}

impl<R> Inbox<R> {
    /// The file that becomes readable when there is a message.
    pub(super) fn wake_file(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// The wake-up was read: take messages until there is none.
    pub(super) fn woken(&self) {
        self.0.written.store(false, Ordering::SeqCst);
    }

    pub(super) fn take(&self) -> Option<Message<R>> {
        self.0.messages.pop()
    }
}

impl<R> Drop for Inbox<R> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.discard();
    }
}

impl<R> Shared<R> {
    fn discard(&self) {
        while self.messages.pop().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::{MESSAGES_MAX, Message, PostError, mailbox};

    #[test]
    fn an_ended_reactor_refuses_and_drops_what_waited() {
        let (mailbox, inbox) = mailbox::<()>().expect("an eventfd");
        let (sender, receiver) = sync_channel(1);
        mailbox.post(Message::Inspect(sender)).expect("room");
        drop(inbox);
        assert!(receiver.recv().is_err(), "the question is dropped, so that nobody waits for an answer");
        assert!(matches!(mailbox.post(Message::Drain), Err(PostError::Ended)));
    }

    #[test]
    fn a_full_queue_gives_the_message_back() {
        let (mailbox, inbox) = mailbox::<()>().expect("an eventfd");
        for _ in 0..MESSAGES_MAX {
            mailbox.post(Message::Drain).expect("room");
        }
        assert!(matches!(mailbox.post(Message::Abort), Err(PostError::Full(Message::Abort))));
        inbox.woken();
        assert!(matches!(inbox.take(), Some(Message::Drain)));
        mailbox.post(Message::Abort).expect("room again");
    }
}
