//! Tests of a keeper with its clients, over real sockets. An owner that dies is a process of its own: this test
//! binary, started again.

mod confined;
mod hostile;
mod owners;
mod running;
mod survival;
