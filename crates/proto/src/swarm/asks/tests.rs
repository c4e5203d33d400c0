use super::*;
use rand::SeedableRng;

fn peer(n: usize) -> NodeId {
    NodeId([u8::try_from(n).expect("tests have few peers"); 32])
}

fn near(n: usize) -> Candidate {
    Candidate { node: peer(n), connected: true, distance: 0, asks_us: false, drains: false }
}

fn far(n: usize) -> Candidate {
    Candidate { distance: 2, ..near(n) }
}

fn filled(asks: &mut Asks, candidates: impl IntoIterator<Item = Candidate>, alone: bool) -> Vec<NodeId> {
    let mut rng = SmallRng::seed_from_u64(1);
    asks.fill(Time::ZERO, 0, candidates.into_iter().collect(), alone, &mut rng).0
}

fn later(ms: u64) -> Time {
    Time::ZERO + Duration::from_millis(ms)
}

#[test]
fn a_few_places_are_for_those_far_away_and_all_if_nobody_is_near() {
    let mut asks = Asks::default();
    let asked = filled(&mut asks, (0..30).map(near).chain((30..60).map(far)), true);
    let from_afar = asked.iter().filter(|n| **n >= peer(30)).count();
    assert_eq!((asked.len(), from_afar), (ASKS_MAX, FAR_ASKS));
    assert_eq!(filled(&mut Asks::default(), (30..60).map(far), true).len(), ASKS_MAX);
}

#[test]
fn at_first_places_are_kept_for_those_who_ask_this_node() {
    let mut asks = Asks::default();
    assert_eq!(filled(&mut asks, (0..30).map(near), false).len(), ASKS_OWN);
    let mutual = (40..60).map(|n| Candidate { asks_us: true, ..near(n) });
    let asked = filled(&mut asks, (0..30).map(near).chain(mutual), false);
    assert_eq!(asked.len(), ASKS_MAX - ASKS_OWN);
    assert!(asked.iter().all(|n| *n >= peer(40)), "they are asked in return");
}

#[test]
fn places_that_wait_for_links_are_not_dialled_for_again() {
    let mut asks = Asks::default();
    let strange: Vec<Candidate> = (0..30).map(|n| Candidate { connected: false, ..near(n) }).collect();
    let mut rng = SmallRng::seed_from_u64(1);
    let (asked, dials) = asks.fill(Time::ZERO, 0, strange.clone(), false, &mut rng);
    assert_eq!((asked.len(), dials.len()), (0, ASKS_OWN));
    assert_eq!(asks.fill(later(1), 0, strange, false, &mut rng), (vec![], vec![]));
}

#[test]
fn the_most_silent_gives_way_to_one_that_stands_alike() {
    let mut asks = Asks::default();
    filled(&mut asks, [near(1), near(2), far(3)], true);
    asks.get_mut(&peer(1)).unwrap().last_grant = later(50);
    let patience = Duration::from_millis(20);
    let silent = |asks: &Asks, others: &[Candidate]| asks.replaceable(later(60), patience, others);
    assert_eq!(silent(&asks, &[near(4)]), Some(peer(2)));
    assert_eq!(silent(&asks, &[far(4)]), Some(peer(3)));
    assert_eq!(silent(&asks, &[near(1)]), None, "nobody else is there");
    asks.pass_over(peer(4), Time::ZERO, patience);
    assert_eq!(silent(&asks, &[near(4)]), None, "it gave nothing either");
}

#[test]
fn a_holder_far_away_is_given_credit_for_what_is_on_the_wire() {
    let stock = Stock::new(vec![1 << 20; 4]);
    let mut asks = Asks::default();
    filled(&mut asks, [near(1), near(2)], true);
    let credit = |asks: &Asks, n: usize| asks.terms(&stock, &peer(n), 0).credit_bytes;
    assert_eq!(credit(&asks, 1), 1 << 20, "one chunk as long as nothing is known");
    // A chunk takes 1 ms; the next grant of one comes at once, that of the other after 8 ms.
    for (n, pause) in [(1, 0), (2, 8)] {
        let ask = asks.get_mut(&peer(n)).unwrap();
        ask.on_begin(later(0));
        ask.on_end(later(1), Duration::from_millis(1));
        ask.on_begin(later(1 + pause));
    }
    assert_eq!((credit(&asks, 1), credit(&asks, 2)), (1 << 20, 9 << 20));
    let ask = asks.get_mut(&peer(2)).unwrap();
    ask.on_end(later(9), Duration::ZERO);
    let most = FLIGHT_BYTES_MAX / 2;
    assert!(credit(&asks, 2) <= most, "no more than its share");
}

#[test]
fn who_drains_is_asked_last_and_not_never() {
    let drains = |n| Candidate { drains: true, asks_us: true, ..near(n) };
    let asked = filled(&mut Asks::default(), (0..3).map(drains).chain((3..40).map(near)), true);
    assert!(asked.iter().all(|n| *n >= peer(3)), "others do");
    let mut asks = Asks::default();
    assert_eq!(filled(&mut asks, [drains(1), near(2)], true).len(), 2);
    let again = |asks: &mut Asks, at| asks.fill(at, 0, vec![drains(1)], true, &mut SmallRng::seed_from_u64(1)).0;
    asks.get_mut(&peer(1)).unwrap().on_sent(later(1), 0);
    asks.get_mut(&peer(1)).unwrap().on_sent(later(2), 0);
    asks.on_refused(peer(1), Refusal::Draining, later(3));
    assert_eq!(asks.nodes(), [peer(2)], "however many asks were on their way");
    assert_eq!(again(&mut asks, later(900)), []);
    assert_eq!(again(&mut asks, later(1100)), [peer(1)]);
}
