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
    flows: Vec<Vec<Passage>>,
    dirty: VecDeque<u32>,
    is_dirty: Vec<bool>,
    /// Per flow: the links it passes, and its rate.
    way: Vec<Way>,
    rate: Vec<f64>,
    /// What the flows of the link that is visited are allowed by their other links.
    others: Vec<f64>,
    tolerance: f64,
    visits: u64,
}

/// A flow on one of its links, with the others it passes: a visit looks up nothing but levels.
#[derive(Clone, Copy, Debug)]
struct Passage {
    flow: u32,
    others: [u32; 3],
}

/// Padded with the unlimited link.
#[derive(Clone, Copy, Debug)]
struct Way {
    links: [u32; 4],
    /// Where the flow stands in each link's list, so that it leaves without a search.
    place: [u32; 4],
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
            rate: Vec::new(),
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
        let mut way = Way { links, place: [0; 4] };
        for side in 0..4 {
            let link = links[side];
            if link == self.unlimited() {
                continue;
            }
            let others = std::array::from_fn(|other| links[other + usize::from(other >= side)]);
            way.place[side] = index(self.flows[link as usize].len());
            self.flows[link as usize].push(Passage { flow, others });
            self.touch(link);
        }
        if self.way.len() <= flow as usize {
            self.way.resize(flow as usize + 1, way);
            self.rate.resize(flow as usize + 1, 0.0);
        }
        self.way[flow as usize] = way;
        self.rate[flow as usize] = 0.0;
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
            if let Some(moved) = list.get(way.place[side] as usize) {
                self.way[moved.flow as usize].place[side] = way.place[side];
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

    pub(super) fn flows(&self, link: u32) -> impl Iterator<Item = u32> {
        self.flows[link as usize].iter().map(|p| p.flow)
    }

    pub(super) fn rate(&self, flow: u32) -> f64 {
        self.rate[flow as usize]
    }

    pub(super) fn load(&self, link: u32) -> f64 {
        self.flows(link).map(|f| self.rate(f)).sum()
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
            self.look_ahead();
            self.visit(link, flows, now);
        }
    }

    /// Links to be visited lie anywhere in memory: a glance at the next ones has them on their way
    /// while this one is visited. `network_speed` makes a sixth more transfers for it.
    fn look_ahead(&self) {
        if let Some(&next) = self.dirty.front() {
            let flows = &self.flows[next as usize];
            std::hint::black_box(flows.first().map(|p| p.flow));
            std::hint::black_box(flows.last().map(|p| p.flow));
        }
        if let Some(&after) = self.dirty.get(1) {
            std::hint::black_box(self.flows[after as usize].len());
        }
    }

    fn visit(&mut self, link: u32, flows: &mut Flows, now: u64) {
        self.visits += 1;
        let level = self.fill(link);
        self.level[link as usize] = level;
        for i in 0..self.others.len() {
            let flow = self.flows[link as usize][i].flow;
            let (old, new) = (self.rate[flow as usize], self.others[i].min(level));
            if (new - old).abs() <= self.tolerance * old {
                continue;
            }
            self.rate[flow as usize] = new;
            flows.change_rate(flow, old, new, now);
            self.flows[link as usize][i].others.into_iter().for_each(|l| self.touch(l));
        }
    }

    /// The level at which the link's flows use it up; infinite if they cannot.
    fn fill(&mut self, link: u32) -> f64 {
        let capacity = self.capacity[link as usize];
        self.others.clear();
        let level = &self.level;
        let allowed = |p: &Passage| p.others.iter().fold(f64::INFINITY, |limit, &l| limit.min(level[l as usize]));
        self.others.extend(self.flows[link as usize].iter().map(allowed));
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
            // Without a branch: which flow is limited elsewhere, no processor can guess.
            for &other in &self.others {
                let is_limited = u64::from(other <= level);
                limited += is_limited;
                used += f64::from_bits(other.to_bits() & is_limited.wrapping_neg());
            }
            let limited = usize::try_from(limited).expect("flows are counted in usize");
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
