//! What can go wrong, one variant per cause, each with the values that a caller needs to act on.

use std::fmt;

use crate::{DType, ParamId};

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A parameter as an error message shows it: its main name, if it has one, and its ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The ID.
    pub id: ParamId,
    /// The main name.
    pub name: Option<String>,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "parameter '{name}' (ID {})", self.id),
            None => write!(f, "the parameter with ID {}", self.id),
        }
    }
}

/// Everything that this crate reports. An error leaves values, moments and steps as they were.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An ID has to fit a positive signed 64-bit integer.
    #[error("{got} is no parameter ID: IDs are 1 to {max}; use ParamId::derive or ParamId::random", max = i64::MAX)]
    InvalidId {
        /// The number that was offered.
        got: u64,
    },
    /// The store already holds this ID.
    #[error("ID {} is taken by {owner}; register under another ID, or remove that parameter first", owner.id)]
    IdTaken {
        /// Who holds it.
        owner: Label,
    },
    /// The store already knows this name.
    #[error(
        "the name '{name}' is taken by {owner}; choose another, or rename that parameter first"
    )]
    NameTaken {
        /// The name that was offered.
        name: String,
        /// Who holds it.
        owner: Label,
    },
    /// No parameter has this ID.
    #[error("no parameter has ID {id}; register it first (Store::ids lists those that exist)")]
    UnknownId {
        /// The ID that was asked for.
        id: ParamId,
    },
    /// No parameter has this name.
    #[error(
        "no parameter is called '{name}'; register it first, or add the name with Store::alias"
    )]
    UnknownName {
        /// The name that was asked for.
        name: String,
    },
    /// The parameter has no such buffer.
    #[error(
        "{parameter} has no buffer '{key}'; give it one with Store::set_buffer or register_values"
    )]
    MissingBuffer {
        /// Whose buffer was asked for.
        parameter: Label,
        /// Which buffer.
        key: String,
    },
    /// The owner of a borrowed buffer no longer lends it.
    #[error(
        "the memory lent as '{key}' of {parameter} is gone; lend it anew with Store::set_buffer"
    )]
    LenderGone {
        /// Whose buffer.
        parameter: Label,
        /// Which buffer.
        key: String,
    },
    /// A slice was asked for, but the memory belongs to another framework.
    #[error(
        "'{key}' of {parameter} is lent by another framework; read it there, or through Store::buffer"
    )]
    NotOwned {
        /// Whose buffer.
        parameter: Label,
        /// Which buffer.
        key: String,
    },
    /// A slice of another element type was asked for.
    #[error("'{key}' of {parameter} holds {got}, not {expected}; ask for {got}")]
    DTypeMismatch {
        /// Whose buffer.
        parameter: Label,
        /// Which buffer.
        key: String,
        /// What the caller asked for.
        expected: DType,
        /// What the buffer holds.
        got: DType,
    },
    /// Values do not fill the shape that was given with them.
    #[error(
        "a value of shape {shape:?} has {expected} elements, but {got} were given; pass as many as the shape needs"
    )]
    ValueLength {
        /// The shape.
        shape: Vec<usize>,
        /// How many elements the shape has (`usize::MAX` where that is more than memory has).
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// A buffer or a gradient has another shape than the value.
    #[error(
        "{parameter}: '{key}' has shape {got:?}, the value has {expected:?}; pass one of the value's shape, or call Store::reset after a change of shape"
    )]
    ShapeMismatch {
        /// Whose buffer or gradient.
        parameter: Label,
        /// `"grad"`, or the buffer's key.
        key: String,
        /// The value's shape; its length alone where that is all that is known.
        expected: Vec<usize>,
        /// What came.
        got: Vec<usize>,
    },
    /// One parameter too often.
    #[error("{parameter} is named twice in one change of rows; name it once")]
    DuplicateParameter {
        /// Which parameter.
        parameter: Label,
    },
    /// Rows along a dimension that is not there.
    #[error("{parameter} has shape {shape:?}, which has no dimension {dim}")]
    NoSuchDimension {
        /// Whose rows.
        parameter: Label,
        /// The dimension that was asked for.
        dim: usize,
        /// The value's shape.
        shape: Vec<usize>,
    },
    /// A row that is not there.
    #[error("{parameter} has {rows} rows along that dimension, and none is number {row}")]
    NoSuchRow {
        /// Whose rows.
        parameter: Label,
        /// The row that was asked for.
        row: usize,
        /// How many there are.
        rows: usize,
    },
    /// A flag for each row, or the values of new rows, of another length.
    #[error("{parameter}: {got} were given for its rows, and {expected} are needed")]
    RowValues {
        /// Whose rows.
        parameter: Label,
        /// How many flags or values are needed.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// An order of rows in which some are missing or there twice.
    #[error(
        "{parameter}: the order does not name every row once; Store::gather_rows takes any list"
    )]
    NoPermutation {
        /// Whose rows.
        parameter: Label,
    },
    /// Rows along a second dimension would need steps of their own, or be frozen.
    #[error(
        "the rows of {parameter} along dimension {held} have steps of their own or are frozen, so those along dimension {dim} cannot; name rows along dimension {held}, or call Store::unfreeze_rows and Store::reset first"
    )]
    RowDimension {
        /// Whose rows.
        parameter: Label,
        /// The dimension whose rows differ.
        held: usize,
        /// The other.
        dim: usize,
    },
    /// Bounds of each element do not say what holds for elements that are new.
    #[error(
        "{parameter} has bounds of each element, which say nothing of new rows; say whose state the new rows take, or take the bounds away with Store::set_element_bounds and declare them anew afterwards"
    )]
    BoundsOfNewRows {
        /// Whose bounds.
        parameter: Label,
    },
    /// One gradient too many.
    #[error("{parameter} has two gradients in one step; add them up first")]
    DuplicateGradient {
        /// Whose gradients.
        parameter: Label,
    },
    /// Two parameters share memory.
    #[error("{first} and {second} share memory; register the whole once, and alias it")]
    Overlap {
        /// One of the two.
        first: Label,
        /// The other.
        second: Label,
    },
    /// A buffer maps several indices to one element.
    #[error(
        "'{key}' of {parameter} is expanded: several of its elements are one in memory; lend a copy"
    )]
    Expanded {
        /// Whose buffer.
        parameter: Label,
        /// Which buffer.
        key: String,
    },
    /// Bounds that hold for no number.
    #[error("no number lies between {min} and {max}; pass min <= max, neither of them NaN")]
    InvalidBounds {
        /// The lower bound (minus infinity where there is none).
        min: f64,
        /// The upper bound (infinity where there is none).
        max: f64,
    },
    /// Bounds of one element that hold for no number.
    #[error(
        "{parameter}: no number lies between {min} and {max}, the bounds of its element {index:?}; pass min <= max, neither of them NaN"
    )]
    InvalidElementBounds {
        /// Whose bounds.
        parameter: Label,
        /// The element, by its index in each dimension.
        index: Vec<usize>,
        /// Its lower bound (minus infinity where there is none).
        min: f64,
        /// Its upper bound (infinity where there is none).
        max: f64,
    },
    /// A norm cannot be taken over one dimension twice.
    #[error("{parameter}: its norm is to be taken over dimension {dim} twice; name it once")]
    RepeatedDimension {
        /// Whose norm.
        parameter: Label,
        /// Which dimension.
        dim: usize,
    },
    /// A norm that cannot be held to.
    #[error(
        "{parameter}: its norm is to be held to {got}; pass a finite number that is at least 0"
    )]
    InvalidNorm {
        /// Whose norm.
        parameter: Label,
        /// What it was to be.
        got: f64,
    },
    /// A setting of the optimizer lies outside its range.
    #[error("{name} is {got}; it must be {expected}")]
    InvalidSetting {
        /// The setting, under torch's name.
        name: &'static str,
        /// What it was.
        got: f64,
        /// The range, in words.
        expected: &'static str,
    },
}
