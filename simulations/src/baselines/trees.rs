//! Fixed trees: everyone under a complete holder, or each node under another.

use super::driver::{Driver, chunk_of, sides};
use crate::outcome::Outcome;
use crate::scenario::Expanded;
use anyhow::Result;
use aquifer_core::Time;

/// Chunks a pair has under way, so that the flow never pauses between two.
const AHEAD: usize = 2;

/// Every node pulls its chunks in order from one holder; several holders get even shares of them.
pub(super) fn one_holder(e: &Expanded) -> Result<Outcome> {
    let (holders, pullers) = sides(e);
    let mut driver = Driver::new(e);
    let mut queues: Vec<Vec<u32>> = e.nodes.iter().map(|n| n.missing().iter().collect()).collect();
    queues.iter_mut().for_each(|q| q.reverse());
    for (&node, &holder) in pullers.iter().zip(holders.iter().cycle()) {
        for _ in 0..AHEAD {
            if let Some(chunk) = queues[node as usize].pop() {
                driver.send(Time::ZERO, holder, node, chunk);
            }
        }
    }
    while let Some(done) = driver.next() {
        if let Some(chunk) = queues[done.to as usize].pop() {
            driver.send(done.at, done.from, done.to, chunk);
        }
    }
    driver.finish("one-holder")
}

/// One tree per complete holder, each over its share of the pullers. A node passes a chunk on to
/// its children when it has arrived whole. Children of one node share its uplink, so a node with
/// k children feeds each at a k-th of its rate. A node that does not want a chunk passes it on
/// all the same if one below it does.
pub(super) fn tree(e: &Expanded, arity: usize, name: &str) -> Result<Outcome> {
    let (holders, pullers) = sides(e);
    let mut driver = Driver::new(e);
    let mut children: Vec<Vec<u32>> = vec![Vec::new(); e.nodes.len()];
    let mut needed: Vec<_> = e.nodes.iter().map(|n| n.missing()).collect();
    for (h, &holder) in holders.iter().enumerate() {
        let below: Vec<u32> = pullers.iter().copied().skip(h).step_by(holders.len()).collect();
        let line: Vec<u32> = std::iter::once(holder).chain(below).collect();
        for i in (1..line.len()).rev() {
            let (parent, child) = (line[(i - 1) / arity], line[i]);
            children[parent as usize].insert(0, child);
            let below = needed[child as usize].clone();
            needed[parent as usize].union_with(&below);
        }
    }
    for &holder in &holders {
        for &child in &children[holder as usize] {
            for chunk in needed[child as usize].iter() {
                driver.send(Time::ZERO, holder, child, chunk);
            }
        }
    }
    while let Some(done) = driver.next() {
        let chunk = chunk_of(done.tag);
        for &child in children[done.to as usize].iter().filter(|&&c| needed[c as usize].contains(chunk)) {
            driver.send(done.at, done.to, child, chunk);
        }
    }
    driver.finish(name)
}
