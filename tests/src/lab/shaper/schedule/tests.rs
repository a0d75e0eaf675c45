use super::*;

const SEED: u64 = 7;

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Sends `count` packets of `size` bytes, `gap` apart, and returns the time at which each left, by
/// its number.
fn send(
    path: &Impairment,
    count: u16,
    size: usize,
    gap: Duration,
) -> (Vec<(u16, Duration)>, Counts) {
    let start = Instant::now();
    let mut schedule = Schedule::new(SEED);
    for number in 0..count {
        let mut packet = vec![0; size];
        packet[..2].copy_from_slice(&number.to_be_bytes());
        schedule.push(path, start + gap * number.into(), &packet);
    }
    let mut left = Vec::new();
    while let Some(at) = schedule.next() {
        assert!(schedule.pop(at - Duration::from_nanos(1)).is_none());
        let packet = schedule.pop(at).unwrap();
        assert_eq!(packet.len(), size);
        left.push((u16::from_be_bytes([packet[0], packet[1]]), at - start));
    }
    assert_eq!(schedule.held, 0);
    (left, schedule.counts())
}

#[test]
fn an_unimpaired_path_passes_everything_at_once() {
    let (left, counts) = send(&Impairment::default(), 100, 1500, ms(1));
    let expected: Vec<_> = (0..100)
        .map(|number| (number, ms(1) * number.into()))
        .collect();
    assert_eq!(left, expected);
    let expected = Counts {
        packets: 100,
        bytes: 150_000,
        ..Counts::default()
    };
    assert_eq!(counts, expected);
}

#[test]
fn delay_is_the_same_for_all() {
    let path = Impairment {
        delay: ms(25),
        ..Impairment::default()
    };
    for (number, at) in send(&path, 50, 100, ms(1)).0 {
        assert_eq!(at, ms(25) + ms(1) * number.into());
    }
}

#[test]
fn jitter_varies_and_keeps_the_order() {
    let path = Impairment {
        delay: ms(100),
        jitter: ms(40),
        ..Impairment::default()
    };
    let (left, _) = send(&path, 1000, 100, ms(1));
    assert!(left.iter().map(|(number, _)| *number).eq(0..1000));
    let took = left
        .iter()
        .map(|(number, at)| *at - ms(1) * (*number).into());
    let (least, most) = (took.clone().min().unwrap(), took.max().unwrap());
    assert!(least >= ms(100) && least < ms(105), "{least:?}");
    assert!(most <= ms(140) && most > ms(130), "{most:?}");
}

#[test]
fn loss_is_as_frequent_as_configured_and_the_same_for_a_seed() {
    let path = |delay| Impairment {
        loss: 0.03,
        delay,
        ..Impairment::default()
    };
    let (left, counts) = send(&path(ms(0)), 20_000, 100, ms(1));
    assert!((500..700).contains(&counts.lost), "{counts:?}");
    assert_eq!(left.len() as u64 + counts.lost, 20_000);
    let numbers = |left: Vec<(u16, Duration)>| left.into_iter().map(|(it, _)| it);
    let again = send(&path(ms(9)), 20_000, 100, ms(1)).0;
    assert!(numbers(left).eq(numbers(again)));
}

#[test]
fn what_is_held_back_is_overtaken() {
    let path = Impairment {
        delay: ms(5),
        reorder: 0.25,
        reorder_by: ms(10),
        ..Impairment::default()
    };
    let (left, counts) = send(&path, 4000, 100, ms(1));
    assert!((800..1200).contains(&counts.held_back), "{counts:?}");
    assert_eq!(left.len(), 4000);
    let late = left.iter().filter(|(number, at)| {
        let took = *at - ms(1) * (*number).into();
        assert!(took >= ms(5) && took <= ms(15), "{took:?}");
        took > ms(5)
    });
    assert!(late.count() > 700);
    assert!(!left.is_sorted_by_key(|(number, _)| *number));
}

#[test]
fn the_bottleneck_has_its_rate_and_its_queue() {
    let path = Impairment {
        // 1000 bytes take 1 ms.
        rate: Some(8_000_000),
        queue: 10_000,
        ..Impairment::default()
    };
    let (left, counts) = send(&path, 100, 1000, Duration::ZERO);
    let expected: Vec<_> = (0..10)
        .map(|number| (number, ms(u64::from(number) + 1)))
        .collect();
    assert_eq!(left, expected);
    assert_eq!(counts.overflowed, 90);
    // Half as much as it takes: nobody waits.
    let (left, _) = send(&path, 100, 1000, ms(2));
    for (number, at) in left {
        assert_eq!(at, ms(2) * number.into() + ms(1));
    }
    // Twice as much: it is always busy, and half is lost.
    let (left, _) = send(&path, 1000, 1000, ms(1) / 2);
    let (_, end) = left.last().unwrap();
    assert_eq!(left.len() as u128, end.as_millis());
    assert!((500..520).contains(&left.len()), "{}", left.len());
}

#[test]
fn a_single_packet_passes_a_queue_that_is_too_small_for_it() {
    let path = Impairment {
        rate: Some(8_000_000),
        queue: 10,
        ..Impairment::default()
    };
    assert_eq!(send(&path, 5, 1000, ms(1)).0.len(), 5);
}

#[test]
fn what_is_too_large_vanishes() {
    let path = Impairment {
        mtu: Some(1300),
        ..Impairment::default()
    };
    assert_eq!(send(&path, 5, 1300, ms(1)).0.len(), 5);
    let (left, counts) = send(&path, 5, 1301, ms(1));
    assert!(left.is_empty() && counts.too_large == 5);
}

#[test]
fn a_path_that_becomes_shorter_keeps_the_order() {
    let start = Instant::now();
    let mut schedule = Schedule::new(SEED);
    let long = Impairment {
        delay: ms(100),
        ..Impairment::default()
    };
    schedule.push(&long, start, &[1]);
    schedule.push(&Impairment::default(), start + ms(1), &[2]);
    assert_eq!(schedule.next(), Some(start + ms(100)));
    assert_eq!(schedule.pop(start + ms(100)), Some(vec![1]));
    assert_eq!(schedule.pop(start + ms(100)), Some(vec![2]));
    assert_eq!(schedule.pop(start + ms(999)), None);
}

#[test]
fn memory_is_bounded() {
    let start = Instant::now();
    let mut schedule = Schedule::new(SEED);
    let path = Impairment {
        delay: ms(1000),
        ..Impairment::default()
    };
    let packet = vec![0; 1 << 20];
    for _ in 0..100 {
        schedule.push(&path, start, &packet);
    }
    assert_eq!(schedule.counts().overflowed, 36);
    assert_eq!(schedule.held, MOST);
}
