//! How flows share links: every link has a *level*, and a flow's rate is the lowest level on its way.
//!
//! A link's level is found by filling: flows that are limited elsewhere take what their other
//! links allow them, the rest share what is left evenly. A link whose flows all are limited
//! elsewhere has no level (infinite). When every link's level fits its neighbours', each flow has a
//! link that is full and on which nobody gets more than it, which is the definition of max-min
//! fair. From any start, visiting links until nothing changes gets there: after each link was
//! visited once, the tightest link has its level for good, then the next tightest, and so on.
//!
//! A change visits the links it touches, and a neighbour only if a flow's rate changed by more
//! than the tolerance. At most [`PROPAGATION_VISITS_MAX`] visits are made per instant; what is left
//! is visited at the next, so news that reaches that far arrives one event late and links may
//! be over- or underused in between.

use super::flow::Flows;
use std::collections::VecDeque;

/// A guess, far above what the tests and the committed scenarios need per instant.
pub(super) const PROPAGATION_VISITS_MAX: usize = 100_000;

#[derive(Debug)]
pub(super) struct Links {
    capacity: Vec<f64>,
    level: Vec<f64>,
    /// The flows on a link, in an order that only depends on the calls made.
    flows: Vec<Vec<u32>>,
    dirty: VecDeque<u32>,
    is_dirty: Vec<bool>,
    /// Per flow: the links it passes, padded with the unlimited one, and its rate.
    way: Vec<Way>,
    others: Vec<f64>,
    tolerance: f64,
    visits: u64,
}

#[derive(Clone, Copy, Debug)]
struct Way {
    links: [u32; 4],
    /// Where the flow stands in each link's list, so that it leaves without a search.
    place: [u32; 4],
    rate: f64,
}

impl Links {
    /// The last link is unlimited: it pads the way of flows with fewer than four.
    pub(super) fn new(mut capacity: Vec<f64>, tolerance: f64) -> Self {
        capacity.push(f64::INFINITY);
        let count = capacity.len();
        Links {
            level: vec![f64::INFINITY; count],
            flows: vec![Vec::new(); count],
            dirty: VecDeque::new(),
            is_dirty: vec![false; count],
            way: Vec::new(),
            others: Vec::new(),
            capacity,
            tolerance,
            visits: 0,
        }
    }

    pub(super) fn unlimited(&self) -> u32 {
        index(self.capacity.len() - 1)
    }

    pub(super) fn join(&mut self, flow: u32, links: [u32; 4]) {
        let mut way = Way { links, place: [0; 4], rate: 0.0 };
        let unlimited = self.unlimited();
        for (link, place) in links.into_iter().zip(&mut way.place).filter(|(l, _)| *l != unlimited) {
            *place = index(self.flows[link as usize].len());
            self.flows[link as usize].push(flow);
            self.touch(link);
        }
        if self.way.len() <= flow as usize {
            self.way.resize(flow as usize + 1, way);
        }
        self.way[flow as usize] = way;
    }

    pub(super) fn leave(&mut self, flow: u32) {
        let way = self.way[flow as usize];
        for side in 0..4 {
            let link = way.links[side];
            if link == self.unlimited() {
                continue;
            }
            let list = &mut self.flows[link as usize];
            list.swap_remove(way.place[side] as usize);
            if let Some(&moved) = list.get(way.place[side] as usize) {
                self.way[moved as usize].place[side] = way.place[side];
            }
            self.touch(link);
        }
    }

    pub(super) fn set_capacity(&mut self, link: u32, capacity: f64) {
        self.capacity[link as usize] = capacity;
        self.touch(link);
    }

    pub(super) fn capacity(&self, link: u32) -> f64 {
        self.capacity[link as usize]
    }

    pub(super) fn flows(&self, link: u32) -> &[u32] {
        &self.flows[link as usize]
    }

    pub(super) fn rate(&self, flow: u32) -> f64 {
        self.way[flow as usize].rate
    }

    pub(super) fn load(&self, link: u32) -> f64 {
        self.flows(link).iter().map(|&f| self.rate(f)).sum()
    }

    pub(super) fn excess(&self) -> f64 {
        let count = self.unlimited();
        (0..count).fold(0.0, |worst: f64, l| {
            let over = self.load(l) - self.capacity(l);
            if over > 0.0 { worst.max(over / self.capacity(l).max(1.0)) } else { worst }
        })
    }

    pub(super) fn visits(&self) -> u64 {
        self.visits
    }

    /// Visits links until the levels fit each other, telling `flows` of rates that changed at `now`.
    pub(super) fn settle(&mut self, flows: &mut Flows, now: u64, visits_max: usize) {
        for _ in 0..visits_max {
            let Some(link) = self.dirty.pop_front() else { return };
            self.is_dirty[link as usize] = false;
            self.visit(link, flows, now);
        }
    }

    fn visit(&mut self, link: u32, flows: &mut Flows, now: u64) {
        self.visits += 1;
        self.level[link as usize] = self.fill(link);
        for i in 0..self.flows[link as usize].len() {
            let flow = self.flows[link as usize][i];
            let way = &mut self.way[flow as usize];
            let rate = way.links.iter().fold(f64::INFINITY, |r, &l| r.min(self.level[l as usize]));
            if (rate - way.rate).abs() <= self.tolerance * way.rate {
                continue;
            }
            let links = way.links;
            let old = std::mem::replace(&mut way.rate, rate);
            flows.change_rate(flow, old, rate, now);
            links.into_iter().filter(|&l| l != link).for_each(|l| self.touch(l));
        }
    }

    /// The level at which the link's flows use it up; infinite if they cannot.
    fn fill(&mut self, link: u32) -> f64 {
        let capacity = self.capacity[link as usize];
        self.others.clear();
        for &flow in &self.flows[link as usize] {
            let links = self.way[flow as usize].links.iter().filter(|&&l| l != link);
            self.others.push(links.fold(f64::INFINITY, |limit, &l| limit.min(self.level[l as usize])));
        }
        let mut free = self.others.len();
        let mut left = capacity;
        // Each round takes out the flows that are limited below the level, which only rises; a round
        // that takes out none more, or by a rounding error fewer, is the last.
        loop {
            if free == 0 {
                return f64::INFINITY;
            }
            let level = left / free as f64;
            let (mut limited, mut used) = (0, 0.0);
            for &other in self.others.iter().filter(|&&o| o <= level) {
                limited += 1;
                used += other;
            }
            if limited <= self.others.len() - free {
                return level;
            }
            free = self.others.len() - limited;
            left = capacity - used;
        }
    }

    fn touch(&mut self, link: u32) {
        if link != self.unlimited() && !std::mem::replace(&mut self.is_dirty[link as usize], true) {
            self.dirty.push_back(link);
        }
    }
}

fn index(i: usize) -> u32 {
    u32::try_from(i).expect("links and flows are numbered in u32")
}
