use super::*;
use rand::SeedableRng;

const CHUNK: u64 = 4 << 20;

/// Much credit, nothing under way.
const AMPLE: Terms = Terms { credit_bytes: 8 * CHUNK, flight_bytes: 0 };

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

/// A holder with chunks of these lengths, and who asks it.
struct Table {
    stock: Stock,
    serving: Serving,
    budget: Budget,
    rng: SmallRng,
    now: Time,
}

impl Table {
    /// Everything of so many equal chunks is here.
    fn seed(chunks: u32) -> Self {
        let bytes = u32::try_from(CHUNK).expect("it is short");
        let mut stock = Stock::new(vec![bytes; chunks as usize]);
        stock.have = ChunkSet::full(chunks);
        let (mut serving, budget) = (Serving::new(chunks), Budget::new(64 * CHUNK, None, Time::ZERO));
        (0..chunks).for_each(|c| serving.on_held(c));
        Table { stock, serving, budget, rng: SmallRng::seed_from_u64(1), now: Time::ZERO }
    }

    fn ask(&mut self, n: u8, wanted: impl IntoIterator<Item = u32>, terms: Terms) -> Option<Refusal> {
        let wanted = ChunkSet::from_indices(self.stock.len(), wanted);
        let have = ChunkSet::empty(self.stock.len());
        self.serving.on_ask(&self.stock, node(n), wanted, have, (terms, false))
    }

    fn grant(&mut self) -> Option<Granted> {
        let granted = self.serving.grant(&self.stock, &mut self.budget, self.now, &mut self.rng);
        self.serving.assert_invariants(&self.stock);
        granted
    }

    fn returned(&mut self, by: u8, lease: u64, chunk: u32, outcome: Outcome) -> bool {
        let returned = Returned { lease, chunk, outcome };
        self.serving.on_return(&self.stock, &mut self.budget, self.now, node(by), returned)
    }
}

#[test]
fn nobody_returns_the_lease_of_another() {
    let mut table = Table::seed(1);
    table.ask(1, 0..1, AMPLE);
    let lease = table.grant().unwrap().lease;
    assert!(!table.returned(2, lease, 0, Outcome::Verified));
    assert!(!table.returned(1, lease, 7, Outcome::Verified));
    assert!(table.returned(1, lease, 0, Outcome::Verified));
    assert!(!table.returned(1, lease, 0, Outcome::Verified), "once is enough");
    assert_eq!(table.budget.leased_bytes, 0);
}
