//! Two Adam steps of a real spaced-repetition trainer, with its values clipped after each, in Burn and in paramstate: how
//! far the second step ends from what the trainer expects, and whether there is state for the parameter.

use burn::backend::{Autodiff, NdArray};
use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use paramstate::{Adam, ParamId, StepOptions, Store};

type Cpu = Autodiff<NdArray>;
type Weights = Param<Tensor<Cpu, 1>>;

#[derive(Module, Debug)]
struct Model<B: Backend> {
    w: Param<Tensor<B, 1>>,
}

/// The numbers of the trainer's own test.
const DATA: &str = include_str!("../../../tests/data/fsrs_adam.json");

/// One array of it.
fn array(name: &str) -> Vec<f32> {
    let start = DATA.find(&format!("\"{name}\": [")).expect("it is in the file") + name.len() + 5;
    let end = start + DATA[start..].find(']').expect("an array ends");
    DATA[start..end].split(',').map(|number| number.trim().parse().expect("a number")).collect()
}

/// The trainer's range of each value, with one relearning step: then the two bounds that depend on other values are 2.
fn clip(values: &mut [f32]) {
    let numbers = DATA[DATA.find("\"range\"").expect("it is in the file")..]
        .replace("\"ceiling\"", "2.0")
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter_map(|number| number.parse().ok())
        .collect::<Vec<f32>>();
    for (value, range) in values.iter_mut().zip(numbers.chunks(2)) {
        *value = value.clamp(range[0], range[1]);
    }
}

/// The values of a tensor, clipped, as a new leaf.
fn clipped(values: Tensor<Cpu, 1>) -> Tensor<Cpu, 1> {
    let mut plain = values.to_data().to_vec::<f32>().expect("float32");
    clip(&mut plain);
    Tensor::from_floats(plain.as_slice(), &Default::default()).require_grad()
}

fn largest_error(values: &[f32]) -> f32 {
    values.iter().zip(array("w2")).map(|(x, expected)| (x - expected).abs()).fold(0.0, f32::max)
}

fn in_burn(label: &str, clip: fn(Weights) -> Weights) {
    let mut model = Model {
        w: Param::from_tensor(Tensor::from_floats(array("w0").as_slice(), &Default::default())),
    };
    let mut optimizer = AdamConfig::new().with_epsilon(1e-8).init::<Cpu, Model<Cpu>>();
    for name in ["grad1", "grad2"] {
        let grad = Tensor::from_floats(array(name).as_slice(), &Default::default());
        let gradients = (model.w.val() * grad).sum().backward(); // the gradient is exactly `grad`
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.04, model, gradients);
        model.w = clip(model.w);
    }
    let records = optimizer.to_record();
    let values = model.w.val().to_data().to_vec::<f32>().expect("float32");
    report(label, &values, records.contains_key(&model.w.id), records.len());
}

fn in_paramstate() -> paramstate::Result<()> {
    let mut store = Store::new();
    let w = store.register_values(Some("w"), Some(ParamId::new(7)?), &[21], &array("w0"))?;
    for name in ["grad1", "grad2"] {
        let adam = Adam { lr: 0.04, ..Adam::default() };
        store.step(&[(w, (&array(name)).into())], &adam, &StepOptions::default())?;
        store.clip_with(w, clip)?;
    }
    report(
        "paramstate, store.clip_with(w, clip)",
        store.values(w)?,
        store.state::<f32>(w)?.is_some(),
        store.len(),
    );
    Ok(())
}

fn report(label: &str, values: &[f32], found: bool, records: usize) {
    let found = if found { "found" } else { "lost" };
    println!("{label:42}error {:.1e}, state {found}, {records} in all", largest_error(values));
}

fn main() -> paramstate::Result<()> {
    in_burn("Burn, Param::from_tensor(clip(w))", |w| Param::from_tensor(clipped(w.val())));
    in_burn("Burn, w.map(clip)", |w| w.map(clipped));
    in_paramstate()
}
