//! Two ends in virtual time: [`pair`] is the world they live in.

mod pair;
mod scripts;
mod transitions;
