//! Byte counters of a relay, for the record of a connection.

use super::Meter;
use cpc_observe::access::ConnectionMeter;

impl<const LOCAL_IS_CLIENT: bool> Meter for ConnectionMeter<'_, LOCAL_IS_CLIENT> {
    fn outbound(&self, n: usize) {
        if LOCAL_IS_CLIENT {
            self.up(n)
        } else {
            self.down(n)
        }
    }

    fn inbound(&self, n: usize) {
        if LOCAL_IS_CLIENT {
            self.down(n)
        } else {
            self.up(n)
        }
    }
}
