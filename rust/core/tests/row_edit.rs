//! Rows of a store's parameters against rows that are parameters of their own.

use std::num::NonZeroUsize;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Decay, Error, Execution, Layout, NewValue, Operand, Order,
    ParamId, RowChange, SecondMoment, StepOptions, Store, adam_step,
};
use proptest::prelude::*;

const INNER: usize = 3;

/// What is done to the rows, or a step.
#[derive(Clone, Debug)]
enum Action {
    Step(u8),
    Gather(Vec<usize>),
    Append(usize),
    Reset(Vec<usize>),
    Freeze(bool),
}

fn any_action() -> impl Strategy<Value = Action> {
    let rows = || prop::collection::vec(0usize..100, 0..6);
    prop_oneof![
        4 => any::<u8>().prop_map(Action::Step),
        1 => rows().prop_map(Action::Gather),
        1 => (0usize..4).prop_map(Action::Append),
        1 => rows().prop_map(Action::Reset),
        1 => any::<bool>().prop_map(Action::Freeze),
    ]
}

/// One row by itself: its value, its moments, and the steps that it has taken.
type Row = (Vec<f32>, Vec<Vec<f32>>, u64);

fn grad_of(seed: u8, row: usize) -> Vec<f32> {
    (0..INNER).map(|i| ((row * 7 + i * 3 + usize::from(seed)) % 11) as f32 * 0.1 - 0.5).collect()
}

proptest! {
    /// `dim` 0 is [rows, INNER]; `dim` 1 is [INNER, rows].
    #[test]
    fn a_row_does_what_a_parameter_of_its_own_does(
        actions in prop::collection::vec(any_action(), 1..25),
        dim in 0usize..2,
        amsgrad in any::<bool>(),
    ) {
        let second_moment = if amsgrad { SecondMoment::Maximum } else { SecondMoment::Running };
        let adam = Adam {
            lr: 0.1, weight_decay: 0.01, decay: Decay::Decoupled, second_moment, ..Adam::default()
        };
        let mut rows: Vec<Row> =
            (0..4).map(|row| (grad_of(9, row), vec![vec![0.0; INNER]; 3], 0)).collect();
        let mut store = Store::new();
        let flat = |rows: &[Vec<f32>]| -> Vec<f32> {
            if dim == 0 { rows.concat() } else {
                (0..INNER).flat_map(|i| rows.iter().map(move |row| row[i])).collect()
            }
        };
        let shape = |rows: usize| if dim == 0 { [rows, INNER] } else { [INNER, rows] };
        let values: Vec<Vec<f32>> = rows.iter().map(|(value, ..)| value.clone()).collect();
        let id = store.register_values(Some("w"), None, &shape(4), &flat(&values)).unwrap();
        // Another parameter that lives through the same.
        let other = store.register_values(Some("v"), None, &[4], &[0.0f32; 4]).unwrap();
        let (mut frozen, ids) = (false, [id, other]);
        for action in actions {
            let count = rows.len();
            let fit = |index: Vec<usize>| -> Vec<usize> {
                if count == 0 { Vec::new() } else { index.into_iter().map(|row| row % count).collect() }
            };
            match action {
                Action::Step(seed) => {
                    let grads: Vec<Vec<f32>> = (0..count).map(|row| grad_of(seed, row)).collect();
                    let grads_flat = flat(&grads);
                    let report = store.step(&[(id, (&grads_flat).into())], &adam, &StepOptions::default()).unwrap();
                    prop_assert_eq!(report.updated, usize::from(!frozen));
                    if !frozen {
                        for (row, grad) in rows.iter_mut().zip(&grads) {
                            *row = stepped(row, grad, &adam);
                        }
                    }
                }
                Action::Gather(index) => {
                    let index = fit(index);
                    if dim == 0 { store.gather_rows(&ids, 0, &index).unwrap() }
                    else { store.gather_rows(&[id], 1, &index).unwrap() }
                    rows = index.iter().map(|&row| rows[row].clone()).collect();
                }
                Action::Append(new) => {
                    let values: Vec<Vec<f32>> = (0..new).map(|row| grad_of(3, row)).collect();
                    let added = flat(&values);
                    store.append_rows(dim, new, &[(id, added.as_slice().into())]).unwrap();
                    if dim == 0 {
                        let edits = vec![(other, NewValue::Follows)];
                        store.edit_rows(edits, 0, RowChange::Append(new)).unwrap();
                    }
                    rows.extend(values.into_iter().map(|value| (value, vec![vec![0.0; INNER]; 3], 0)));
                }
                Action::Reset(index) => {
                    let index = fit(index);
                    store.reset_rows(&[id], dim, &index).unwrap();
                    for row in index { (rows[row].1, rows[row].2) = (vec![vec![0.0; INNER]; 3], 0); }
                }
                Action::Freeze(now) => {
                    if now { store.freeze(id).unwrap() } else { store.unfreeze(id).unwrap() }
                    frozen = now;
                }
            }
            prop_assert_eq!(store.shape(id).unwrap(), Some(&shape(rows.len())[..]));
            let of = |part: fn(&Row) -> Vec<f32>| -> Vec<f32> {
                flat(&rows.iter().map(part).collect::<Vec<_>>())
            };
            prop_assert_eq!(store.values::<f32>(id).unwrap(), of(|row| row.0.clone()));
            if let Some(state) = store.state::<f32>(id).unwrap() {
                prop_assert_eq!(state.exp_avg, of(|row| row.1[0].clone()));
                prop_assert_eq!(state.exp_avg_sq, of(|row| row.1[1].clone()));
                if let Some(max) = state.max_exp_avg_sq {
                    prop_assert_eq!(max, of(|row| row.1[2].clone()));
                }
            }
            if !rows.is_empty() {
                let steps: Vec<u64> = rows.iter().map(|row| row.2).collect();
                match store.row_steps(id).unwrap() {
                    Some((held, of_rows)) => {
                        prop_assert_eq!((held, &of_rows), (dim, &steps));
                        prop_assert!(of_rows.iter().any(|step| *step != of_rows[0]), "they differ");
                    }
                    None => prop_assert_eq!(vec![store.steps(id).unwrap(); rows.len()], steps),
                }
            }
        }
    }
}

/// One step of one row, which is a parameter of its own for that long.
fn stepped((value, moments, step): &Row, grad: &[f32], adam: &Adam) -> Row {
    let (mut value, mut moments, mut grad) = (value.clone(), moments.clone(), grad.to_vec());
    let operand = |x: &mut Vec<f32>| Operand { ptr: x.as_mut_ptr().cast(), dtype: DType::F32 };
    let [m, v, max] = moments.as_mut_slice() else { panic!("three moments") };
    let task = AdamTask {
        value: operand(&mut value),
        grad: operand(&mut grad),
        exp_avg: operand(m),
        exp_avg_sq: operand(v),
        max_exp_avg_sq: (adam.second_moment == SecondMoment::Maximum).then(|| operand(max)),
        layout: Layout::Flat { len: INNER },
        scalars: adam.scalars((step + 1) as f64, 1.0),
        bounds: Bounds::default(),
        particulars: None,
        precision: None,
    };
    // SAFETY: vectors of as many elements, which live until the end.
    unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
    (value, moments, step + 1)
}

fn two() -> (Store, ParamId, ParamId) {
    let mut store = Store::new();
    let w = store.register_values(Some("w"), None, &[3, 2], &[1.0f32; 6]).unwrap();
    let v = store.register_values(Some("v"), None, &[2], &[1.0f32; 2]).unwrap();
    let grads = [(w, (&[1.0f32; 6]).into()), (v, (&[1.0f32; 2]).into())];
    store.step(&grads, &Adam::default(), &StepOptions::default()).unwrap();
    (store, w, v)
}

#[test]
fn one_parameter_that_cannot_follow_stops_all() {
    let (mut store, w, v) = two();
    let before = format!("{store:?}");
    let values =
        (store.values::<f32>(w).unwrap().to_vec(), store.values::<f32>(v).unwrap().to_vec());
    let label = |id| store.entry(id).unwrap().names()[0].clone();
    assert_eq!((label(w), label(v)), ("w".to_owned(), "v".to_owned()));
    let refused = |result: Result<(), Error>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    refused(store.gather_rows(&[w, v], 0, &[2]), "'v' (ID");
    refused(store.gather_rows(&[w, v], 0, &[2]), "none is number 2");
    refused(store.reset_rows(&[w, v], 1, &[0]), "has no dimension 1");
    refused(store.gather_rows(&[w, w], 0, &[0]), "named twice");
    refused(store.keep_rows(&[w, v], 0, &[true; 3]), "3 were given for its rows, and 2 are needed");
    refused(store.permute_rows(&[w], 0, &[0, 1, 1]), "does not name every row once");
    refused(
        store.append_rows(0, 1, &[(w, (&[1.0f32; 2]).into()), (v, (&[1.0f32; 2]).into())]),
        "2 were given",
    );
    refused(store.append_rows(0, 1, &[(w, (&[1.0f64; 2]).into())]), "float32, not float64");
    assert_eq!(format!("{store:?}"), before);
    assert_eq!(
        (store.values::<f32>(w).unwrap(), store.values::<f32>(v).unwrap()),
        (&values.0[..], &values.1[..])
    );
}

#[test]
fn rows_along_a_second_dimension_get_no_steps_of_their_own() {
    let (mut store, w, _) = two();
    store.reset_rows(&[w], 0, &[1]).unwrap();
    let error = store.append_rows(1, 1, &[(w, (&[1.0f32; 3]).into())]).unwrap_err();
    assert!(matches!(error, Error::RowDimension { held: 0, dim: 1, .. }), "{error}");
    store.gather_rows(&[w], 1, &[1, 0, 1]).unwrap(); // each row is as old as it was
    assert_eq!(store.row_steps(w).unwrap(), Some((0, vec![1, 0, 1])));
    assert_eq!(store.shape(w).unwrap(), Some(&[3, 3][..]));
    store.step(&[(w, (&[1.0f32; 9]).into())], &Adam::default(), &StepOptions::default()).unwrap();
    store.reset(w).unwrap();
    assert_eq!(store.row_steps(w).unwrap(), None);
}

#[test]
fn bounds_of_each_element_hold_and_follow_their_rows() {
    let (mut store, w, _) = two();
    let max = [9.0f32, 0.0, 9.0, 0.5, 9.0, f32::INFINITY];
    store.set_element_bounds(w, None, Some(&max)).unwrap();
    store.gather_rows(&[w], 0, &[2, 0, 1]).unwrap();
    store.step(&[(w, (&[-1.0f32; 6]).into())], &Adam::default(), &StepOptions::default()).unwrap();
    let values = store.values::<f32>(w).unwrap();
    assert_eq!((values[3], values[5]), (0.0, 0.5));
    assert!(values[1] > 0.9);
    let error = store.append_rows(0, 1, &[(w, (&[1.0f32; 2]).into())]).unwrap_err();
    assert!(matches!(error, Error::BoundsOfNewRows { .. }), "{error}");
    let error = store.set_element_bounds(w, Some(&[1.0f32; 5]), None).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
    let error = store.set_element_bounds(w, Some(&[1.0f32; 6]), Some(&max)).unwrap_err();
    assert!(
        error.to_string().contains("between 1 and 0, the bounds of its element [0, 1]"),
        "{error}"
    );
    let error = store.set_element_bounds(w, None, Some(&[f32::NAN; 6])).unwrap_err();
    assert!(matches!(error, Error::InvalidElementBounds { .. }), "{error}");
}

#[test]
fn a_frozen_parameter_s_gradient_is_not_in_the_norm() {
    let (mut store, w, v) = two();
    store.freeze(w).unwrap();
    let options = StepOptions { max_grad_norm: Some(1.0), ..StepOptions::default() };
    let grads = [(w, (&[9.0f32; 6]).into()), (v, (&[3.0f32, 4.0]).into())];
    let report = store.step(&grads, &Adam::default(), &options).unwrap();
    assert_eq!((report.grad_norm, report.updated), (Some(5.0), 1));
    assert_eq!((store.steps(w).unwrap(), store.steps(v).unwrap()), (1, 2));
    assert!(store.is_frozen(w).unwrap());
}
