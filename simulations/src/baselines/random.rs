//! BitTorrent-style: random neighbours, and pullers that choose.
//!
//! - Each puller draws 20 neighbours; being neighbours is mutual. Complete holders are drawn like
//!   anyone, and each also gets 20 of its own. Where nodes want different parts, complete holders
//!   are everyone's neighbours, or a node could be left with nobody who has its part.
//! - A node unchokes 4 of the neighbours that need something it has, at random, and draws again
//!   when one of them has nothing left to get from it. There is no tit-for-tat and no
//!   ten-second round: rates are alike here, and slow rounds would only cost time.
//! - A puller keeps up to 5 requests outstanding at those who unchoke it. Of what its uploader has
//!   said it has it takes what is rarest among its own neighbours, ties at random, and never
//!   what it has already asked for. There is no end-game mode.
//! - What a node has said to have is known to its neighbours one latency later. Requests and
//!   unchokes are free and immediate, which favours this baseline.

use super::driver::{Driver, chunk_of, sides};
use crate::outcome::Outcome;
use crate::scenario::Expanded;
use anyhow::Result;
use aquifer_core::{ChunkSet, Time};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::time::Duration;

const NEIGHBOURS: usize = 20;
const UNCHOKED: usize = 4;
const OUTSTANDING: usize = 5;
/// Chunks looked at to find a rare one, from a random place on: enough to be rarest-first in effect,
/// while a scan of all would make the run quadratic in the chunks.
const LOOKED_AT: usize = 128;

struct Swarm<'a> {
    driver: Driver<'a>,
    rng: SmallRng,
    neighbours: Vec<Vec<u32>>,
    /// What a node has told its neighbours.
    told: Vec<ChunkSet>,
    /// Per node and chunk: how many neighbours have told of it.
    copies: Vec<Vec<u16>>,
    /// What a node misses and has not asked for.
    open: Vec<ChunkSet>,
    unchoked: Vec<Vec<u32>>,
    uploaders: Vec<Vec<u32>>,
    outstanding: Vec<usize>,
    telling: VecDeque<(Time, u32, u32)>,
}

pub(super) fn run(e: &Expanded) -> Result<Outcome> {
    let mut swarm = Swarm::new(e);
    for node in 0..swarm.told.len() {
        swarm.serve(Time::ZERO, node);
    }
    let latency = Duration::from_secs_f64(e.network.latency_us / 1e6);
    while let Some(done) = swarm.driver.next() {
        swarm.hear(done.at);
        swarm.telling.push_back((done.at + latency, done.to, chunk_of(done.tag)));
        swarm.outstanding[done.to as usize] -= 1;
        swarm.fetch(done.at, done.to as usize);
        swarm.serve(done.at, done.from as usize);
        swarm.serve(done.at, done.to as usize);
        // What is told after the last transfer would otherwise never be heard.
        while swarm.driver.network.next_completion().is_none() && !swarm.telling.is_empty() {
            let at = swarm.telling[0].0;
            swarm.hear(at);
            (0..swarm.told.len()).for_each(|node| swarm.serve(at, node));
        }
    }
    swarm.driver.finish("random")
}

impl<'a> Swarm<'a> {
    fn new(e: &'a Expanded) -> Self {
        let mut rng = SmallRng::seed_from_u64(e.seed);
        let nodes = e.nodes.len();
        let neighbours = draw_neighbours(e, &mut rng);
        let told: Vec<ChunkSet> = e.nodes.iter().map(|n| n.has.clone()).collect();
        let count = |list: &Vec<u32>| {
            let mut copies = vec![0; e.chunks as usize];
            list.iter().flat_map(|&n| told[n as usize].iter()).for_each(|c| copies[c as usize] += 1);
            copies
        };
        Swarm {
            copies: neighbours.iter().map(count).collect(),
            driver: Driver::new(e),
            rng,
            neighbours,
            told,
            open: e.nodes.iter().map(|n| n.missing()).collect(),
            unchoked: vec![Vec::new(); nodes],
            uploaders: vec![Vec::new(); nodes],
            outstanding: vec![0; nodes],
            telling: VecDeque::new(),
        }
    }

    fn hear(&mut self, now: Time) {
        while let Some(&(_, node, chunk)) = self.telling.front().filter(|t| t.0 <= now) {
            self.telling.pop_front();
            self.told[node as usize].insert(chunk);
            for &n in &self.neighbours[node as usize] {
                self.copies[n as usize][chunk as usize] += 1;
            }
        }
    }

    /// Takes the slots of those that need nothing more away, and gives free slots to others.
    fn serve(&mut self, now: Time, node: usize) {
        let useful = |s: &Self, n: u32| s.told[node].intersection(&s.open[n as usize]).next().is_some();
        for n in self.unchoked[node].clone() {
            if !useful(self, n) {
                self.unchoked[node].retain(|&u| u != n);
                self.uploaders[n as usize].retain(|&u| u as usize != node);
            }
        }
        if self.unchoked[node].len() == UNCHOKED {
            return;
        }
        let mut others = self.neighbours[node].clone();
        others.shuffle(&mut self.rng);
        for n in others {
            if self.unchoked[node].len() == UNCHOKED {
                return;
            }
            if !self.unchoked[node].contains(&n) && useful(self, n) {
                self.unchoked[node].push(n);
                self.uploaders[n as usize].push(index(node));
                self.fetch(now, n as usize);
            }
        }
    }

    /// Asks the uploaders in turn until enough is outstanding.
    fn fetch(&mut self, now: Time, node: usize) {
        let uploaders = &mut self.uploaders[node];
        let turn = uploaders.len().min(1);
        uploaders.rotate_left(turn);
        for uploader in self.uploaders[node].clone().into_iter().cycle().take(2 * OUTSTANDING) {
            if self.outstanding[node] == OUTSTANDING {
                return;
            }
            let Some(chunk) = self.rarest(node, uploader as usize) else { continue };
            self.open[node].remove(chunk);
            self.outstanding[node] += 1;
            self.driver.send(now, uploader, index(node), chunk);
        }
    }

    fn rarest(&mut self, node: usize, uploader: usize) -> Option<u32> {
        let from = self.rng.random_range(0..self.open[node].len());
        let (open, told, copies) = (&self.open[node], &self.told[uploader], &self.copies[node]);
        let around = (from..open.len()).chain(0..from);
        let there = around.filter(|&c| open.contains(c) && told.contains(c)).take(LOOKED_AT);
        there.min_by_key(|&c| copies[c as usize])
    }
}

fn draw_neighbours(e: &Expanded, rng: &mut SmallRng) -> Vec<Vec<u32>> {
    let (holders, pullers) = sides(e);
    let partial = e.nodes.iter().any(|n| !n.wants.is_full());
    let mut all: Vec<u32> = e.nodes.iter().map(|n| n.index).collect();
    let mut lists = vec![Vec::new(); all.len()];
    for node in 0..index(lists.len()) {
        let pool = if pullers.contains(&node) { &mut all } else { &mut pullers.clone() };
        let (drawn, _) = pool.partial_shuffle(rng, NEIGHBOURS);
        let always = holders.iter().filter(|_| partial);
        for &other in drawn.iter().chain(always) {
            if other != node && !lists[node as usize].contains(&other) {
                lists[node as usize].push(other);
                lists[other as usize].push(node);
            }
        }
    }
    lists
}

fn index(node: usize) -> u32 {
    u32::try_from(node).expect("nodes are numbered in u32")
}
