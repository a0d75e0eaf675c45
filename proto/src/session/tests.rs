//! Two ends in virtual time; [`pair`] connects them.

mod pair;
mod scripts;
mod transitions;
