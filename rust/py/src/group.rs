//! The settings of a group of parameters, as a step is given them.

use paramstate::{Adam, AdamScalars, Decay, Direction, SecondMoment};

/// lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize.
pub type Settings = (f64, f64, f64, f64, f64, bool, bool, bool);

/// The settings of one group.
pub struct Group {
    pub index: usize,
    pub adam: Adam,
    /// Stands in a task until its step is known.
    pub scalars: AdamScalars,
}

impl From<(usize, Settings)> for Group {
    fn from((index, settings): (usize, Settings)) -> Self {
        let (lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize) = settings;
        let decay = if decoupled { Decay::Decoupled } else { Decay::L2 };
        let direction = if maximize { Direction::Maximize } else { Direction::Minimize };
        let second_moment = if amsgrad { SecondMoment::Maximum } else { SecondMoment::Running };
        let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, direction, second_moment };
        Self { index, adam, scalars: adam.scalars(1.0, 1.0) }
    }
}
