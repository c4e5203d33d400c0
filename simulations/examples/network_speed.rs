//! How fast the network model is: random traffic between 4096 nodes with six flows each.
#![forbid(unsafe_code)]

use aquifer_core::Time;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use simulations::network::{Network, Nic};
use std::time::Instant;

const NODES: u32 = 4096;
const FLOWS: u32 = 6;
const BYTES: u64 = 4 << 20;

fn main() {
    let nic = Nic { up: 12.5e9, down: 12.5e9, upload_cap: None, rack: None, landing: None };
    // A fresh partner for each transfer is the worst case; a swarm's pairs stay for many.
    for per_partner in [1, 16] {
        let mut network = Network::new(vec![nic; NODES as usize], vec![], 0.01);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut partner = |not: u32| (not + rng.random_range(1..NODES)) % NODES;
        for node in 0..NODES {
            (0..FLOWS).for_each(|_| network.start(Time::ZERO, node, partner(node), 0, BYTES));
        }
        let (begin, mut count) = (Instant::now(), 0u32);
        while let Some(at) = network.next_completion().filter(|_| begin.elapsed().as_secs() < 8) {
            while let Some(done) = network.pop_completion(at) {
                count += 1;
                let stays = (done.tag + 1) % per_partner != 0;
                let to = if stays { done.to } else { partner(done.from) };
                network.start(at, done.from, to, done.tag + 1, BYTES);
            }
        }
        let per_s = f64::from(count) / begin.elapsed().as_secs_f64();
        let visits = network.visits() as f64 / f64::from(count);
        eprintln!("{per_partner} per partner: {per_s:.0} transfers/s, {visits:.1} visits each");
    }
}
