use super::*;
use aquifer_core::{Binding, Chunk, ChunkSet, Content, Dtype, Hash, Layout, Manifest, TensorEntry};
use aquifer_proto::{EngineInput, Plan};
use proptest::prelude::*;

const CHUNK: u64 = 1 << 20;
const ROOM: u64 = 5 * CHUNK;

fn hash(n: u8) -> ChunkHash {
    ChunkHash(Hash([n; 32]))
}

fn promise(lease: u64) -> Promise {
    let (to, manifest) = (NodeId([1; 32]), ManifestHash(Hash([2; 32])));
    Promise { to, manifest, lease, chunk: 0, until: Instant::now() }
}

impl Outlet {
    /// As `Agent::next_batch` and a job do with the first in the queue.
    fn bring_first(&mut self) -> Option<(ChunkHash, Reservation)> {
        let hash = *self.queue.front()?;
        let room = self.room_for(hash, CHUNK)?;
        self.begin();
        Some((hash, room))
    }

    /// As `Agent::came` and `hand_out` do.
    fn has_come(&mut self, hash: ChunkHash, room: Reservation) -> Vec<Promise> {
        let waiting = self.end(&hash).unwrap();
        room.commit().unwrap();
        self.keep(hash);
        waiting.promises.iter().for_each(|p| self.lease(p.lease, p.chunk, hash));
        waiting.promises
    }

    fn check(&self) {
        let queued: BTreeSet<_> = self.queue.iter().collect();
        assert_eq!(queued.len(), self.queue.len(), "nothing is queued twice");
        for (hash, waiting) in &self.waiting {
            assert_eq!(queued.contains(hash), !waiting.under_way, "{hash:?}");
            assert!(waiting.under_way || waiting.home || !waiting.promises.is_empty(), "nobody waits for {hash:?}");
            assert!(waiting.promises.iter().all(|p| self.promised.get(&(p.lease, p.chunk)) == Some(hash)));
        }
        assert!(queued.iter().all(|hash| self.waiting.contains_key(hash)));
        assert_eq!(self.promised.len(), self.waiting.values().map(|w| w.promises.len()).sum::<usize>());
        for (hash, leases) in &self.kept {
            assert_eq!(self.leases.values().filter(|over| *over == hash).count(), *leases);
            assert_eq!(self.idle.iter().filter(|idle| *idle == hash).count(), usize::from(*leases == 0), "{hash:?}");
        }
        assert!(self.idle.iter().all(|hash| self.kept.contains_key(hash)));
        assert!(self.store.used_bytes() <= ROOM);
    }
}

#[test]
fn what_is_under_lease_stays_and_the_longest_idle_goes_first() {
    let mut outlet = Outlet::new(ROOM);
    for n in 0..5u8 {
        outlet.promise(hash(n), promise(n.into()));
        let (chunk, room) = outlet.bring_first().unwrap();
        let told: Vec<u64> = outlet.has_come(chunk, room).iter().map(|promise| promise.lease).collect();
        assert_eq!((chunk, told), (hash(n), vec![n.into()]));
    }
    outlet.promise(hash(9), promise(9));
    assert!(outlet.bring_first().is_none(), "all that is there is under lease");
    outlet.close(3, 0);
    outlet.close(1, 0);
    let (chunk, room) = outlet.bring_first().unwrap();
    assert_eq!(chunk, hash(9));
    drop(room);
    assert!(outlet.get(&hash(3)).is_none() && outlet.get(&hash(1)).is_some() && outlet.get(&hash(0)).is_some());
    // Under lease again it stays.
    outlet.lease(10, 0, hash(1));
    outlet.again(hash(9));
    let (chunk, room) = outlet.bring_first().unwrap();
    assert_eq!(outlet.has_come(chunk, room).len(), 1);
    outlet.promise(hash(8), promise(8));
    assert!(outlet.bring_first().is_none());
    outlet.check();
}

/// One tensor of two chunks, bound whole; `content` names them.
fn target(content: [u8; 2]) -> Target {
    let chunk = |n: &u8| Chunk { hash: hash(*n), len: 8 };
    let tensor = TensorEntry {
        name: "a".into(),
        dtype: Dtype::new("U8"),
        shape: vec![16],
        content: Content::Chunks(content.iter().map(chunk).collect()),
    };
    let manifest = Manifest::new(vec![], vec![tensor], vec![]).unwrap();
    let layout = Layout::of(&manifest);
    let (index, strides) = (vec![(0, 16)], vec![]);
    let (tensor, dtype) = ("a".into(), Dtype::new("U8"));
    let binding = Binding { tensor, dtype, shape: vec![16], index, region: 0, offset: 0, strides };
    let plan = Plan::of(&manifest, &layout, &[binding], &[], &BTreeMap::from([(0, 16)])).unwrap();
    Target { manifest: ManifestHash::of(&content), plan: Arc::new(plan), layout: Arc::new(layout) }
}

#[test]
fn what_is_about_to_be_overwritten_is_not_given() {
    let mut session = EngineSession::default();
    let (old, new) = (target([1, 2]), target([1, 9]));
    let place = |session: &EngineSession, of: &Target, chunk| {
        steady_place(session, &of.manifest, chunk).map(|(_, range)| range.start)
    };
    let passes = |session: &mut EngineSession, of: &Target| {
        session.handle(EngineInput::Checked { manifest: of.manifest, result: Ok(()) });
    };
    session.handle(EngineInput::Hydrate { serving: None, fresh: true });
    session.handle(EngineInput::Target(old.clone()));
    for chunk in 0..2 {
        assert_eq!(place(&session, &old, 0), None, "it is being filled");
        session.handle(EngineInput::Landing { chunk });
        session.handle(EngineInput::Landed { chunk, verified: true });
    }
    passes(&mut session, &old);
    assert_eq!((place(&session, &old, 0), place(&session, &old, 1)), (Some(0), Some(8)));
    session.handle(EngineInput::Target(new.clone()));
    assert_eq!(
        (place(&session, &old, 1), place(&session, &new, 0), place(&session, &new, 1)),
        (Some(8), Some(0), None)
    );
    session.handle(EngineInput::Available { chunks: ChunkSet::from_indices(2, [1]) });
    session.handle(EngineInput::Prepared { ok: true });
    assert_eq!(session.phase(), "pausing");
    assert_eq!((place(&session, &old, 1), place(&session, &new, 0)), (None, Some(0)));
    session.handle(EngineInput::Paused { manifest: new.manifest });
    assert_eq!((place(&session, &new, 0), place(&session, &new, 1)), (None, None));
    session.handle(EngineInput::Applied { ok: true });
    passes(&mut session, &new);
    session.handle(EngineInput::Resumed { manifest: new.manifest });
    assert_eq!((place(&session, &new, 0), place(&session, &new, 1)), (Some(0), Some(8)));
}

#[derive(Clone, Debug)]
enum Step {
    Promise(u8),
    Home(u8),
    Begin,
    Came(prop::sample::Index),
    Failed(prop::sample::Index),
    Gone(u8),
    Lease(u8),
    Close(prop::sample::Index),
    Remove(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (0..12u8).prop_map(Step::Promise),
        1 => (0..12u8).prop_map(Step::Home),
        4 => Just(Step::Begin),
        3 => at().prop_map(Step::Came),
        1 => at().prop_map(Step::Failed),
        1 => (0..12u8).prop_map(Step::Gone),
        2 => (0..12u8).prop_map(Step::Lease),
        4 => at().prop_map(Step::Close),
        1 => (0..12u8).prop_map(Step::Remove),
    ]
}

proptest! {
    /// Whatever happens in whatever order, the books balance, and the room is not exceeded.
    #[test]
    fn books_balance(steps in prop::collection::vec(step(), 0..150)) {
        let mut outlet = Outlet::new(ROOM);
        let (mut next, mut leases, mut jobs) = (0, Vec::new(), Vec::new());
        let mut lease = |leases: &mut Vec<u64>| {
            next += 1;
            leases.push(next);
            next
        };
        for step in steps {
            match step {
                Step::Promise(n) => outlet.promise(hash(n), promise(lease(&mut leases))),
                Step::Home(n) => outlet.wait_for(hash(n)).home = true,
                Step::Begin => jobs.extend(outlet.bring_first()),
                Step::Came(at) if !jobs.is_empty() => {
                    let (chunk, room) = jobs.swap_remove(at.index(jobs.len()));
                    outlet.has_come(chunk, room);
                }
                Step::Failed(at) if !jobs.is_empty() => outlet.again(jobs.swap_remove(at.index(jobs.len())).0),
                // What a job has is not given up before it ends.
                Step::Gone(n) if jobs.iter().all(|(chunk, _)| *chunk != hash(n)) => drop(outlet.end(&hash(n))),
                Step::Lease(n) if outlet.get(&hash(n)).is_some() => outlet.lease(lease(&mut leases), 0, hash(n)),
                Step::Close(at) if !leases.is_empty() => {
                    let over = leases.swap_remove(at.index(leases.len()));
                    outlet.close(over, 0);
                    outlet.close(over, 0);
                }
                Step::Remove(n) => outlet.remove(&hash(n)),
                Step::Came(_) | Step::Failed(_) | Step::Gone(_) | Step::Lease(_) | Step::Close(_) => {}
            }
            outlet.check();
        }
    }
}
