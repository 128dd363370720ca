//! What a Rust trainer asked of Burn: clip by a closure after the step, under an ID of its own, and
//! keep the state. The numbers are those of a real trainer's own test.

use paramstate::{Adam, Bounds, Error, ParamId, StepOptions, Store};

const DATA: &str = include_str!("../../../tests/data/fsrs_adam.json");

/// One array of the file.
fn array(name: &str) -> Vec<f32> {
    let key = format!("\"{name}\": [");
    let start = DATA.find(&key).unwrap() + key.len();
    let end = start + DATA[start..].find(']').unwrap();
    DATA[start..end].split(',').map(|number| number.trim().parse().unwrap()).collect()
}

/// The trainer's ranges; the bound of two values depends on three others, which come before it.
fn clip(relearning_steps: f32) -> impl Fn(&mut [f32]) {
    move |w: &mut [f32]| {
        let ranges = DATA[DATA.find("\"range\"").unwrap()..DATA.find("\"binding_case\"").unwrap()]
            .replace("\"ceiling\"", "-1");
        let numbers: Vec<f32> = ranges
            .split(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-'))
            .filter_map(|number| number.parse().ok())
            .collect();
        assert_eq!(numbers.len(), 2 * w.len());
        for (x, range) in w.iter_mut().zip(numbers.chunks(2)).filter(|(_, range)| range[1] > 0.0) {
            *x = x.clamp(range[0], range[1]);
        }
        let total = w[11].ln() + (w[13].exp2() - 1.0).ln() + 0.3 * w[14];
        let bound = (-total / relearning_steps).max(0.01).sqrt().min(2.0);
        let ceiling = if relearning_steps > 1.0 { bound } else { 2.0 };
        for (x, range) in w.iter_mut().zip(numbers.chunks(2)).filter(|(_, range)| range[1] < 0.0) {
            *x = x.clamp(range[0], ceiling);
        }
    }
}

fn largest_error(values: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(values.len(), expected.len());
    values.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn step(store: &mut Store, w: ParamId, grad: &str) {
    let adam = Adam { lr: 0.04, ..Adam::default() };
    store.step(&[(w, (&array(grad)).into())], &adam, &StepOptions::default()).unwrap();
}

#[test]
fn a_clip_by_a_closure_under_an_id_of_ones_own_keeps_the_state_of_a_real_trainer() {
    let own = ParamId::new(42).unwrap();
    let mut store = Store::new();
    let w = store.register_values(Some("w"), Some(own), &[21], &array("w0")).unwrap();
    assert_eq!(w, own);
    for (number, grad) in ["grad1", "grad2"].into_iter().enumerate() {
        step(&mut store, own, grad);
        store.clip_with(own, clip(1.0)).unwrap();
        let expected = array(["w1", "w2"][number]);
        assert!(largest_error(store.values(own).unwrap(), &expected) <= 1e-6);
    }
    assert_eq!(store.steps(own), Ok(2));
    assert_eq!(store.id("w"), Some(own));
}

#[test]
fn the_state_lost_shows_in_the_second_step() {
    let mut store = Store::new();
    let w = store.register_values(Some("w"), None, &[21], &array("w0")).unwrap();
    step(&mut store, w, "grad1");
    store.reset(w).unwrap(); // what a parameter under a new ID starts from
    step(&mut store, w, "grad2");
    let error = largest_error(store.values(w).unwrap(), &array("w2"));
    assert!((error - 5.4e-2).abs() < 1e-3, "{error}");
}

#[test]
fn the_bounds_that_depend_on_other_values_bind() {
    let mut store = Store::new();
    let w = store.register_values(Some("w"), None, &[21], &array("values")).unwrap();
    store.clip_with(w, clip(2.0)).unwrap();
    assert!(largest_error(store.values(w).unwrap(), &array("clipped")) <= 1e-6);
}

#[test]
fn a_clip_by_bounds_or_closure_leaves_moments_and_step_as_they_were() {
    let mut store = Store::new();
    let w = store.register_values(None, ParamId::new(7).ok(), &[21], &array("w0")).unwrap();
    step(&mut store, w, "grad1");
    let before = store.state::<f32>(w).unwrap().unwrap();
    let (exp_avg, exp_avg_sq) = (before.exp_avg.to_vec(), before.exp_avg_sq.to_vec());
    store.clip(w, Bounds::new(Some(0.25), Some(1.0)).unwrap()).unwrap();
    store.clip_with(w, |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= 0.5)).unwrap();
    assert!(store.values::<f32>(w).unwrap().iter().all(|x| (0.125..=0.5).contains(x)));
    let after = store.state::<f32>(w).unwrap().unwrap();
    assert_eq!((after.step, after.exp_avg, after.exp_avg_sq), (1, &*exp_avg, &*exp_avg_sq));
}

#[test]
fn an_id_of_ones_own_is_taken_once() {
    let mut store = Store::new();
    let own = ParamId::new(42).unwrap();
    store.register_values(Some("w"), Some(own), &[1], &[0.0f32]).unwrap();
    let error = store.register_values(Some("v"), Some(own), &[1], &[0.0f32]).unwrap_err();
    assert!(matches!(error, Error::IdTaken { .. }), "{error}");
}
